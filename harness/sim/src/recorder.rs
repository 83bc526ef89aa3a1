//! A run of the simulator, noted as a timeline: what was chosen, in plain words.

use cowbell_engine::trace::Kind as OpWord;
use cowbell_engine::units::Time;

use crate::backend::{Bit, Breakage, OpName, Outcome};
use crate::choose::Choice;
use crate::disk::Contents;
use crate::explore::{Watcher, quietly};
use crate::subject::{SimEngine, Subject};
use crate::timeline::{Ended, EventKind, Observer, Timeline};
use crate::world::{STUCK, World};

/// See the module.
#[derive(Debug)]
pub(crate) struct Recorder {
    title: String,
    about: Vec<String>,
    observer: Observer,
    now: Time,
    is_looked_at: bool,
    is_crashing: bool,
}

impl Recorder {
    /// Of a run that begins with `world`.
    pub fn new<S: Subject>(title: String, about: Vec<String>, world: &World<S>) -> Recorder {
        let mut observer = Observer::new(title.clone(), about.clone());
        observer.begin(world.engine(), world.now());
        let now = world.now();
        Recorder { title, about, observer, now, is_looked_at: true, is_crashing: false }
    }

    pub fn finish(self) -> Timeline {
        self.observer.finish()
    }
}

impl<S: Subject> Watcher<S> for Recorder {
    fn before(&mut self, world: &World<S>, choice: Choice) {
        let choice = match choice {
            Choice::End(name, outcome) => {
                Choice::End(name, world.engine().backend().becomes(name, outcome))
            }
            other => other,
        };
        let (what, kind) = words(world, choice);
        let ended = match choice {
            Choice::End(OpName { request, ordinal }, outcome) => Some(Ended {
                number: request,
                ordinal,
                how: outcome.name().into(),
                is_bad: outcome.is_fault(),
            }),
            _ => None,
        };
        self.now = match choice {
            Choice::Tick => world.engine().next_deadline().unwrap_or_default().max(world.now()),
            _ => world.now(),
        };
        self.observer.happens(what, kind, ended);
        self.is_looked_at = false;
    }

    fn after(&mut self, engine: &SimEngine<S::Driver>) {
        self.observer.look(engine, self.now);
        self.is_looked_at = true;
    }

    fn crashed(&mut self, images: Option<u64>) {
        self.is_crashing = images.is_none();
        self.observer.crashes_looked_at(images.unwrap_or(0));
    }

    fn left(&mut self, world: &World<S>, files: &[Contents]) {
        // Who has panicked in looking at them would do so again.
        let wrong = quietly(|| Ok(world.wrong_byte(files))).ok().flatten();
        // Of wrong bytes a check knows nothing.
        let complaints = match wrong {
            Some(_) => Vec::new(),
            None => quietly(|| Ok(world.complaints(files))).unwrap_or_default(),
        };
        self.observer.crash_left(&world.left_by_crash(files), wrong, &complaints);
    }

    fn begins_again(&mut self, world: &World<S>) -> bool {
        *self = Recorder::new(self.title.clone(), self.about.clone(), world);
        true
    }

    fn calms(&mut self, world: &World<S>) {
        let what = "from here on nothing more goes wrong: the device does what it is asked, the oldest op ends first";
        self.observer.happens(what.into(), EventKind::Other, None);
        self.observer.look(world.engine(), self.now);
        self.observer.is_calm();
    }

    fn failed(&mut self, world: &World<S>, verdict: &str) {
        if !self.is_looked_at {
            // Who has panicked may have left anything behind: what can be seen is seen.
            let _ = quietly(|| {
                self.observer.look(world.engine(), self.now);
                Ok(())
            });
        }
        self.observer.went_wrong(verdict, self.is_crashing);
        if verdict.starts_with(STUCK) {
            self.observer.who_waits();
        }
    }
}

