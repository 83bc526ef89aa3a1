//! A write into a cut last block writes the block whole and puts the file's end back. Neither a
//! truncation meanwhile nor one that failed before makes that the wrong end. A truncation itself holds
//! up that block alone.

use crate::common::held::Held;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::Node;
use cowbell_formats::raw::Raw;

struct Rig {
    engine: Engine<Node, Held>,
    disk: NodeId,
}

impl Rig {
    fn new(len: usize) -> Rig {
        let mut engine = Engine::new(Held::default(), Limits::default());
        let (file, info) = engine.attach(vec![0xaa; len]).expect("memory");
        let size = info.len.next_multiple_of(512);
        let disk = engine.add(Node::Raw(Raw::new(file, size, true, false, true)));
        Rig { engine, disk }
    }

    fn write(&mut self, offset: u64, len: usize) {
        let mem = Buf::copied(&vec![0x55; len]);
        self.engine.submit(self.disk, Io::write(offset, len as u64), mem, 1).expect("room");
        self.engine.run(Time(0));
    }

    fn truncate(&mut self, size: u64) {
        let io = Io { kind: IoKind::Truncate, offset: size, len: 0 };
        self.engine.submit(self.disk, io, Mem::None, 2).expect("room");
        self.engine.run(Time(0));
    }

    fn release(&mut self, fail: Option<Errno>, which: impl Fn(&Op) -> bool) -> bool {
        let found = self.engine.backend_mut().release(fail, which);
        self.engine.run(Time(0));
        found
    }

    /// Lets everything go, `last` as late as can be.
    fn finish(&mut self, last: impl Fn(&Op) -> bool) -> &[u8] {
        while self.release(None, |op| !last(op)) || self.release(None, |_| true) {}
        while self.engine.poll().is_some() {}
        self.engine.assert_idle();
        &self.engine.backend().bytes
    }
}

fn truncates_to(len: u64) -> impl Fn(&Op) -> bool {
    move |op| op.kind == OpKind::Truncate && op.offset == len
}

#[test]
fn growth_while_the_end_is_put_back() {
    for late in [1000, 16384] {
        let mut rig = Rig::new(1000);
        rig.write(990, 5);
        assert!(rig.release(None, |op| op.kind == OpKind::Read));
        assert!(rig.release(None, |op| op.kind.modifies()));
        rig.truncate(16384);
        assert_eq!(rig.finish(truncates_to(late)).len(), 16384, "{late} last");
    }
}

#[test]
fn growth_while_the_block_is_read_or_written() {
    for steps in 0..2 {
        for late in [1000, 16384] {
            let mut rig = Rig::new(1000);
            rig.write(990, 5);
            for _ in 0..steps {
                assert!(rig.release(None, |_| true));
            }
            rig.truncate(16384);
            assert_eq!(rig.finish(truncates_to(late)).len(), 16384, "{steps}, {late} last");
        }
    }
}

#[test]
fn shrinking_while_the_block_is_read_or_written() {
    for steps in 0..3 {
        for late in [1000, 512] {
            let mut rig = Rig::new(1000);
            rig.write(100, 5);
            for _ in 0..steps {
                assert!(rig.release(None, |_| true));
            }
            rig.truncate(512);
            let bytes = rig.finish(truncates_to(late));
            assert_eq!(bytes.len(), 512, "{steps}, {late} last");
            assert_eq!(bytes[100..105], [0x55; 5]);
        }
    }
}

/// A flush follows; it is the cut block alone that waits for it.
#[test]
fn growth_is_answered_before_the_cut_block_is_stable() {
    let mut rig = Rig::new(9000);
    rig.truncate(1 << 20);
    assert!(rig.release(None, truncates_to(1 << 20)));
    assert_eq!(rig.engine.poll().expect("it is done").result, Ok(()));
    rig.write(8192, 4096);
    rig.write(12288, 4096);
    let write = OpKind::Write { fua: false };
    let in_flight = |rig: &Rig| -> Vec<_> {
        rig.engine.backend().ops.iter().map(|(_, op)| (op.kind, op.offset)).collect()
    };
    assert_eq!(in_flight(&rig), [(OpKind::Flush, 0), (write, 12288)]);
    assert!(rig.release(None, |op| op.kind == OpKind::Flush));
    assert_eq!(in_flight(&rig), [(write, 12288), (write, 8192)]);
    assert_eq!(rig.finish(|_| false).len(), 1 << 20);
}

#[test]
fn a_truncation_that_failed() {
    for size in [512, 1 << 20] {
        let mut rig = Rig::new(9000);
        rig.truncate(size);
        assert!(rig.release(Some(Errno::NOT_PERMITTED), truncates_to(size)));
        assert_eq!(rig.engine.poll().expect("it failed").result, Err(Errno::NOT_PERMITTED));
        rig.write(100, 5);
        assert_eq!(rig.finish(|_| false).len(), 9000, "after a failed truncation to {size}");
        rig.write(8990, 5);
        // Nobody knows how long it is after a failed growth: the block may stay whole.
        let len = rig.finish(|_| false).len();
        assert!(len == 9000 || size > 9000 && len == 12288, "{len} after failing to get {size}");
    }
}

#[test]
fn a_write_behind_the_end_that_failed() {
    let mut rig = Rig::new(1000);
    rig.truncate(1 << 20);
    assert!(rig.release(None, |_| true));
    rig.truncate(1024);
    assert!(rig.release(None, |_| true));
    rig.write(900, 5);
    assert_eq!(rig.finish(|_| false).len(), 1024);
}
