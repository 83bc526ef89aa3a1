//! Copy-on-write: what a write puts into the clusters or grains that it allocates, and what they must
//! hold around that.
//!
//! The *edges* are the guest ranges in front of and behind what is written, up to the ends of what is
//! allocated. If each fits a buffer, both are read and go out with the data as one write. If one does
//! not, they are copied a *stretch* at a time through one buffer, head first, and the data follows.
//!
//! ```text
//! Bufs ─> [Read] ─────────────────────> WriteData, with the edges ─> written
//!   └──> CopyRead ─> CopyWrite ─> … ──> WriteData ─> written
//! ```

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event, IoKind};
use cowbell_engine::units::{BufId, Errno, FileId};

/// Head and tail; one whose ends are the same is empty.
pub(crate) type Edges = [(u64, u64); 2];

/// What the edges come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Fill {
    /// They are there.
    Nothing,
    /// Zeros are written.
    Zeros,
    /// They are read.
    Read,
}

/// Copy-on-write of one claim.
#[derive(Clone, Hash, Debug)]
pub(crate) struct Cow {
    edges: Edges,
    fill: Fill,
    /// Behind this guest byte there is nothing to copy: zeros lie there already.
    limit: u64,
    bufs: [Option<BufId>; 2],
}

/// What it awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CowState {
    /// Buffers.
    Bufs,
    /// The edges, read.
    Read,
    /// A stretch, read.
    CopyRead {
        /// Where it begins, or the head's end if it is in the tail.
        from: u64,
    },
    /// A stretch, written.
    CopyWrite {
        /// Where the next begins.
        from: u64,
    },
    /// Head, guest data and tail, written as one.
    WriteData,
}

impl CowState {
    /// Of these, where its name is in the list of the driver's states: waits for buffers, reads, copies,
    /// writes data.
    pub(crate) fn label(&self, [bufs, read, copy, write]: [usize; 4]) -> usize {
        match self {
            CowState::Bufs => bufs,
            CowState::Read => read,
            CowState::CopyRead { .. } | CowState::CopyWrite { .. } => copy,
            CowState::WriteData => write,
        }
    }
}

/// How far it is.
#[derive(Debug)]
pub(crate) enum Copied {
    /// It waits.
    Wait(CowState),
    /// All is where it is to be.
    Written,
    /// It could not be done.
    Failed(Errno),
}

/// Where guest bytes are to be: those of the write, `start..end`, at `host` of `file`; others around
/// them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub file: FileId,
    pub start: u64,
    pub end: u64,
    pub host: u64,
}

impl Place {
    fn of(self, at: u64) -> u64 {
        self.host + at - self.start
    }
}

impl Cow {
    /// Nothing is to be copied.
    pub const NONE: Cow =
        Cow { edges: [(0, 0); 2], fill: Fill::Nothing, limit: u64::MAX, bufs: [None; 2] };

    /// These edges, of which nothing is to be copied behind `limit` if they are copied in stretches.
    pub fn new(edges: Edges, fill: Fill, limit: u64) -> Cow {
        Cow { edges, fill, limit, bufs: [None; 2] }
    }

    /// With buffers that [`take_bufs`] gave for edges at least as long.
    pub fn with_bufs(self, bufs: [Option<BufId>; 2]) -> Cow {
        Cow { bufs, ..self }
    }

    /// Is something to be read?
    pub fn reads(&self) -> bool {
        self.fill == Fill::Read && self.edges.iter().any(|(from, to)| from < to)
    }

