//! One program with all tests of this crate: it is linked once.

mod benchmarks_say_how_long_the_loop_is_held;
mod bitmaps_go_with_the_disk;
mod chains_are_rewritten;
mod checksums_are_those_of_raw_images;
#[path = "../common/mod.rs"]
mod common;
mod compressed_writes_are_read_by_qemu;
mod copies_are_gone_on_with;
mod defects_of_qemu_do_not_occur;
mod disks_are_backed_up;
mod disks_are_resized_as_qemu_resizes_them;
mod disks_of_servers_are_images;
mod foreign_writes_are_crashed;
mod guests_are_served_over_vhost_user;
mod images_are_converted;
mod images_are_locked_as_qemu_locks_them;
mod images_are_served_over_nbd;
mod images_interoperate_with_qemu;
mod it_ends_well;
mod new_images_are_measured;
mod other_peoples_images_are_left_alone;
mod output_is_that_of_qemu;
mod parts_are_copied_by_blocks;
mod real_runs_are_done_again;
mod real_runs_are_varied;
mod runs_can_be_seen;
mod streams_are_as_the_specification_says;
mod system_calls_are_those_that_the_docs_list;
mod the_seeds_scripts_run_unchanged;
mod the_simulator_answers;
mod vdi_images_interoperate_with_qemu;
mod vmdk_images_interoperate_with_qemu;
mod what_was_flushed_survives_a_kill;
mod what_was_flushed_survives_a_power_cut;
