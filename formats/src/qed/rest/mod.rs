//! A QED image at rest: what works on files that may be waited for.

pub mod backing;
pub mod check;
pub mod create;
pub(crate) mod map;
pub mod open;
