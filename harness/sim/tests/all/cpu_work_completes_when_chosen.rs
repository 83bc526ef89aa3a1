//! A computation in the simulator: done when it completes, may fail, and finds who uses its input.

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Base, Compute, Op, Seg};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, Step};
use cowbell_engine::units::{BufId, Errno, NodeId, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_sim::backend::{Device, Mode, OpName, Outcome, SimBackend};

const COPY: Compute = Compute {
    name: "copy",
    run: |input, output| {
        output.copy_from_slice(input);
        Ok(())
    },
};

/// A write's first bytes are copied by an op; a write of zeros changes the copy's source.
struct Copies;

const FROM: Seg = Seg { base: Base::Pool(BufId(0)), off: 0, len: 8 };
const TO: Seg = Seg { base: Base::Pool(BufId(1)), off: 0, len: 8 };

impl Driver for Copies {
    type State = ();
    const STATES: &'static [&'static str] = &["copy"];
    fn label((): &()) -> usize {
        0
    }
    fn size(&self) -> u64 {
        512
    }
    fn uses(&self, _: cowbell_engine::units::FileId) -> bool {
        false
    }
    fn deadline(&self) -> Option<Time> {
        None
    }
    fn chore(&mut self, _: Chore) -> Option<()> {
        None
    }
    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<()> {
        let mut bytes = [0; 8];
        cx.copy_guest(0, &mut bytes);
        cx.mem().pool_mut(BufId(0))[..8].copy_from_slice(&bytes);
        if bytes == [0; 8] {
            return Step::Done(Ok(()));
        }
        cx.issue(Op::compute(COPY, FROM, TO));
        Step::Wait(())
    }
    fn step(&mut self, (): (), event: Event, _: &mut Cx<'_>) -> Step<()> {
        let Event::Io(result) = event else { panic!("{event:?}") };
        Step::Done(result)
    }
}

/// An engine, and its node.
type Rig = (Engine<Copies, SimBackend>, NodeId);

fn rig() -> Rig {
    let mut engine =
        Engine::new(SimBackend::new(Device::default(), Mode::Chosen), Limits::default());
    let node = engine.add(Copies);
    (engine, node)
}

fn submit((engine, node): &mut Rig, byte: u8) {
    let mem: Mem = Buf::copied(&[byte; 512]).into();
    engine.submit(*node, Io::write(0, 512), mem, 0).expect("room");
    engine.run(Time(0));
}

fn end((engine, _): &mut Rig, outcome: Outcome) -> Result<(), Errno> {
    let name: OpName = engine.backend().in_flight().next().expect("it is in flight");
    assert_eq!(engine.backend().describe(name), "Compute(copy)");
    let mut outcomes = Vec::new();
    engine.backend().outcomes(name, true, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done, Outcome::Fail]);
    engine.backend_mut().choose(name, outcome);
    engine.run(Time(0));
    engine.poll().expect("it has ended").result
}

#[test]
fn it_is_done_when_it_completes_and_not_before() {
    let mut rig = rig();
    submit(&mut rig, 7);
    assert_eq!(rig.0.memory().pool(BufId(1))[..8], [0; 8]);
    assert_eq!(end(&mut rig, Outcome::Done), Ok(()));
    assert_eq!(rig.0.memory().pool(BufId(1))[..9], [7, 7, 7, 7, 7, 7, 7, 7, 0]);
    rig.0.assert_idle();
}

#[test]
fn when_it_fails_the_output_is_not_what_anybody_would_like() {
    let mut rig = rig();
    submit(&mut rig, 7);
    assert_eq!(end(&mut rig, Outcome::Fail), Err(Errno::IO));
    let output = &rig.0.memory().pool(BufId(1))[..8];
    assert!(output.iter().all(|&byte| byte != 0 && byte != 7), "{output:?}");
}

#[test]
#[should_panic(expected = "memory was used again while copy was at work on it")]
fn its_input_is_not_used_meanwhile() {
    let mut rig = rig();
    submit(&mut rig, 7);
    submit(&mut rig, 0);
    assert_eq!(rig.0.poll().expect("it had nothing to do").result, Ok(()));
    let _ = end(&mut rig, Outcome::Done);
}
