//! Compressed writes: a whole cluster is deflated and packed, and its entry leads there.
//!
//! A cluster that does not become smaller is written as it is.

use cowbell_engine::mutant;
use cowbell_engine::step::{Cx, Event};
use cowbell_engine::units::{Errno, HostOffset};

use crate::parts::cow::Cow;
use crate::qcow2::disk::layout::{Compressed, L2Entry, Mapping};
use crate::qcow2::run::packing::{Lack, PackState, Packed};
use crate::qcow2::run::piece::{Claim, PieceStep, Progress, RequestState};
use crate::qcow2::run::reserve::Short;
use crate::qcow2::run::tables::{Found, Run};

impl PieceStep<'_> {
    /// Claims the cluster `at..to`, the end of the disk counting as its end, and deflates it.
    pub fn compress(&mut self, at: u64, to: u64, run: Run, cx: &mut Cx<'_>) -> Progress {
        if !self.tables.owns_table(at) {
            return self.provide_table(at, cx);
        }
        let end = at + self.image.geometry.cluster_size();
        if self.claims.free_to(at, end, cx).is_none() {
            return Progress::LookAgain(at);
        }
        let Some(slot) = self.packing.take_slot(cx) else {
            return Progress::LookAgain(at);
        };
        let table_slot = run.slot.expect("a claim is made of what a slice says");
        self.tables.slices.pin(table_slot);
        let claim = Claim {
            start: at,
            end,
            slot: table_slot,
            host: HostOffset(0),
            is_new: false,
            at,
            to,
            exposed: (at, end),
            cow: Cow::NONE,
            owes: true,
        };
        let claim = self.claims.insert(at..end, claim);
        let from = at - cx.io().offset;
        self.packing.deflate(slot, (from, to - at), self.header.compression(), cx);
        Progress::Wait(RequestState::Pack(PackState::Deflate { claim, slot }))
    }

    pub fn step_pack(&mut self, state: PackState, event: Event, cx: &mut Cx<'_>) -> Progress {
        match (state, event) {
            (PackState::Deflate { claim, slot }, Event::Io(result)) => {
                self.deflated(claim, slot, result, cx)
            }
            (PackState::Space { packed, attempt }, Event::Woken) => {
                match self.reserve.no_cluster(attempt) {
                    Some(errno) => self.unpacked(packed, errno, cx),
                    None => self.pack(packed, cx),
                }
            }
            (PackState::Frees { packed, attempt }, Event::Woken) => {
                match self.writeback.no_room(attempt) {
                    Some(errno) => self.unpacked(packed, errno, cx),
                    None => self.pack(packed, cx),
                }
            }
            (PackState::Room { packed }, Event::Woken) => self.pack(packed, cx),
            (PackState::MakeRoom { packed, buffer }, Event::Io(result)) => {
                self.packing.written(buffer, result, cx);
                match result {
                    Ok(()) => self.pack(packed, cx),
                    Err(errno) => self.unpacked(packed, errno, cx),
                }
            }
            // It is still in memory if that failed: the next flush tries again, and tells.
            (PackState::Write { to, buffer }, Event::Io(result)) => {
                self.packing.written(buffer, result, cx);
                Progress::To(to)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn deflated(
        &mut self,
        claim: u32,
        slot: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress {
        let bytes = result.map(|()| self.packing.deflated_bytes(slot, cx));
        match bytes {
            Ok(Some(bytes)) => self.pack(Packed { claim, slot, bytes }, cx),
            Ok(None) => self.store_instead(claim, slot, cx),
            Err(errno) => self.unpacked(Packed { claim, slot, bytes: 0 }, errno, cx),
        }
    }

    /// It is written as it is: in place, or like what allocates. (Who is parked on the way there begins
    /// anew.)
    fn store_instead(&mut self, claim: u32, slot: u32, cx: &mut Cx<'_>) -> Progress {
        let (at, to) = (self.claims[claim].at, self.claims[claim].to);
        self.packing.give_slot(slot, cx);
        self.end_claim(claim, false, cx);
        let run = match self.tables.look_up(at, to, true, cx.memory()) {
            Found::Run(run) => run,
            Found::NoTable { .. } | Found::NotLoaded | Found::Loading { .. } | Found::Invalid => {
                return Progress::To(at);
            }
        };
        match run.mapping {
            Mapping::Data(host) if run.copied && self.metadata.is_hit(host.0, to - at) => {
                self.hits_metadata(host.0, cx)
            }
            Mapping::Data(host) if run.copied => {
                cx.write_guest(self.image.data, host.0, at - cx.io().offset, to - at, false);
                Progress::Issued(to)
            }
            _ => self.allocate(at, run, cx),
        }
    }

    fn unpacked(&mut self, packed: Packed, errno: Errno, cx: &mut Cx<'_>) -> Progress {
        self.packing.give_slot(packed.slot, cx);
        self.fail(packed.claim, errno, cx)
    }

    fn pack(&mut self, packed: Packed, cx: &mut Cx<'_>) -> Progress {
        let wait = |state| Progress::Wait(RequestState::Pack(state));
        if !self.writeback.has_room_for_frees() {
            let attempt = self.writeback.park_for_room(cx);
            return wait(PackState::Frees { packed, attempt });
        }
        let place = match self.packing.pack(packed, self.reserve, cx) {
            Ok(place) => place,
            Err(Lack::Space(Short::Failed(errno))) => return self.unpacked(packed, errno, cx),
            Err(Lack::Space(Short::Later(attempt))) => {
                return wait(PackState::Space { packed, attempt });
            }
            Err(Lack::TooFar) => return self.store_instead(packed.claim, packed.slot, cx),
            Err(Lack::Room) => return wait(PackState::Room { packed }),
            Err(Lack::Full(buffer)) => {
                self.packing.write(buffer, cx);
                return wait(PackState::MakeRoom { packed, buffer });
            }
        };
        let to = self.claims[packed.claim].to;
        self.put_compressed(packed.claim, place, cx);
        self.packing.give_slot(packed.slot, cx);
        self.end_claim(packed.claim, true, cx);
        match self.packing.filled() {
            Some(buffer) => {
                self.packing.write(buffer, cx);
                wait(PackState::Write { to, buffer })
            }
            None => Progress::To(to),
        }
    }

    /// The bytes are packed: the entry says so.
    fn put_compressed(&mut self, key: u32, place: Compressed, cx: &mut Cx<'_>) {
        let geometry = self.image.geometry;
        let (slot, at) = (self.claims[key].slot, self.claims[key].at);
        let index = self.image.slice_index(at);
        let bytes = self.tables.slices.bytes_mut(slot, cx.mem());
        let old = L2Entry::read(bytes, index, geometry);
        L2Entry::compressed(place, geometry).write(bytes, index, geometry);
        self.forget_inflated(place);
        if let Ok(Some(place)) = old.place(geometry)
            && !mutant!("qcow2_compressed_over_data_leaks")
        {
            self.give_up(place, old.is_copied(), false);
        }
        self.writeback.touch(slot, true, self.tables, cx);
    }
}
