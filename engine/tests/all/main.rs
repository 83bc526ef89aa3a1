//! One program with all tests of this crate: it is linked once.

mod contract;
mod copies_do_each_byte_once;
mod cpu_work_is_an_op;
mod disk;
mod files_know_what_is_below_them;
mod nodes_issue_any_kind_below;
