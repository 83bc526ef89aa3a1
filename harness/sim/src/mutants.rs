//! Mutants: planted defects that the simulator must find.
//!
//! A defect that survives is a finding: a hole in the model or in the scopes, or a change that
//! cannot be told from the original. The latter are in [`EQUIVALENT`], each with its argument.
//! Besides defects in the code there are devices that [lie](crate::backend::Lie).

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cowbell_engine::mutants::{ARE_PLANTED, activate};
use cowbell_formats::Format;

use crate::backend::Lie;
use crate::clock::Stopwatch;
use crate::explore::{Limit, exhaust};
use crate::gate::{Scope, scopes, scopes_on, scopes_with};
use crate::random::run_once;
use crate::subjects::{self, Image, State};
use crate::trace::Trace;
use crate::workload::{Request, Workload};
use crate::world::{Base, Budget, QUIET};

/// A planted defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// Its name in the code.
    pub name: &'static str,
    /// What is wrong.
    pub title: &'static str,
    /// Where it shows.
    pub format: Format,
    /// A lying device instead of a change in the code.
    pub lie: Option<Lie>,
}

impl Mutant {
    /// The trace says so. A lie is the image's device's, which says so anyway.
    fn shown_by(&self, trace: Trace) -> Trace {
        Trace { plant: self.plant(), ..trace }
    }

    /// What is planted in the engine for it.
    fn plant(&self) -> Option<&'static str> {
        Some(self.name).filter(|_| self.lie.is_none())
    }
}

const fn qed(name: &'static str, title: &'static str) -> Mutant {
    Mutant { name, title, format: Format::Qed, lie: None }
}

const fn qcow2(name: &'static str, title: &'static str) -> Mutant {
    Mutant { name, title, format: Format::Qcow2, lie: None }
}

const fn vmdk(name: &'static str, title: &'static str) -> Mutant {
    Mutant { name, title, format: Format::Vmdk, lie: None }
}

const fn vdi(name: &'static str, title: &'static str) -> Mutant {
    Mutant { name, title, format: Format::Vdi, lie: None }
}

const fn raw(name: &'static str, title: &'static str) -> Mutant {
    Mutant { name, title, format: Format::Raw, lie: None }
}

const fn lie(name: &'static str, title: &'static str, lie: Lie) -> Mutant {
    Mutant { name, title, format: Format::Raw, lie: Some(lie) }
}

