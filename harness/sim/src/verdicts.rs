//! What the images that crashes leave are found to be: of each kind, one is examined.
//!
//! An examination opens an image, checks it, recovers and repairs it, and asks where the guest's
//! bytes are. What it finds follows from what it *reads*; it reads tables, not the guest's bytes.
//! So its verdict holds for every image that holds the same in the same places, and there are few
//! kinds of tables among millions of images. Verdicts are kept in a tree: a node asks for a place,
//! its branches are what may be there, a leaf is a verdict.
//!
//! Whatever a repair *writes* must lie apart from the guest's bytes, which it did not read.
#![expect(clippy::disallowed_types, reason = "all worlds of an image learn from each other")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use cowbell_formats::map::{Extent, Kind};

use crate::disk::{Contents, SECTOR, splitmix};
use crate::explore::HashedMap;
use crate::host::{Place, SimHost, Watch};
use crate::shadow::Writers;
use crate::subject::{Checked, Subject};

/// What an image was found to be.
#[derive(Debug)]
pub struct Verdict {
    /// What the check said of it, as it was left.
    pub checked: Checked,
    /// Where the guest's bytes are, up the disk.
    pub map: Vec<Extent>,
}

impl Verdict {
    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.map.last().map_or(0, |last| last.start + last.len)
    }

    /// Is part of it compressed? Then where its bytes are says nothing of what they are.
    pub fn has_compressed(&self) -> bool {
        self.map.iter().any(|extent| extent.kind == Kind::Compressed)
    }

    /// In which of `files` files, and where, byte `offset` of the disk is; `None`: it reads as
    /// zeros, or lies behind the disk's end. And up to where that holds.
    pub fn locate(&self, offset: u64, files: usize) -> (Option<(usize, u64)>, u64) {
        let at = self.map.partition_point(|extent| extent.start + extent.len <= offset);
        let Some(extent) = self.map.get(at) else { return (None, u64::MAX) };
        let place = match extent.kind {
            Kind::Data(host) => Some((file_of(extent, files), host.0 + offset - extent.start)),
            Kind::Zero(_) | Kind::Unallocated => None,
            Kind::Compressed => unreachable!("such a disk is read"),
        };
        (place, extent.start + extent.len)
    }
}

/// Layers count from the top, files from the bottom.
fn file_of(extent: &Extent, files: usize) -> usize {
    files - 1 - extent.depth
}

/// The verdicts of all images of one subject.
#[derive(Clone, Debug, Default)]
pub struct Verdicts(Rc<RefCell<Tree<Verdict>>>);

/// Whose bytes the parts of a disk are of which some are compressed: that follows from what is read, too, which takes inflating.
#[derive(Clone, Debug, Default)]
pub struct Inflated(Rc<RefCell<BTreeMap<Part, Tree<Vec<Writers>>>>>);

/// A part of a disk: of the one beside? Its first byte; the disk's size.
pub type Part = (bool, u64, u64);

#[derive(Debug)]
struct Tree<T> {
    nodes: Vec<Node<T>>,
    /// Where a node's branch leads: by both.
    branches: HashedMap<usize>,
}

#[derive(Debug)]
enum Node<T> {
    Ask(Place),
    Leaf(Rc<T>),
}

impl<T> Default for Tree<T> {
    fn default() -> Tree<T> {
        Tree { nodes: Vec::new(), branches: HashedMap::default() }
    }
}

impl<T> Tree<T> {
    fn find(&self, files: &[Contents]) -> Option<Rc<T>> {
        let mut at = 0;
        loop {
            match self.nodes.get(at)? {
                Node::Leaf(leaf) => return Some(Rc::clone(leaf)),
                Node::Ask(place) => at = *self.branches.get(&branch_of(at, *place, files))?,
            }
        }
    }

    /// Adds a way from the root: where `reads` were made of `files`, this is the leaf.
    fn add(&mut self, reads: &[Place], files: &[Contents], leaf: Rc<T>) {
        let mut from = None;
        for read in reads.iter().map(|&place| Node::Ask(place)).chain([Node::Leaf(leaf)]) {
            let next = self.nodes.len();
            let at = from.map_or(0, |branch| *self.branches.entry(branch).or_insert(next));
            from = match read {
                Node::Ask(place) => Some(branch_of(at, place, files)),
                Node::Leaf(_) => None,
            };
            if at == next {
                self.nodes.push(read);
            }
        }
    }
}

