//! One program with all tests of this crate: it is linked once.

mod contract;
mod cpu_work_is_an_op;
mod disk;
mod files_know_what_is_below_them;
mod nodes_issue_any_kind_below;