/// All of them.
pub const MUTANTS: &[Mutant] = &[
    raw("flush_does_nothing", "a flush is answered without asking the device"),
    raw("flush_rides_on_one_in_flight", "a flush joins one that was issued before it came"),
    raw("flush_covers_what_is_in_flight", "a flush counts for writes that end after it began"),
    raw("flush_error_swallowed", "a failed flush counts as a good one"),
    raw("short_write_counts_as_whole", "the rest of a short write is forgotten"),
    raw("rmw_without_claim", "two unaligned writes rewrite one block at once"),
    raw("rmw_ignores_writes_in_flight", "an unaligned write puts a newer write's bytes back"),
    raw(
        "gate_ignored",
        "a read or write is submitted while a truncation or hole has the file's lock",
    ),
    raw(
        "lock_taken_over_ops_in_flight",
        "a zero write takes the file's lock while reads are in flight",
    ),
    raw("given_up_although_in_use", "space is given back although it was written again meanwhile"),
    raw("given_up_is_read_as_it_was", "a discarded block is read before its discard is done"),
    raw("pace_of_what_is_not_taken", "a device that takes nothing is handed more and more at once"),
    vmdk(
        "written_zeros_need_no_gate",
        "zeros that a file system has to be written end a file while others are at work on it",
    ),
    raw("turn_ignored", "a run goes on for as long as there is something to do"),
    raw("zeroes_cut_blocks", "the file system zeroes part of a block behind a write's back"),
    raw("write_end_wakes_nobody", "who waits for writes in flight waits for ever"),
    raw("drain_error_forgotten", "a drain that could not make all stable says that it did"),
    raw("failed_flush_tried_again", "the flush after a failed one counts for what that lost"),
    raw("failed_flush_poisons_others", "a failed flush of one disk fails those of another"),
    raw("drained_node_settles_again", "a disk that was drained asks more of a layer that was, too"),
    raw("close_waits_for_nothing", "a disk is closed with requests in flight"),
    raw("closed_node_takes_requests", "a disk that is being closed takes requests"),
    raw("id_used_again", "the id of a closed disk is the next one's"),
    qed("drained_and_paused_is_used", "a disk that was drained in vain and paused is cleaned"),
    raw("resumed_node_takes_nothing", "a disk that was paused takes no requests again"),
    raw("write_overtakes_abandoned_one", "what was given up is written after what came later"),
    raw("quota_ignored", "a disk has more requests than are its share"),
    raw("copy_ends_before_its_flush", "a copy has ended, and what it wrote is not stable"),
    raw("copy_counted_before_it_is_written", "a piece counts as copied when it is begun"),
    raw("copy_skips_zeros", "zeros are not written over what the target of a copy holds"),
    raw("copy_leaves_the_rest", "what is behind the end of a copy's source stays as it was"),
    raw("cancelled_copy_forgets_workers", "a copy's memory is given up with ops in flight"),
    raw("cancelled_copy_sleeps_on", "a copy that is paused and cancelled never ends"),
    qed("copy_overtakes_abandoned_write", "what was given up is written over what was copied"),
    raw("resumed_copy_sleeps_on", "a copy that was paused never goes on"),
    raw("drain_leaves_copies", "a drain waits for a copy that is paused"),
    raw("guest_writes_before_copy", "what is to be copied as it was is written before it is read"),
    raw("zeros_are_not_copied_first", "a zero write goes on before a copy has read what was there"),
    raw("taken_counts_as_read", "what a copy is about to read may be written"),
    raw(
        "copy_takes_again_what_it_has",
        "a copy reads again what was read because it was to change",
    ),
    raw("paused_copy_holds_guests", "who waits for a copy waits until it is resumed"),
    raw("failed_copy_holds_guests", "who waits for a copy that has failed waits for ever"),
    raw(
        "stopped_copy_skips_what_failed",
        "what a copy could not write is left out when it is resumed",
    ),
    raw("stopped_copy_sleeps_on", "a copy that has stopped is not woken when it is resumed"),
    raw(
        "offloaded_copy_counts_as_read_at_once",
        "a write goes on while the kernel copies what was there",
    ),
    raw("failed_offload_counts_as_copied", "what the kernel could not copy is left out"),
    raw("failed_copy_waits_to_be_seen", "a copy that has failed waits to be looked at"),
    raw("copy_shows_what_it_has_first", "what a copy has read is shown as it comes, not in order"),
    raw("copy_is_done_up_to_the_next_piece", "what is begun of a copy counts as done"),
    raw("what_a_copy_gave_up_is_done", "what is under way when a copy is cancelled counts as done"),
    qed(
        "mirror_goes_by_an_old_answer",
        "where a mirror was told of zeros it copies nothing, though it was written to since",
    ),
    qcow2("mirror_skips_zeros_again", "what a mirror copied, and is zeros since, stays there"),
    vmdk(
        "inflated_grain_is_looked_for_again",
        "two reads take the only place for inflated grains from each other, for ever",
    ),
    raw("copy_waits_for_a_time_that_has_come", "a loop is told to run again and again for nothing"),
    raw("mirror_forgets_writes", "what is written beside a mirror is not copied again"),
    raw(
        "held_write_stays_behind",
        "what was held before a mirror's end overtakes what was given up",
    ),
    raw(
        "abandoned_writes_stay_behind",
        "what was given up comes to the new disk after what is new",
    ),
    raw("mirror_lets_writes_pass", "writes go on while the last of a mirror is copied"),
    raw(
        "mirror_ends_with_writes_in_flight",
        "a mirror becomes the disk before writes to the old one end",
    ),
    raw("mirror_copies_one_piece_twice_at_once", "an older copy of a mirror's is written last"),
    raw(
        "mirror_begins_before_old_writes_end",
        "a mirror misses what was being written when it began",
    ),
    raw(
        "write_goes_to_what_was_mirrored",
        "who waited for a mirror writes to what it has replaced",
    ),
    raw("copied_disk_is_closed", "a disk is closed while it is copied"),
    raw("copied_disk_stays_in_use", "a disk that was copied is in use for ever"),
    qcow2("pause_goes_no_deeper", "what is below a paused disk goes on"),
    qed("error_of_a_piece_swallowed", "a request is well although the layer below failed it"),
    qed(
        "no_room_is_left_for_a_step",
        "who passes on requests finds no room, and waits for nothing",
    ),
    qed("layer_settles_before_those_above", "a layer settles that others still write to"),
    qed("close_takes_shared_layer", "a disk that goes takes along what another reads from"),
    qcow2("close_settles_nothing", "a disk that is closed does not write its tables back"),
    qed("status_stays_in_layer", "where an overlay says nothing, nobody asks what is below"),
    qcow2("status_of_all", "what is at the first byte is said of all that was asked about"),
    qed("mark_not_flushed", "the first allocation does not wait for the need-check mark"),
    qed("never_marked", "the need-check mark is never set"),
    qed("unmarked_without_flush", "the mark goes before the file's end is cut off, stably"),
    qed("qed_unmarked_before_tables", "the mark goes before tables are written"),
    qed("published_early", "an entry leads to data that is not there yet"),
    qed("data_error_ignored", "an entry leads to data whose write failed"),
    qed("qed_length_not_fenced", "an entry may be stable before the file is that long"),
    qed("qed_backing_not_fenced", "an entry may be stable before the data that it needs"),
    qed("qed_slices_not_sealed", "a writeback writes what was published after its fence"),
    qed("qed_new_tables_not_sealed", "a writeback links tables that came after its fence"),
    qed("qed_changed_slice_not_pinned", "a changed slice is evicted"),
    qed("qed_table_error_ignored", "a failed write of tables counts as a good one"),
    qed("qed_failed_l1_forgotten", "a table whose link could not be written is linked never again"),
    qed("qed_flush_writes_no_tables", "a guest's flush leaves changed tables in memory"),
    qed("qed_writeback_makes_no_room", "who waits for room in the cache waits for ever"),
    qed("failed_growth_is_done", "space is handed out that a failed growth did not bring"),
    qed("failed_growth_never_ends", "after a growth that failed the file is growing for ever"),
    qed("failed_growth_told_for_ever", "who wants space is told of a failure before his time"),
    qed("spare_end_kept_after_failed_cut", "what a failed cut may have taken is handed out"),
    qed("no_claims", "two requests allocate one cluster at once"),
    qed("claim_one_cluster_short", "a claim does not cover its last cluster"),
    qed("claim_never_wakes", "who waits for a claim waits for ever"),
    qed("claim_kept_on_error", "a failed request keeps its claim"),
    qed("no_wake_on_error", "a failed request wakes nobody"),
    qed("woken_trusts_old_lookup", "a woken request does not look up again"),
    qed("slice_not_pinned", "a slice being changed is evicted"),
    qed("slice_used_while_loading", "a slice is used before it is there"),
    qed("run_ignores_type", "clusters of different kinds are taken for one run"),
    qed("cow_tail_skipped", "what lies behind a write is not copied"),
    qed("cow_from_wrong_cluster", "copy-on-write copies another cluster"),
    qed(
        "pull_begins_before_old_writes_end",
        "a pull overwrites what was being written when it began",
    ),
    qed("pull_lets_writes_pass_before_its_own", "a pull overwrites what came after it had read"),
    qed("cancelled_pull_lets_writes_pass", "a pull that is cancelled overwrites what came after"),
    qed("pull_leaves_out_a_layer", "a pull leaves out what it is for"),
    qed("zero_cluster_shows_backing", "a write to a zero cluster brings back the backing file"),
    qed("qed_leaks_not_counted", "a lost write of a table is noticed by nobody"),
    qed("short_backing_not_zeroed", "what lies behind a short backing file is not zeros"),
    vdi("vdi_no_claims", "two requests allocate one block of the disk at once"),
    vdi("vdi_published_early", "an entry leads to data that is not there yet"),
    vdi("vdi_data_error_ignored", "an entry leads to data whose write failed"),
    vdi(
        "vdi_failed_blocks_are_leaked",
        "a disk is full although a block could only not be written",
    ),
    vdi("vdi_growth_not_stable", "an entry may be stable before length and count are"),
    vdi("vdi_count_not_written", "an entry names a block that the header does not count"),
    vdi("vdi_failed_count_is_counted", "a failed write of the count counts as a good one"),
    vdi("vdi_seal_ignored", "an entry whose block is not stable slips into a sealed unit"),
    vdi(
        "vdi_change_after_seal_lost",
        "a unit that changes while it is written is not written again",
    ),
    vdi("vdi_failed_write_forgotten", "a unit whose write failed is not written again"),
    vdi("vdi_count_not_exact", "a closed image counts more blocks than there are"),
    vdi("vdi_spare_end_kept", "what a failed cut may have taken is handed out"),
    vdi("vdi_hole_not_filled", "what was in a block before is around what is written"),
    vdi("vdi_device_is_zeros", "a new block on a device is taken for zeros"),
    qed("device_grows", "a new cluster is sought behind a device's end"),
    vdi("vdi_hole_not_fenced", "an entry may be stable before what fills its block is"),
    vdi("vdi_hole_used_twice", "two entries get one block"),
    vdi("vdi_no_wake_on_error", "a failed request wakes nobody"),
    vmdk("vmdk_no_claims", "two requests allocate one grain at once"),
    vmdk("vmdk_published_early", "an entry leads to data that is not there yet"),
    vmdk("vmdk_data_error_ignored", "an entry leads to data whose write failed"),
    vmdk("vmdk_no_wake_on_error", "a failed request wakes nobody"),
    vmdk("vmdk_cow_tail_skipped", "what lies behind a write is not copied"),
    vmdk("copy_ends_with_head", "of a grain larger than a buffer the tail is not copied"),
    vmdk("copy_error_ignored", "a failed write of what a large grain copies counts as a good one"),
    vmdk("vmdk_zero_grain_shows_parent", "a write into a zeroed grain brings the parent back"),
    vmdk("vmdk_run_ignores_type", "grains of different kinds are taken for one run"),
    vmdk("vmdk_woken_trusts_old_lookup", "a woken request does not look up again"),
    vmdk("vmdk_cid_never_changes", "a session that writes leaves the content id"),
    vmdk("vmdk_cid_wakes_nobody", "who waits for the content id waits for ever"),
    vmdk("vmdk_cid_error_ignored", "a failed write of the content id counts as a good one"),
    vmdk("vmdk_published_before_cid", "an entry may be on disk before the new content id"),
    vmdk(
        "vmdk_in_place_before_cid",
        "data is changed in place while the content id is the old one",
    ),
    vmdk("vmdk_stream_end_stays", "what is written into a stream overwrites an end that counts"),
    vmdk("vmdk_stream_end_not_flushed", "a stream is written to before it has stably no end"),
    vmdk("vmdk_stream_footer_too_early", "a stream has a footer before the rest is stable"),
    vmdk("vmdk_stream_two_in_one_place", "two grains of a stream lie in one place"),
    vmdk("vmdk_stream_error_ignored", "an entry leads to a deflated grain whose write failed"),
    vmdk("vmdk_stream_gap_stays", "what could not be appended leaves a gap in a stream"),
    vmdk("flush_writes_no_tables", "a guest's flush leaves changed tables in memory"),
    vmdk("flush_rides_on_a_running_writeback", "a flush takes an older writeback for its own"),
    vmdk("writeback_without_fence", "a writeback flushes nothing before it writes tables"),
    vmdk("vmdk_length_not_fenced", "an entry may be stable before the file is that long"),
    vmdk("vmdk_parent_not_fenced", "an entry may be stable before the data that it needs"),
    vmdk("sealed_after_fence", "a writeback writes what was published after its fence"),
    vmdk("redundant_tables_not_written", "the redundant tables are never written"),
    vmdk("redundant_tables_before_flush", "a redundant table may know more than the primary"),
    vmdk("failed_writeback_counts_as_written", "a failed write of tables counts as a good one"),
    vmdk("vmdk_copies_not_compared", "tables that differ from their copies are noticed by nobody"),
    vmdk("writeback_wakes_nobody", "who waits for a writeback waits for ever"),
    qcow2("qcow2_no_claims", "two requests allocate one cluster at once"),
    qcow2("qcow2_claim_short", "a claim does not cover its last cluster"),
    qcow2("qcow2_claim_never_wakes", "who waits for a claim waits for ever"),
    qcow2("qcow2_claim_kept_on_error", "a failed request keeps its claim"),
    qcow2("qcow2_zero_ignores_claims", "a cluster is cleared while it is being allocated"),
    qcow2("qcow2_published_early", "an entry leads to data that is not there yet"),
    qcow2("qcow2_data_error_ignored", "an entry leads to data whose write failed"),
    qcow2("qcow2_no_fence_for_data", "an entry may be stable before the data that it needs"),
    qcow2("qcow2_no_fence_in_writeback", "a writeback forgets the fence that its slices owe"),
    qcow2("qcow2_copied_after_fence", "a writeback writes what was published after its fence"),
    qcow2("qcow2_writeback_not_flushed", "a writeback ends before what it wrote is stable"),
    qcow2("qcow2_flush_writes_no_tables", "a guest's flush leaves changed tables in memory"),
    qcow2(
        "qcow2_flush_joins_writeback_under_way",
        "a flush goes with a writeback that began before it came",
    ),
    qcow2("qcow2_length_not_fenced", "a table may lead behind the end that a crash leaves"),
    qcow2("qcow2_table_error_ignored", "a failed write of tables counts as a good one"),
    qcow2(
        "qcow2_reserve_before_stable",
        "a table may lead to clusters whose refcounts are not stable",
    ),
    qcow2("qcow2_failed_count_forgotten", "a refcount that could not be written counts as written"),
    qcow2(
        "qcow2_reused_while_in_use",
        "a freed cluster is reused while an older request is using it",
    ),
    qcow2("qcow2_no_table_freeze", "two requests provide one table at once"),
    qcow2("qcow2_slice_used_while_loading", "a slice is used before it is there"),
    qcow2("qcow2_run_ignores_type", "clusters of different kinds are taken for one run"),
    qcow2("qcow2_cow_tail_skipped", "what lies behind a write is not copied"),
    qcow2("qcow2_cow_from_wrong_cluster", "copy-on-write copies another cluster"),
    qcow2("qcow2_table_not_filled", "a table is made of a used cluster, as it is"),
    qcow2(
        "qcow2_table_owes_nothing",
        "a table may be linked on disk before what fills it is stable",
    ),
    qcow2("qcow2_shared_table_changed", "a table that a snapshot shares is changed in place"),
    qcow2(
        "qcow2_live_table_handed_out",
        "a table that a snapshot uses still is free when it is copied",
    ),
    qcow2("qcow2_size_before_zeros", "a larger size may be stable before what it shows is"),
    qcow2("qcow2_gained_not_zeroed", "a larger disk shows what was behind its end"),
    qcow2("qcow2_root_linked_unstable", "a longer L1 table is named before it is stable"),
    qcow2("qcow2_root_linked_while_moving", "a table is linked in an L1 table that was copied"),
    qcow2("qcow2_header_not_doubted", "a failed write of the header counts as not done"),
    qcow2("qcow2_block_linked_unstable", "a refcount block is linked before it is stable"),
    qcow2("qcow2_device_is_zeros", "a device's unused space is taken for zeros"),
    qcow2("qcow2_device_is_cut", "a device is cut off where the image ends"),
    qcow2("qcow2_asks_again_after_a_failed_writeback", "who waits for room asks again for ever"),
    qcow2("qcow2_grows_beside_holes", "the file grows although it has holes"),
    qcow2("qcow2_given_up_forgotten_when_full", "there is no space while some is on its way back"),
    qcow2("qcow2_no_space_wakes_nobody", "who waits for clusters waits for ever if there are none"),
    qcow2("qcow2_failed_cut_is_done", "a spare end that is there still is taken for zeros"),
    qcow2("qcow2_waits_with_counts_left", "refcounts and tables wait for each other"),
    qcow2(
        "qcow2_late_block_is_cut",
        "a refcount block that is added while an image is left clean is cut off",
    ),
    qcow2(
        "qcow2_failed_link_is_cut",
        "a refcount block that a failed write may have named is cut off",
    ),
    qcow2("qcow2_failed_growth_is_done", "a file that could not grow is taken for longer"),
    qcow2("qcow2_fresh_before_used", "the file's end is used before holes that are in reserve"),
    qcow2("qcow2_search_for_holes_stops_early", "holes behind the first that are found stay holes"),
    qcow2("qcow2_counted_down_is_no_hole", "what was given up is not found again"),
    qcow2("qcow2_never_grows_after_a_failure", "a file that could not grow once never grows again"),
    qcow2("failed_attempt_told_for_ever", "who waits is told of a failure before his time"),
    qcow2("qcow2_packed_not_counted", "two compressed clusters in one are counted once"),
    qcow2("qcow2_packed_after_tables", "entries lead to compressed clusters that are not on disk"),
    qcow2(
        "qcow2_packed_not_awaited",
        "a writeback does not wait for compressed bytes on their way",
    ),
    qcow2("qcow2_packed_error_forgotten", "compressed bytes whose write failed are forgotten"),
    qcow2("qcow2_packed_beside_given_up", "more is packed where counts fall to nothing"),
    qcow2("qcow2_packed_not_read", "a read looks on disk for bytes that are still in memory"),
    qcow2("qcow2_compressed_over_data_leaks", "what a compressed cluster replaces is never free"),
    lie("device-zero-does-nothing", "the device's zeroing zeroes nothing", Lie::ZeroDoesNothing),
    lie("device-flush-does-nothing", "the device's flushes do nothing", Lie::FlushDoesNothing),
    lie("device-fua-does-nothing", "the device's stable writes are not", Lie::FuaDoesNothing),
    lie("device-a-sector-at-a-time", "a long write takes for ever", Lie::SectorAtATime),
    lie(
        "device-short-is-whole",
        "the device's short writes say they were whole",
        Lie::ShortIsWhole,
    ),
];

