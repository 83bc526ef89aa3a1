//! How a piece of a request gets on: what each file that does a part of a request answers.

use cowbell_engine::units::Errno;

use crate::qcow2::run::lookup::Run;
use crate::qcow2::run::reserve::Short;

/// A piece of a request, `at..end` of the guest's disk, which one slice of an L2 table maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub at: u64,
    pub end: u64,
    /// What it begins with.
    pub run: Run,
    /// Has the request ops under way? Then it is not parked, but waits for those first.
    pub after_ops: bool,
}

/// How far the piece has got that begins at the guest's byte `at`. `S` is what its file waits in.
#[derive(Debug)]
pub(super) enum Progress<S> {
    /// Done, up to here.
    To(u64),
    /// On its way, up to here.
    Issued(u64),
    /// It waits for something, in this state.
    Wait(S),
    /// It is parked, and looked up again when it is woken.
    LookAgain {
        at: u64,
    },
    /// The same, for clusters that the reserve's attempt of this number is to bring.
    Space {
        at: u64,
        attempt: u32,
    },
    /// The same, for room in memory that the writeback of this number is to make.
    Room {
        at: u64,
        attempt: u32,
    },
    /// It is looked up again when what the request has under way has ended.
    AfterOps {
        at: u64,
    },
    /// It needs an L2 table of its own.
    ProvideTable {
        at: u64,
    },
    /// A table says something impossible about it.
    Invalid {
        at: u64,
    },
    /// An entry leads to this place, where metadata is.
    HitsMetadata {
        host: u64,
    },
    Failed(Errno),
}

impl<S> Progress<S> {
    /// Done up to `to`; is it on its way?
    pub fn done(to: u64, is_issued: bool) -> Progress<S> {
        if is_issued { Progress::Issued(to) } else { Progress::To(to) }
    }

    /// The clusters that it needs were not to be had.
    pub fn short(at: u64, short: Short) -> Progress<S> {
        match short {
            Short::Failed(errno) => Progress::Failed(errno),
            Short::Later(attempt) => Progress::Space { at, attempt },
        }
    }
}
