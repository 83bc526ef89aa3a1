//! QED, the QEMU enhanced disk: layout, opening, making, checking.

mod alloc;
pub mod check;
pub mod create;
pub mod driver;
mod house;
pub mod layout;
pub mod open;
mod space;
mod walk;

pub use crate::space::{Grow, Growth};
pub use driver::{Qed, QedOptions};
pub use open::Opened;