/// Changes in the code that are found elsewhere, or not at all, and why.
pub const EQUIVALENT: &[(&str, &str)] = &[
    (
        "probed_raw_unguarded",
        "a matter of what a guest may write, not of crashes or order: a test of the raw driver finds it",
    ),
    (
        "file_end_cuts_unclaimed",
        "whatever changes a file's length has the file to itself; the flush behind it is owed to page caches, \
         which the device has none of",
    ),
    (
        "qcow2_stocked_before_discarded",
        "most discards are noted, and at the gate no write passes one that came before it, but after 16 \
         such ops in a row",
    ),
];

/// Defects planted in changes of images that nobody runs. No workload makes such a change: a test of
/// the formats crashes each, and finds these.
pub const AT_REST: &[(&str, &str)] = &[
    ("qcow2_change_not_fenced", "the header names tables that are not stable"),
    ("qcow2_flags_in_place", "COPIED flags are written into tables that the image still uses"),
    ("qcow2_flags_stay", "COPIED flags stay although refcounts change"),
];

/// Defects that only show where there is always more to do: a test of turns finds them.
pub const AT_LENGTH: &[(&str, &str)] = &[
    ("newest_first", "what came last goes out first, and the oldest may wait for ever"),
    ("end_of_turn_not_said", "what a turn left waits until something else happens"),
];