    /// Begins, or goes on. `read` reads a guest range into the start of a buffer, and says whether
    /// there is something to wait for.
    pub fn step(
        &mut self,
        state: CowState,
        event: Event,
        place: Place,
        read: impl Fn(u64, u64, BufId, &mut Cx<'_>) -> bool,
        cx: &mut Cx<'_>,
    ) -> Copied {
        match (state, event) {
            (CowState::Bufs, Event::Start | Event::Woken) => self.begin(place, read, cx),
            (CowState::CopyWrite { from }, Event::Io(Err(_))) if mutant!("copy_error_ignored") => {
                self.copy_next(from, place, read, cx)
            }
            (CowState::WriteData, Event::Io(Err(_)))
                if mutant!("data_error_ignored")
                    || mutant!("vmdk_data_error_ignored")
                    || mutant!("qcow2_data_error_ignored") =>
            {
                Copied::Written
            }
            (_, Event::Io(Err(errno))) => Copied::Failed(errno),
            (CowState::WriteData, Event::Io(Ok(()))) => Copied::Written,
            (CowState::Read, Event::Io(Ok(()))) => self.write_data(place, cx),
            (CowState::CopyRead { from }, Event::Io(Ok(()))) => self.copy_write(from, place, cx),
            (CowState::CopyWrite { from }, Event::Io(Ok(()))) => {
                self.copy_next(from, place, read, cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn begin(
        &mut self,
        place: Place,
        read: impl Fn(u64, u64, BufId, &mut Cx<'_>) -> bool,
        cx: &mut Cx<'_>,
    ) -> Copied {
        if !self.reads() {
            return self.write_data(place, cx);
        }
        if self.bufs == [None; 2] {
            let Some(bufs) = take_bufs(self.edges, cx) else {
                cx.park_for_bufs();
                return Copied::Wait(CowState::Bufs);
            };
            self.bufs = bufs;
        }
        if !fit(self.edges, cx.buf_size()) {
            return self.copy_next(self.edges[0].0, place, read, cx);
        }
        let mut waits = false;
        for ((from, to), buf) in self.edges.into_iter().zip(self.bufs) {
            if let (Some(buf), true) = (buf, from < to) {
                waits |= read(from, to, buf, cx);
            }
        }
        if waits { Copied::Wait(CowState::Read) } else { self.write_data(place, cx) }
    }

    /// The stretch at `from`, as far as there is something to copy.
    fn stretch(&self, from: u64, cx: &Cx<'_>) -> Option<(u64, u64)> {
        let [head, mut tail] = self.edges.map(|(from, to)| (from, to.min(self.limit)));
        if mutant!("copy_ends_with_head") {
            tail.1 = tail.0;
        }
        stretch([head, tail], from, cx.buf_size())
    }

    fn copy_next(
        &mut self,
        from: u64,
        place: Place,
        read: impl Fn(u64, u64, BufId, &mut Cx<'_>) -> bool,
        cx: &mut Cx<'_>,
    ) -> Copied {
        match (self.stretch(from, cx), self.bufs[0]) {
            (Some((start, to)), Some(buf)) => match read(start, to, buf, cx) {
                true => Copied::Wait(CowState::CopyRead { from }),
                false => self.copy_write(from, place, cx),
            },
            (None, _) | (_, None) => {
                self.fill = Fill::Nothing;
                self.give_bufs(cx);
                self.write_data(place, cx)
            }
        }
    }

    fn copy_write(&mut self, from: u64, place: Place, cx: &mut Cx<'_>) -> Copied {
        let (start, to) = self.stretch(from, cx).expect("it was just read");
        let buf = self.bufs[0].expect("a copy has a buffer");
        let seg = Seg { base: Base::Pool(buf), off: 0, len: (to - start) as u32 };
        cx.issue(Op::write(place.file, place.of(start), Segs::one(seg)));
        Copied::Wait(CowState::CopyWrite { from: to })
    }

    /// Writes the request's bytes and the edges around them, as one.
    #[inline]
    fn write_data(&self, place: Place, cx: &mut Cx<'_>) -> Copied {
        let Place { file, start, end, host } = place;
        let io = cx.io();
        let (from, len) = (start - io.offset, end - start);
        let is_write = matches!(io.kind, IoKind::Write { .. });
        if self.fill == Fill::Nothing && is_write {
            cx.write_guest(file, host, from, len, false);
            return Copied::Wait(CowState::WriteData);
        }
        let edge = |which: usize| {
            let len = (self.edges[which].1 - self.edges[which].0) as u32;
            match (self.fill, self.bufs[which]) {
                (Fill::Zeros, _) => Seg::zeros(len),
                (Fill::Read, Some(buf)) => Seg { base: Base::Pool(buf), off: 0, len },
                (Fill::Read, None) | (Fill::Nothing, _) => Seg::zeros(0),
            }
        };
        let (head, tail) = (edge(0), edge(1));
        let mut segs = Segs::none();
        segs.push(head);
        segs.push(if is_write { cx.guest(from, len) } else { Seg::zeros(len as u32) });
        segs.push(tail);
        cx.issue(Op::write(file, host - u64::from(head.len), segs));
        Copied::Wait(CowState::WriteData)
    }

    /// It is over.
    pub fn give_bufs(&mut self, cx: &mut Cx<'_>) {
        for buf in std::mem::take(&mut self.bufs).into_iter().flatten() {
            cx.give_buf(buf);
        }
    }
}

/// Does each fit a buffer of `buf_size` bytes?
fn fit(edges: Edges, buf_size: u64) -> bool {
    edges.iter().all(|(from, to)| to - from <= buf_size)
}

/// The buffers: one for each that is not empty, or one for all stretches. `None`: there are none
/// now, and none is held.
pub(crate) fn take_bufs(edges: Edges, cx: &mut Cx<'_>) -> Option<[Option<BufId>; 2]> {
    let [head, tail] = edges.map(|(from, to)| to > from);
    match (head, tail) {
        (false, false) => Some([None; 2]),
        _ if !fit(edges, cx.buf_size()) => cx.take_bufs().map(|[a]| [Some(a), None]),
        (true, true) => cx.take_bufs().map(|[a, b]| [Some(a), Some(b)]),
        (true, false) => cx.take_bufs().map(|[a]| [Some(a), None]),
        (false, true) => cx.take_bufs().map(|[b]| [None, Some(b)]),
    }
}

/// The stretch that begins at `from` or, if nothing of the head is left there, in the tail: at most
/// `buf_size` bytes. `None`: all is copied.
fn stretch(edges: Edges, from: u64, buf_size: u64) -> Option<(u64, u64)> {
    let [head, tail] = edges;
    let (from, to) = if from < head.1 { (from, head.1) } else { (from.max(tail.0), tail.1) };
    (from < to).then(|| (from, to.min(from + buf_size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_the_edges_once_and_nothing_else() {
        for edges in [[(0, 10), (14, 32)], [(4, 4), (5, 32)], [(0, 9), (32, 32)], [(7, 7), (8, 8)]]
        {
            for size in 1..12 {
                assert_eq!(fit(edges, size), edges.iter().all(|(a, b)| b - a <= size));
                let (mut copied, mut from) = (Vec::new(), edges[0].0);
                while let Some((start, end)) = stretch(edges, from, size) {
                    assert!(start < end && end - start <= size);
                    copied.extend(start..end);
                    from = end;
                }
                let [head, tail] = edges;
                assert!(copied.into_iter().eq((head.0..head.1).chain(tail.0..tail.1)), "{edges:?}");
            }
        }
    }
}
