//! One program with all tests of this crate: it is linked once.

mod c_programs_use_the_library;
mod the_header_is_not_stale;
