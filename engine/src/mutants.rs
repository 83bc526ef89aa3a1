//! Planted defects, for testing the tests.
//!
//! `mutant!("name")` is `false` in every build without the feature `mutants`, and then costs
//! nothing. With it, one mutant per thread can be switched on; the simulator must find it.

/// Is the named defect switched on?
#[macro_export]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is_active($name)
    };
}

/// See [`mutant!`].
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is_active(_name: &str) -> bool {
    false
}

#[cfg(feature = "mutants")]
mod on {
    use std::cell::Cell;
    thread_local! {
        static ACTIVE: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// See [`mutant!`](crate::mutant).
    pub fn is_active(name: &str) -> bool {
        ACTIVE.get() == Some(name)
    }

    /// Switches one mutant on in this thread, or all off.
    pub fn activate(name: Option<&'static str>) {
        ACTIVE.set(name);
    }
}

#[cfg(feature = "mutants")]
pub use on::{activate, is_active};
