//! In which order a VMDK image's content id, data, tables and end are written: on a device where what
//! was submitted together ends together, unless the test holds some of it back.

use std::path::Path;

use crate::common::drive::{folder, make};
use crate::common::held::Held;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::Io;
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::chain::open_layer;
use cowbell_formats::parts::growth::{Grow, Growth};
use cowbell_formats::vmdk::run::Regions;
use cowbell_formats::vmdk::{Vmdk, VmdkOptions};
use cowbell_formats::{Format, LayerMeta, Node, OpenOptions};

/// So many tables that those of the middle share no block with anything else.
const SIZE: u64 = 64 << 30;
const MIDDLE: u64 = SIZE / 2;

struct Rig {
    engine: Engine<Node, Held>,
    disk: NodeId,
    /// Where the primary tables begin, and the grains.
    primary_at: u64,
    grains_at: u64,
}

impl Rig {
    fn new(path: &Path, by: Grow) -> Rig {
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let layer = open_layer(&crate::common::DISK, path, &options).expect("it opens");
        let LayerMeta::Vmdk(opened) = layer.meta else { panic!("it is another format") };
        let header = opened.extents[0].sparse().expect("it is sparse").header.clone();
        let mut engine = Engine::new(Held::default(), Limits::default());
        let (file, _) = engine.attach(std::fs::read(path).expect("it is there")).expect("memory");
        let growth = Growth { by, ..Growth::default() };
        let options = VmdkOptions { growth, ..VmdkOptions::default() };
        let regions = Regions::new(&opened, true, &options, |len| engine.region(len));
        let node = Vmdk::new(vec![file], opened, true, None, regions, options);
        let disk = engine.add(Node::Vmdk(Box::new(node)));
        let (primary_at, grains_at) = (header.directory_at * 512, header.overhead * 512);
        Rig { engine, disk, primary_at, grains_at }
    }

    /// An image in which nothing is allocated. (While the id is written no chore makes the file longer; data
    /// that does so itself need not wait for one.)
    fn empty(by: Grow) -> Rig {
        let folder = folder();
        let path = folder.path().join("disk.vmdk");
        make(&path, Format::Vmdk, SIZE);
        Rig::new(&path, by)
    }

    fn name(&self, op: &Op) -> &'static str {
        match op.kind {
            OpKind::Flush => "flush",
            OpKind::Truncate if op.offset > self.engine.backend().bytes.len() as u64 => "grow",
            OpKind::Truncate => "cut",
            OpKind::Write { .. } if op.offset < 4096 => "id",
            OpKind::Write { .. } if op.offset < self.primary_at => "redundant",
            OpKind::Write { .. } if op.offset < self.grains_at => "primary",
            OpKind::Write { .. } => "data",
            OpKind::Read => "read",
            _ => panic!("{op:?}"),
        }
    }

    fn write(&mut self, at: u64) {
        self.engine.submit(self.disk, Io::write(at, 4096), Buf::zeroed(4096), 0).expect("room");
        self.engine.run(Time(0));
    }

    fn flush(&mut self) {
        self.engine.submit(self.disk, Io::flush(), Mem::None, 0).expect("room");
        self.engine.run(Time(0));
    }

    /// Ends what is in flight, but what is called `held`: what it was, without reads.
    fn end_but(&mut self, held: &str) -> Vec<&'static str> {
        let ops: Vec<_> = self.engine.backend().ops.iter().map(|(_, op)| op.clone()).collect();
        let mut names: Vec<_> = ops.iter().map(|op| self.name(op)).collect();
        names.retain(|name| *name != held);
        for (op, name) in ops.iter().map(|op| (op, self.name(op))).collect::<Vec<_>>() {
            if name != held {
                self.engine.backend_mut().release(None, |other| other == op);
            }
        }
        self.engine.run(Time(0));
        names.retain(|name| *name != "read");
        names.sort_unstable();
        names
    }

    /// Ends all until nothing is in flight: round by round what that was.
    fn end_all(&mut self) -> Vec<Vec<&'static str>> {
        let mut rounds = Vec::new();
        while !self.engine.backend().ops.is_empty() {
            rounds.push(self.end_but(""));
        }
        rounds.retain(|round| !round.is_empty());
        rounds
    }

    fn end_all_but_the_id(&mut self) -> Vec<&'static str> {
        // Reads have no name: a round may look empty.
        (0..8).flat_map(|_| self.end_but("id")).collect()
    }

    fn fail(&mut self, name: &str) {
        let mut ops = self.engine.backend().ops.iter().map(|(_, op)| op.clone());
        let op = ops.rfind(|op| self.name(op) == name).expect("it is in flight");
        assert!(self.engine.backend_mut().release(Some(Errno::IO), |other| *other == op));
        self.engine.run(Time(0));
    }

    fn ended(&mut self) -> Option<Result<(), Errno>> {
        self.engine.poll().map(|finished| finished.result)
    }

    fn drain(&mut self) -> Vec<Vec<&'static str>> {
        self.engine.drain();
        self.engine.run(Time(0));
        self.end_all()
    }
}

