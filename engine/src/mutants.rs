//! Planted defects, for testing the tests.
//!
//! A build with debug assertions has them; there one of them per thread can be switched on, and the simulator must find
//! it. In a release `mutant!("name")` is `false`, and costs nothing.

use std::cell::Cell;

/// Has this build planted defects? Only one with debug assertions has.
pub const ARE_PLANTED: bool = cfg!(debug_assertions);

/// Is the named defect switched on?
#[macro_export]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is_active($name)
    };
}

thread_local! {
    static ACTIVE: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// See [`mutant!`](crate::mutant).
#[inline(always)]
pub fn is_active(name: &str) -> bool {
    ARE_PLANTED && ACTIVE.get() == Some(name)
}

/// Switches one of them on in this thread, or all off. In a release it does nothing.
pub fn activate(name: Option<&'static str>) {
    ACTIVE.set(name);
}