/// Traces that are kept because they once showed a defect, and the mutant which is that defect. One that finds it no
/// longer is worth nothing.
const KEPT: &[(&str, &str)] = &[
    (
        "spare_end_kept_after_failed_cut",
        include_str!("../regressions/space_cut_off_by_a_failed_truncate_is_not_handed_out.trace"),
    ),
    (
        "qcow2_header_not_doubted",
        include_str!("../regressions/a_failed_shrink_may_be_on_disk.trace"),
    ),
    (
        "drained_and_paused_is_used",
        include_str!("../regressions/a_paused_disk_is_left_as_a_drain_left_it.trace"),
    ),
    ("write_end_wakes_nobody", include_str!("../regressions/who_waits_for_a_write_is_woken.trace")),
];

/// Those of which the trace finds nothing.
fn blunt(wanted: &[Mutant]) -> Vec<&'static str> {
    let is_blunt = |name: &'static str, text: &str| match text.parse::<Trace>() {
        Ok(trace) => Trace { plant: Some(name), ..trace }.replay().is_ok(),
        Err(_) => true,
    };
    let kept = KEPT.iter().filter(|(name, _)| wanted.iter().any(|mutant| mutant.name == *name));
    kept.filter(|(name, text)| is_blunt(name, text)).map(|(name, _)| *name).collect()
}

