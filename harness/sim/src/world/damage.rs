//! Damage that nobody is told of: writes that are lost or go astray, and bits that change at rest.
//!
//! No format has sums of what a guest wrote, nor of most of its tables. So much is demanded all the
//! same: nobody panics, hangs, or works without end. And where the disk is not what it should be,
//! somebody says so: a request fails, an opening is refused, or the check finds something. What cannot
//! be noticed by anybody is told by [`Subject::may_go_unnoticed`].

use super::World;
use crate::backend::{Damaged, OpName, Since};
use crate::choose::Choice;
use crate::disk::{Contents, SECTOR, Sector};
use crate::host::{Place, SimHost, Watch};
use crate::shadow::Found;
use crate::subject::{Checked, Subject};

/// What may be damaged still, and what came of what was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Silence {
    pub lost_writes: u8,
    pub bit_rots: u8,
    /// Has somebody said that something is wrong?
    pub is_told: bool,
    /// Was a guest given bytes that it should not have got?
    pub is_wrong: bool,
}

/// Who looks at a damaged image asks its files for something at most so many times.
const LOOKS_MAX: u64 = 20_000;

impl<S: Subject> World<S> {
    /// Was something damaged, and nobody told?
    pub fn is_damaged(&self) -> bool {
        !self.engine.backend().damaged().is_empty()
    }

    /// Is there anything left of it, or what came of it?
    pub(super) fn is_left_damaged(&self) -> bool {
        self.damage_left().next().is_some()
    }

    fn damage_left(&self) -> impl Iterator<Item = &Damaged> {
        let damaged = self.engine.backend().damaged().iter();
        damaged.filter(|sector| sector.since != Since::WrittenOver)
    }

    /// The silent ways in which an op may end.
    pub(super) fn silent_ends(&self, name: OpName, out: &mut Vec<Choice>) {
        if self.silence.lost_writes > 0 && !self.crashed {
            let ends = self.engine.backend().silent_outcomes(name);
            out.extend(ends.iter().map(|&outcome| Choice::End(name, outcome)));
        }
    }

    /// Bits that may change: while nothing is in flight, which is as good as at any other time.
    pub(super) fn flips(&self, out: &mut Vec<Choice>) {
        let backend = self.engine.backend();
        let is_at_rest = self.ended == self.next && backend.in_flight_count() == 0;
        if self.silence.bit_rots > 0 && is_at_rest && !self.crashed {
            let bits = backend.telling_bits(self.plan.subject.still_files());
            out.extend(bits.into_iter().map(Choice::Flip));
        }
    }

    /// What a guest was given is wrong: that of a damaged disk may be, if somebody says so.
    pub(super) fn is_right(&mut self, right: Result<(), String>) -> Result<(), String> {
        if right.is_err() && self.is_damaged() {
            self.silence.is_wrong = true;
            return Ok(());
        }
        right
    }

    /// Looks at what is left of a damaged image.
    pub(super) fn finish_damaged(&self, files: &[Contents]) -> Result<(), String> {
        let subject = &self.plan.subject;
        let watch = Watch::default();
        let host = || SimHost::watched(&subject.files(), files, &watch);
        let (to_read, to_write) = (host(), host());
        let checked = subject.check(&to_read);
        let is_sound =
            |checked: &Checked| !checked.marked && checked.corruptions == 0 && checked.leaks == 0;
        let found = self.find(&to_read);
        let is_told = self.silence.is_told
            || !checked.as_ref().is_ok_and(is_sound)
            || found.is_err()
            || subject.recover(&to_write).is_err();
        let reads = watch.reads();
        self.mend_damaged(&host(), checked.as_ref().ok())?;
        if watch.looks() > LOOKS_MAX {
            return Err(format!("{} looks at a damaged image", watch.looks()));
        }
        let is_guests = self.damage_left().any(|sector| !sector.is_own);
        let own = self.damaged_tables(files, &reads, is_guests);
        if own.is_empty() {
            // Bytes of a guest's are wrong, and nothing else is.
            let is_read = |sector: &Damaged| reads.iter().any(|place| place.has(sector));
            let is_all = self.damage_left().all(|sector| !sector.is_own && !is_read(sector));
            return match &checked {
                _ if !is_all => Ok(()),
                Ok(checked) if checked.corruptions == 0 => Ok(()),
                _ => Err(format!("a guest's bytes were damaged, and the check says {checked:?}")),
            };
        }
        let is_right = found.as_ref().is_ok_and(|found| self.shadow.check_live(found).is_ok());
        let is_wrong = self.silence.is_wrong || !is_right;
        // What held nothing may be of no consequence: if nobody looks there, or a guest's bytes went there
        // and are missed where they belong.
        let looked_at = |sector: &&Damaged| {
            let is_read = reads.iter().any(|place| place.has(sector));
            sector.should != Sector::ZEROS || is_read && !is_guests
        };
        let some: Vec<Damaged> = own.iter().filter(looked_at).cloned().collect();
        let may_be = subject.may_go_unnoticed(&own) || subject.may_go_unnoticed(&some);
        if !is_wrong || is_told || may_be {
            return Ok(());
        }
        let places = own.iter().map(|of| format!("f{} {:#x}", of.file, of.index * SECTOR));
        let places: Vec<String> = places.collect();
        Err(format!("the disk is wrong and nobody says so: damaged at {}", places.join(", ")))
    }

    /// Not everything can be repaired, but it gets no worse; and who reads it then ends.
    fn mend_damaged(&self, host: &SimHost, before: Option<&Checked>) -> Result<(), String> {
        let subject = &self.plan.subject;
        let Some(before) = before.filter(|_| subject.repair(host).is_ok()) else { return Ok(()) };
        let after = subject.check(host).map_err(|why| format!("after a repair: {why}"))?;
        // A table that is found again names grains that were leaks, and may now be two's.
        if after.corruptions > before.corruptions + before.leaks {
            return Err(format!("damaged: {before:?}, and after a repair {after:?}"));
        }
        // What is there may be an error.
        let _ = self.find(host);
        Ok(())
    }

    /// Sectors of headers and tables that were damaged. What has become one since counts while the
    /// damage is there, or if somebody has read it; and no other does if a guest's bytes are wrong anyway, whom
    /// `is_guests` tells of.
    fn damaged_tables(&self, files: &[Contents], reads: &[Place], is_guests: bool) -> Vec<Damaged> {
        let Some(is_metadata) = self.plan.subject.metadata() else { return Vec::new() };
        let is_table = |sector: &&Damaged| {
            let (file, start) = (&files[sector.file], sector.index * SECTOR);
            let is_there = file.sector(sector.index) == sector.is;
            let is_one = sector.is_metadata || is_metadata(file, start, start + SECTOR);
            let is_read = reads.iter().any(|place| place.has(sector));
            let was_read = sector.is_own && sector.since == Since::Read;
            match is_guests {
                true => is_one && is_there && is_read,
                false => is_one && (is_there || was_read) || sector.is_metadata,
            }
        };
        self.damage_left().filter(is_table).cloned().collect()
    }

    /// Whose bytes the disk holds, without the engine.
    fn find(&self, host: &SimHost) -> Result<Found, String> {
        let subject = &self.plan.subject;
        let map = subject.map(host)?;
        let size = map.last().map_or(0, |last| last.start + last.len);
        let read = |offset: u64, bytes: &mut [u8]| subject.read(host, offset, bytes);
        self.plan.cut.recognise(size, read)
    }

    /// Somebody has said that something is wrong.
    pub(super) fn is_told(&mut self) {
        self.silence.is_told |= self.is_damaged();
    }
}
