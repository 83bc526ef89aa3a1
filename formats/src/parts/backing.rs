//! The layer below an overlay.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs, Target};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::Cx;
use cowbell_engine::units::{BufId, NodeId};

/// The layer below.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Backing {
    /// The node that reads it.
    pub node: NodeId,
    /// Its virtual size in bytes; zeros behind it.
    pub size: u64,
}

/// For [`Driver::below`](cowbell_engine::step::Driver::below).
pub(crate) fn below(backing: Option<&Backing>) -> &[NodeId] {
    backing.map_or(&[], |backing| std::slice::from_ref(&backing.node))
}

impl Backing {
    /// Reads `from..to` into the start of `buf`, zeros behind the end. False: all of it lies there,
    /// there is nothing to wait for.
    pub(crate) fn read(self, from: u64, to: u64, buf: BufId, cx: &mut Cx<'_>) -> bool {
        let there = to.min(self.size).max(from);
        cx.mem().pool_mut(buf)[(there - from) as usize..(to - from) as usize].fill(0);
        let seg = Seg { base: Base::Pool(buf), off: 0, len: (there - from) as u32 };
        let from = if mutant!("cow_from_wrong_cluster") { from & 511 } else { from };
        if seg.len > 0 {
            cx.issue(Op::read(Target::Node(self.node), from, Segs::one(seg)));
        }
        seg.len > 0
    }
}

/// Answers for `at..end`, where the request's own layer says nothing: the layer below knows, if there
/// is one. False: there is nothing to wait for.
pub(crate) fn status(backing: Option<Backing>, at: u64, end: u64, cx: &mut Cx<'_>) -> bool {
    let there = backing.map_or(at, |backing| end.min(backing.size.max(at)));
    match backing {
        Some(backing) if there > at && !mutant!("status_stays_in_layer") => {
            cx.ask_status_of(backing.node, there - at);
            true
        }
        _ => {
            cx.answer_status(StatusKind::Unallocated, end - at, None);
            false
        }
    }
}

/// Reads the disk's `at..end` from below into the request's memory; what there is nothing for reads
/// as zeros. False: that is all of it.
pub(crate) fn read(backing: Option<Backing>, at: u64, end: u64, cx: &mut Cx<'_>) -> bool {
    let from = at - cx.io().offset;
    let there = backing.map_or(at, |backing| end.min(backing.size.max(at)));
    if there < end && !mutant!("short_backing_not_zeroed") {
        cx.zero_guest(from + (there - at), end - there);
    }
    let Some(backing) = backing.filter(|_| there > at) else { return false };
    let segs = Segs::one(cx.guest(from, there - at));
    cx.issue(Op::read(Target::Node(backing.node), at, segs));
    true
}