/// What became of one mutant.
#[derive(Clone, Debug)]
pub struct Fate {
    /// Which.
    pub mutant: Mutant,
    /// The stage of the hunt that found it, and what it saw.
    pub killed: Option<(&'static str, Trace)>,
    /// How long that took, in seconds.
    pub seconds: f64,
}

/// What became of all of them.
#[derive(Clone, Debug, Default)]
pub struct Score {
    /// One by one.
    pub fates: Vec<Fate>,
    /// Those that the trace kept of them does not find any more.
    pub blunt: Vec<&'static str>,
}

impl Score {
    /// Was every one found, and by the trace that is kept of it, too?
    pub fn is_good(&self) -> bool {
        self.fates.iter().all(|fate| fate.killed.is_some()) && self.blunt.is_empty()
    }

    /// Half of them were found within so many seconds.
    pub fn median(&self) -> f64 {
        let mut seconds: Vec<f64> = self.fates.iter().map(|fate| fate.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied().unwrap_or(0.0)
    }
}

impl Score {
    /// As one JSON object.
    pub fn to_json(&self) -> String {
        let one = |fate: &Fate| {
            let (name, killed) = (fate.mutant.name, fate.killed.is_some());
            format!("{{\"name\":\"{name}\",\"killed\":{killed},\"seconds\":{:.4}}}", fate.seconds)
        };
        let fates: Vec<String> = self.fates.iter().map(one).collect();
        format!("{{\"good\":{},\"mutants\":[{}]}}", self.is_good(), fates.join(","))
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Fate { mutant, killed, seconds } in &self.fates {
            let (stage, requests) = match killed {
                Some((stage, trace)) => {
                    let count = trace.workload.requests.len();
                    let verdict = trace.verdict.as_deref().and_then(|text| text.lines().next());
                    let choices = trace.choices.len();
                    let verdict = verdict.unwrap_or_default();
                    (*stage, format!("{count} requests, {choices} choices: {verdict}"))
                }
                None => ("SURVIVED", String::new()),
            };
            let name = mutant.name;
            writeln!(f, "{name:32} {:9.1} ms  {stage:16} {requests}", seconds * 1e3)?;
        }
        for name in &self.blunt {
            writeln!(f, "{name:32} the trace that is kept of it finds it no longer")?;
        }
        let killed = self.fates.iter().filter(|fate| fate.killed.is_some()).count();
        let all = self.fates.len();
        write!(f, "{killed} of {all} killed, half of them within {:.1} ms", self.median() * 1e3)
    }
}

/// Hunts the mutants whose names contain `only`, on `threads` threads, each for at most `seconds`.
///
/// # Errors
///
/// When this is a release, or cannot survive a panic.
pub fn hunt_all(only: &str, threads: usize, seconds: f64) -> Result<Score, String> {
    if !ARE_PLANTED {
        return Err("this is a release: no defects are planted".into());
    }
    if !cfg!(panic = "unwind") {
        return Err("built to abort on a panic, which is how most mutants are found".into());
    }
    let wanted: Vec<Mutant> =
        MUTANTS.iter().filter(|mutant| mutant.name.contains(only)).copied().collect();
    let next = AtomicUsize::new(0);
    let fates = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(mutant) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let fate = hunt(*mutant, seconds);
                    fates.lock().expect("nobody panics while holding it").push(fate);
                }
            });
        }
    });
    let mut fates = fates.into_inner().expect("nobody panics while holding it");
    fates.sort_by_key(|fate| wanted.iter().position(|mutant| *mutant == fate.mutant));
    Ok(Score { fates, blunt: blunt(&wanted) })
}