fn branch_of(at: usize, place: Place, files: &[Contents]) -> u64 {
    splitmix(place.hash_in(files) ^ splitmix(at as u64))
}

impl Inflated {
    /// Whose bytes a part is, piece by piece, as `look` finds in `files`, which are called `names`. Of one part `look` is the same each time.
    ///
    /// # Errors
    ///
    /// Those of `look`.
    pub fn of(
        &self,
        part: Part,
        (names, files): (&[&str], &[Contents]),
        look: impl FnOnce(&SimHost) -> Result<Vec<Writers>, String>,
    ) -> Result<Rc<Vec<Writers>>, String> {
        let known = self.0.borrow().get(&part).and_then(|tree| tree.find(files));
        if let Some(found) = known {
            return Ok(found);
        }
        let watch = Watch::default();
        let found = Rc::new(look(&SimHost::watched(names, files, &watch))?);
        let mut trees = self.0.borrow_mut();
        let tree = trees.entry(part).or_default();
        if tree.nodes.len() < NODES_MAX {
            tree.add(&watch.reads(), files, Rc::clone(&found));
        }
        Ok(found)
    }
}

impl Verdicts {
    /// What an image of `subject` is found to be; it has been opened read-only, for writing and
    /// been repaired, and nothing of that has changed what the guest sees.
    ///
    /// # Errors
    ///
    /// When something is wrong with the image, whatever the guest may have written.
    pub fn of<S: Subject>(&self, subject: &S, files: &[Contents]) -> Result<Rc<Verdict>, String> {
        let known = self.0.borrow().find(files);
        if let Some(verdict) = known {
            return Ok(verdict);
        }
        let watch = Watch::default();
        let host = SimHost::watched(&subject.files(), files, &watch);
        let verdict = Rc::new(examine(subject, &host)?);
        for write in watch.writes() {
            if let Some(extent) = verdict.map.iter().find(|e| is_in(e, write, files.len())) {
                return Err(format!("repair wrote {write:?}, which is the guest's: {extent:?}"));
            }
        }
        self.0.borrow_mut().add(&watch.reads(), files, Rc::clone(&verdict));
        Ok(verdict)
    }
}

/// More of a part is not remembered: a stream may be torn in many ways.
const NODES_MAX: usize = 1 << 15;

fn is_in(extent: &Extent, write: Place, files: usize) -> bool {
    let Kind::Data(host) = extent.kind else { return false };
    let (start, end) = (host.0 / SECTOR, (host.0 + extent.len).div_ceil(SECTOR));
    write.file == file_of(extent, files) && write.first < end && start < write.end
}

fn examine<S: Subject>(subject: &S, host: &SimHost) -> Result<Verdict, String> {
    let checked = subject.check(host)?;
    let mendable = checked.marked && subject.mark_covers_corruption();
    if checked.corruptions > 0 && !mendable {
        return Err(format!("{} corruptions", checked.corruptions));
    }
    let map = if checked.corruptions > 0 { None } else { Some(subject.map(host)?) };
    if checked.marked {
        subject.recover(host).map_err(|why| format!("opened for writing: {why}"))?;
        let after = subject.check(host).map_err(|why| format!("after recovery: {why}"))?;
        if after.marked || after.corruptions > 0 {
            return Err(format!("recovery left the image wrong: {after:?}"));
        }
    }
    let recovered = subject.map(host).map_err(|why| format!("after recovery: {why}"))?;
    if map.is_some_and(|map| map != recovered) {
        return Err("recovery changed what the guest sees".into());
    }
    let map = recovered;
    let repair = |what| subject.repair(host).map_err(|why| format!("{what}: {why}"));
    let contents =
        || -> Vec<_> { subject.files().iter().map(|name| host.contents(name)).collect() };
    repair("repaired")?;
    let once = contents();
    repair("repaired again")?;
    if once != contents() {
        return Err("a second repair changed the image again".into());
    }
    let after = subject.check(host).map_err(|why| format!("after repair: {why}"))?;
    if after.marked || after.corruptions > 0 || after.leaks > checked.leaks {
        return Err(format!("repair left the image wrong: {after:?}"));
    }
    if map != subject.map(host).map_err(|why| format!("after repair: {why}"))? {
        return Err("repair changed what the guest sees".into());
    }
    Ok(Verdict { checked, map })
}