fn words<S: Subject>(world: &World<S>, choice: Choice) -> (String, EventKind) {
    let life = |what: &str| (what.to_string(), EventKind::Life);
    match choice {
        Choice::Submit(which) => {
            let request = world.workload().requests[which as usize];
            (format!("the guest submits request {which}: {request}"), EventKind::Submit)
        }
        Choice::Beside => {
            ("the guest of the disk beside submits its next request".into(), EventKind::Submit)
        }
        Choice::End(name, outcome) => {
            let kind = match outcome.is_fault() {
                true => EventKind::Fault,
                false => EventKind::Complete,
            };
            (format!("op #{name} ({}) {}", op(world, name), how(outcome)), kind)
        }
        Choice::Turn => ("the loop goes on with what the last turn left".into(), EventKind::Other),
        Choice::Tick => ("time passes, until the next deadline".into(), EventKind::Deadline),
        Choice::Stall => ("the device takes no more ops".into(), EventKind::Fault),
        Choice::Resume => ("the device takes ops again".into(), EventKind::Other),
        Choice::Break(breakage) => {
            let what = match breakage {
                Breakage::Reads => "read",
                Breakage::Writes => "write",
                Breakage::Flushes => "flush",
                Breakage::Lengths => "change the length of a file",
            };
            (format!("the device breaks: each op that would {what} fails"), EventKind::Fault)
        }
        Choice::Mend => ("the device is mended".into(), EventKind::Other),
        Choice::Flip(Bit { file, byte, bit }) => {
            (format!("bit {bit} of byte {byte:#x} of file {file} changes"), EventKind::Fault)
        }
        Choice::Crash(pick) => {
            let left = match pick {
                0 => "what was stable, and nothing else",
                1 => "all that was written",
                _ => "what was stable, and a part of the rest",
            };
            (format!("the machine stops and starts again; on disk is {left}"), EventKind::Crash)
        }
        Choice::Drain => life("the engine is told to end all work and to leave the image clean"),
        Choice::Close => life("the disk is closed, whatever is in flight"),
        Choice::Pause => life("the disk is paused"),
        Choice::Unpause => life("the disk is resumed"),
        Choice::Abandon => life("the guest gives up all that it has in flight"),
        Choice::Copy => life("a copy between the disk and the one beside it is started"),
        Choice::PauseCopy => life("the copy is paused"),
        Choice::ResumeCopy => life("the copy is resumed"),
        Choice::CancelCopy => life("the copy is cancelled"),
        Choice::SeeCopy => life("what the copy has read next is seen"),
    }
}

fn op<S: Subject>(world: &World<S>, name: OpName) -> String {
    let ops = world.engine().ops();
    let is_it = |number, ordinal| (number, ordinal) == (name.request, name.ordinal);
    let mut found =
        ops.iter().filter(|(_, it)| is_it(ops.serial(it.owner.request), it.owner.ordinal));
    let Some((_, it)) = found.next() else { return "not in flight".into() };
    let word = OpWord::of(it.op.kind);
    match word {
        OpWord::Compute => word.name().into(),
        OpWord::Flush => format!("{} of {:?}", word.name(), it.file()),
        OpWord::Truncate => format!("set the length of {:?} to {:#x}", it.file(), it.op.offset),
        _ => format!("{} {:#x}+{:#x} of {:?}", word.name(), it.offset(), it.remaining(), it.file()),
    }
}

fn how(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "is done",
        Outcome::Early => {
            "is done, and has read what was there before a write that completed meanwhile"
        }
        Outcome::Short => "comes back with about half of it done",
        Outcome::Fail => "fails with EIO, and has done nothing",
        Outcome::FailPart => "fails with EIO, and has done about half of it",
        Outcome::FailAll => "fails with EIO, although it has done all of it",
        Outcome::NoSpace => "fails with ENOSPC",
        Outcome::Unsupported => "is refused: the device cannot do it",
        Outcome::Lost => "is done, it says, and nothing is written",
        Outcome::Astray => "is done, it says, and is written a sector too far",
        Outcome::FarAstray => "is done, it says, and is written eight sectors too far",
    }
}