fn hunt(mutant: Mutant, limit: f64) -> Fate {
    let watch = Stopwatch::start();
    // Images are made by sound code.
    let mut killed = None;
    for (stage, make) in STAGES {
        let mut scopes = make(mutant.format);
        scopes.iter_mut().for_each(|scope| scope.image.lie = mutant.lie);
        killed = hunt_in(&mutant, &scopes, &watch, limit).map(|trace| (*stage, trace));
        if killed.is_some() || watch.seconds() > limit {
            break;
        }
    }
    let mut seed = 0;
    while killed.is_none() && mutant.lie.is_none() && watch.seconds() < limit {
        let outcome = planted(mutant.plant(), || run_once(seed, Some(mutant.format)));
        killed = outcome.err().map(|trace| ("random", mutant.shown_by(*trace)));
        seed += 1;
    }
    Fate { mutant, killed, seconds: watch.seconds() }
}

/// Does something with a defect planted, in this thread. In a release there is none.
pub(crate) fn planted<T>(name: Option<&'static str>, act: impl FnOnce() -> T) -> T {
    let Some(name) = name else { return act() };
    activate(Some(name));
    let done = act();
    activate(None);
    done
}

/// Makes the scopes of a stage for a format.
type MakeScopes = fn(Format) -> Vec<Scope>;