#[test]
fn an_allocation_is_published_after_the_id() {
    let mut rig = Rig::empty(Grow::Write);
    rig.write(MIDDLE);
    assert_eq!(rig.end_all_but_the_id().last(), Some(&"data"));
    assert_eq!(rig.ended(), None, "the data is written, but not the id");
    assert_eq!(rig.end_all(), [["id"]]);
    assert_eq!(rig.ended(), Some(Ok(())));
}

#[test]
fn data_in_place_is_written_after_the_id_and_that_once() {
    let folder = folder();
    let path = folder.path().join("disk.vmdk");
    make(&path, Format::Vmdk, SIZE);
    let mut rig = Rig::new(&path, Grow::Truncate);
    rig.write(MIDDLE);
    rig.end_all();
    rig.drain();
    std::fs::write(&path, &rig.engine.backend().bytes).expect("it is written");
    let mut rig = Rig::new(&path, Grow::Truncate);
    rig.write(MIDDLE);
    assert_eq!(rig.end_all(), [["id"], ["data"]]);
    rig.write(MIDDLE);
    assert_eq!(rig.end_all(), [["data"]]);
}

#[test]
fn an_id_that_was_not_written_is_asked_for_again() {
    let mut rig = Rig::empty(Grow::Write);
    rig.write(MIDDLE);
    rig.end_all_but_the_id();
    rig.fail("id");
    assert_eq!(rig.ended(), Some(Err(Errno::IO)));
    rig.write(MIDDLE);
    let rounds = rig.end_all().concat();
    assert_eq!(rounds.iter().filter(|name| **name == "id").count(), 1, "{rounds:?}");
    assert_eq!(rig.ended(), Some(Ok(())));
}

#[test]
fn closing_writes_tables_then_cuts_then_flushes() {
    let mut rig = Rig::empty(Grow::Truncate);
    assert_eq!(rig.drain(), [["flush"]]);
    rig.write(MIDDLE);
    rig.end_all();
    let closing = [["flush"], ["primary"], ["flush"], ["redundant"], ["cut"], ["flush"]];
    assert_eq!(rig.drain(), closing);
    assert_eq!(rig.engine.drained(), Some(Ok(())));
    rig.write(MIDDLE);
    rig.end_all();
    assert_eq!(rig.drain(), [["flush"]]);
}

#[test]
fn a_cut_that_failed_is_told_and_its_space_not_used() {
    let mut rig = Rig::empty(Grow::Truncate);
    rig.write(MIDDLE);
    rig.end_all();
    rig.flush();
    rig.end_all();
    rig.engine.drain();
    rig.engine.run(Time(0));
    rig.end_but("cut");
    rig.fail("cut");
    rig.end_all();
    assert_eq!(rig.engine.drained(), Some(Err(Errno::IO)));
    // What is new lies behind a growth, whatever the file's length is.
    rig.write(MIDDLE + (1 << 20));
    let rounds = rig.end_all();
    assert_eq!(rounds.last().map(|round| &round[..]), Some(&["data"][..]), "{rounds:?}");
    assert!(rounds.len() > 1, "{rounds:?}");
}
