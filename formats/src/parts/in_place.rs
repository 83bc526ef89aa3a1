//! What a request does where no table has to change for it.

use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, IoKind};
use cowbell_engine::units::{FileId, HostOffset};

use crate::parts::backing::{self, Backing};
use crate::parts::pieces::Progress;

/// What is in a stretch of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    /// Data, from this byte of this file on.
    Data(FileId, u64),
    /// Zeros, as a table says.
    Zeros,
    /// What is in the layer below. Could it show anything there?
    Below { shows: bool },
}

/// Does what the request wants with `at..end` of the disk, where `content` is. `whole` answers which
/// whole clusters, grains or blocks are in that. `None`: at `at` something must be allocated, or be
/// said in a table.
#[inline]
pub(crate) fn in_place<S>(
    (at, end): (u64, u64),
    content: Content,
    backing: Option<Backing>,
    whole: impl Fn(u64, u64) -> Option<(u64, u64)>,
    cx: &mut Cx<'_>,
) -> Option<Progress<S>> {
    let io = cx.io();
    let (from, len) = (at - io.offset, end - at);
    match (io.kind, content) {
        (IoKind::Read, Content::Data(file, host)) => cx.read_guest(file, host, from, len),
        (IoKind::Write { .. }, Content::Data(file, host)) => {
            cx.write_guest(file, host, from, len, false);
        }
        (IoKind::Zero { unmap, .. }, Content::Data(file, host)) => {
            cx.issue(Op::bare(OpKind::Zero { unmap }, file, host, len));
        }
        (IoKind::Read, Content::Zeros) => {
            cx.zero_guest(from, len);
            return Some(Progress::To(end));
        }
        (IoKind::Read, Content::Below { .. }) => {
            return Some(Progress::done(end, backing::read(backing, at, end, cx)));
        }
        (IoKind::Status { .. }, content) => {
            let (kind, host) = match content {
                Content::Data(file, host) => (StatusKind::Data, Some((file, HostOffset(host)))),
                Content::Zeros => (StatusKind::Zero, None),
                Content::Below { .. } => {
                    return Some(Progress::done(io.end(), backing::status(backing, at, end, cx)));
                }
            };
            cx.answer_status(kind, len, host);
            return Some(Progress::To(io.end()));
        }
        (IoKind::Write { .. }, _) => return None,
        // Zeros, or as good as zeros.
        (_, Content::Zeros | Content::Below { shows: false }) => return Some(Progress::To(end)),
        (IoKind::Zero { .. }, Content::Below { .. }) => return None,
        (IoKind::Discard | IoKind::Flush | IoKind::Truncate, _) => {
            match (whole(at, end), content) {
                (None, _) => return Some(Progress::To(end)),
                (Some((first, last)), Content::Data(file, host)) => {
                    cx.issue(Op::bare(OpKind::Discard, file, host + (first - at), last - first));
                }
                // What is cut in front keeps its contents.
                (Some((first, _)), _) if first > at => return Some(Progress::To(first)),
                (Some(_), _) => return None,
            }
        }
    }
    Some(Progress::Issued(end))
}