/// Where a mutant is looked for, quickest first; after these, random runs.
const STAGES: &[(&str, MakeScopes)] = &[
    ("special", special),
    ("one request", |format| scopes(format, 1, 1)),
    ("two requests", |format| scopes(format, 2, 0)),
    ("two, one fault", |format| scopes_with(format, 2, Budget { faults: 1, ..QUIET })),
];

/// A few workloads that are known to be telling.
pub fn special(format: Format) -> Vec<Scope> {
    let cold = Image { ahead: 2, ..Image::new(format) };
    let warm = Image { state: State::Warm, ..cold };
    let lost = Budget { lost_writes: 1, ..QUIET };
    let telling = |image: &Image| {
        let (new, old) = (image.place(0, 2), image.place(0, 0));
        let requests = [Request::write(new, 1024), Request::zero(old, image.cluster)];
        requests.map(|request| Workload::new([request])).to_vec()
    };
    [subjects::of(format).special(), scopes_on([cold, warm], lost, telling)].concat()
}

fn hunt_in(mutant: &Mutant, scopes: &[Scope], watch: &Stopwatch, limit: f64) -> Option<Trace> {
    for scope in scopes {
        let base = Base::new(scope.image, scope.most_requests()).expect("images can be made");
        for workload in &scope.workloads {
            if watch.seconds() > limit {
                return None;
            }
            let world = base.world(workload, scope.budget);
            // A device that only delays shows in nothing else.
            let how_far = match mutant.lie {
                Some(_) => Limit { calm_in: 1, ..Limit::default() },
                None => Limit::default(),
            };
            let outcome = planted(mutant.plant(), || exhaust(&world, how_far));
            if let Err(failure) = outcome {
                let trace = Trace::of(scope.image, scope.budget, workload, &failure);
                return Some(mutant.shown_by(trace));
            }
        }
    }
    None
}
