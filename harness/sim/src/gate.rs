//! The gate: what must hold before any change goes in, and the reports of all such runs.
//!
//! Scopes are small and exhaustive. Defects of a block layer show with two or three requests on
//! an image of a few clusters, if *every* order and *every* crash is looked at. So: all pairs of
//! requests with at most one fault, and all triples of the most telling ones without, on images
//! of every kind.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cowbell_formats::Format;

use crate::clock::Stopwatch;
use crate::explore::{Counts, Limit, exhaust};
use crate::subject::Subject;
use crate::subjects::{self, CLUSTER, Image, Layout, State};
use crate::trace::Trace;
use crate::workload::{Request, Workload};
use crate::world::{Base, Budget, CopyPlan, QUIET, Way};

/// Workloads on one kind of image, and what may go wrong with them.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The image.
    pub image: Image,
    /// What may go wrong.
    pub budget: Budget,
    /// They.
    pub workloads: Vec<Workload>,
}

impl Scope {
    /// Requests in the longest workload.
    pub fn most_requests(&self) -> usize {
        self.workloads.iter().map(|workload| workload.requests.len()).max().unwrap_or(0)
    }
}

/// What kinds of request there are: named for what each exercises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Read,
    ReadStraddling,
    WriteHead,
    WriteMiddle,
    WriteWhole,
    WriteStraddling,
    WriteSubSector,
    WriteAcrossTables,
    WriteStable,
    ZeroWhole,
    ZeroPart,
    Discard,
    Grow,
    GrowTable,
    GrowFar,
    ReadGrown,
    WriteGrown,
    Shrink,
    Flush,
    /// What is where, from the cluster on into the next.
    Status,
}

impl Shape {
    pub(crate) const ALL: [Shape; 13] = [
        Shape::Read,
        Shape::ReadStraddling,
        Shape::WriteHead,
        Shape::WriteMiddle,
        Shape::WriteWhole,
        Shape::WriteStraddling,
        Shape::WriteSubSector,
        Shape::WriteAcrossTables,
        Shape::WriteStable,
        Shape::ZeroWhole,
        Shape::ZeroPart,
        Shape::Discard,
        Shape::Flush,
    ];

    /// The most telling.
    pub(crate) const CORE: [Shape; 5] = [
        Shape::Read,
        Shape::WriteSubSector,
        Shape::WriteStraddling,
        Shape::ZeroWhole,
        Shape::Flush,
    ];

    /// The fewest: for images of which each request does much.
    const FEW: [Shape; 3] = [Shape::WriteSubSector, Shape::ZeroWhole, Shape::Flush];

    /// The request of this shape at cluster `cluster` of table `table`.
    fn at(self, image: &Image, (table, cluster): (u64, u64)) -> Request {
        let at = image.place(table, cluster);
        let whole = image.cluster();
        match self {
            Shape::Read => Request::read(at, whole),
            Shape::ReadStraddling => Request::read(at + whole / 2, whole),
            Shape::WriteHead => Request::write(at, 1024),
            Shape::WriteMiddle => Request::write(at + 1024, 1024),
            Shape::WriteWhole => Request::write(at, whole),
            Shape::WriteStraddling => {
                let reach = (whole / 2).min(1024);
                Request::write(at + whole - reach, 2 * reach)
            }
            Shape::WriteSubSector => Request::write(at + 300, 300),
            Shape::WriteAcrossTables => Request::write(image.place(table + 1, 0) - 1024, 2048),
            Shape::WriteStable => Request::write_fua(at, 1024),
            Shape::ZeroWhole => Request::zero(at, whole),
            // With one of the file system's blocks whole in it.
            Shape::ZeroPart if image.format == Format::Raw => Request::zero(at + 512, 2 * whole),
            Shape::ZeroPart => Request::zero(at + 512, 1024),
            Shape::Discard => Request::discard(at + 1024, 2 * whole),
            Shape::Grow => Request::truncate(image.size() + 2 * whole),
            Shape::GrowTable => Request::truncate(image.place(3, 1) + 512),
            // A table of more clusters in a run than half a piece of a refcount block counts.
            Shape::GrowFar => Request::truncate(image.place(2200, 0)),
            Shape::ReadGrown => Request::read(image.size() - 512, 1024),
            Shape::WriteGrown => Request::write(image.size() - 512, 1024),
            Shape::Shrink => Request::truncate(image.place(table, cluster) + whole + 512),
            Shape::Flush => Request::flush(),
            Shape::Status => Request::status(at, 2 * whole),
        }
    }
}

/// Where the first request goes, and where others do: the same cluster, the same table, another.
const HERE: (u64, u64) = (0, 0);
const PLACES: [(u64, u64); 3] = [HERE, (0, 1), (1, 0)];

/// All workloads of `count` requests: the first at one place, the others at every place; of three
/// requests, the others in the first's cluster or in another table.
pub(crate) fn workloads(image: &Image, shapes: &[Shape], count: usize) -> Vec<Workload> {
    let places: &[(u64, u64)] = if count < 3 { &PLACES } else { &[HERE, (1, 0)] };
    let first = shapes.iter().map(|shape| vec![shape.at(image, HERE)]);
    let mut all: Vec<Vec<Request>> = first.collect();
    for _ in 1..count {
        let longer = all.iter().flat_map(|head| {
            shapes.iter().flat_map(move |shape| {
                places.iter().map(move |&place| {
                    let mut requests = head.clone();
                    requests.push(shape.at(image, place));
                    requests
                })
            })
        });
        all = longer.collect();
    }
    // A flush is the same everywhere.
    all.sort_unstable_by_key(|requests| Workload::new(requests.iter().copied()).to_string());
    all.dedup();
    all.retain(|requests| requests.iter().any(Request::modifies));
    all.into_iter().map(Workload::new).collect()
}

/// What is where, asked beside and after what changes it there, and in the next cluster.
fn statuses(image: &Image) -> Vec<Workload> {
    let changes = [
        Shape::WriteMiddle,
        Shape::WriteStraddling,
        Shape::ZeroWhole,
        Shape::Discard,
        Shape::Flush,
    ];
    let status = Shape::Status.at(image, HERE);
    let mut all = vec![vec![status]];
    for place in [HERE, (0, 1)] {
        all.extend(changes.map(|shape| vec![shape.at(image, place), status]));
        all.extend(changes.map(|shape| vec![status, shape.at(image, place)]));
    }
    // What is written must not pass for what it was, and what is zeroed not for more.
    let write = Shape::WriteHead.at(image, HERE);
    all.push(vec![write, status, Shape::ZeroWhole.at(image, HERE)]);
    all.push(vec![Shape::ZeroWhole.at(image, HERE), write, status]);
    all.sort_unstable_by_key(|requests| Workload::new(requests.iter().copied()).to_string());
    all.dedup();
    all.into_iter().map(Workload::new).collect()
}

/// Compressed writes, with each other and with what else may happen to their clusters; more than fit one
/// host cluster.
fn compressed(image: &Image) -> Vec<Workload> {
    let whole = image.cluster();
    let one = |cluster| Request::write_compressed(image.place(0, cluster), whole);
    let two = Request::write_compressed(image.place(0, 0), 2 * whole);
    let others = [Shape::Read, Shape::WriteSubSector, Shape::ZeroWhole, Shape::Discard];
    let mut all = vec![vec![one(0)], vec![one(0), one(1)], vec![two, one(1)]];
    for other in others.into_iter().chain([Shape::Flush, Shape::WriteWhole]) {
        all.push(vec![one(0), other.at(image, HERE)]);
        all.push(vec![other.at(image, HERE), one(0)]);
    }
    all.into_iter().map(Workload::new).collect()
}

/// The same in rows: what is given up, used again, and written in part by a flush.
fn compressed_rows(image: &Image) -> Vec<Workload> {
    let whole = image.cluster();
    let one = |cluster| Request::write_compressed(image.place(0, cluster), whole);
    let discard = Request::discard(image.place(0, 0), whole);
    let (read, flush) = (Request::read(image.place(0, 0), 2 * whole), Request::flush());
    let head = Request::write(image.place(0, 2), 1024);
    vec![
        Workload::new([one(0), flush, one(1)]),
        Workload::new([one(0), discard, one(1)]),
        Workload::new([one(0), one(0), read]),
        Workload::new([one(0), discard, flush, head]),
        Workload::new([one(0), one(1), one(2)]),
    ]
}

/// All pairs of a request and a change of the disk's size, in either order; and what was written
/// behind the old end, flushed.
fn resizes(image: &Image) -> Vec<Workload> {
    let sizes = subjects::of(image.format).resizes();
    let others = [&Shape::ALL[..], &[Shape::ReadGrown, Shape::WriteGrown, Shape::Grow]].concat();
    let mut all = Vec::new();
    for size in sizes {
        for other in &others {
            all.push(vec![*size, *other]);
            all.push(vec![*other, *size]);
        }
        all.push(vec![*size, Shape::WriteGrown, Shape::Flush]);
        all.push(vec![*size, Shape::WriteStable, Shape::Grow]);
    }
    all.dedup();
    let request = |shape: &Shape| shape.at(image, HERE);
    all.iter().map(|shapes| Workload::new(shapes.iter().map(request))).collect()
}

/// Changes of the size that change more than the size, each alone or with one of the most telling
/// requests.
fn table_resizes(image: &Image, count: usize) -> Vec<Workload> {
    let mut all = Vec::new();
    let far = (image.cluster < CLUSTER && count == 1).then_some(Shape::GrowFar);
    for size in [Shape::Grow, Shape::GrowTable, Shape::Shrink].into_iter().chain(far) {
        let others = [Shape::WriteHead, Shape::WriteGrown, Shape::ZeroWhole, Shape::Flush, size];
        match count {
            1 => all.push(vec![size]),
            _ => {
                all.extend(others.map(|other| vec![size, other]));
                all.extend(others.map(|other| vec![other, size]));
            }
        }
    }
    all.dedup();
    let request = |shape: &Shape| shape.at(image, HERE);
    all.iter().map(|shapes| Workload::new(shapes.iter().map(request))).collect()
}

/// All workloads of `ops` requests on images of a format, with at most `faults` faults.
pub fn scopes(format: Format, ops: usize, faults: u8) -> Vec<Scope> {
    let budget = Budget { faults, ticks: 1, stalls: faults > 0, ..QUIET };
    scopes_with(format, ops, budget)
}

/// As [`scopes`], with a budget.
pub fn scopes_with(format: Format, ops: usize, budget: Budget) -> Vec<Scope> {
    let shapes: &[Shape] = if ops < 3 { &Shape::ALL } else { &Shape::CORE };
    scopes_on(subjects::of(format).images(), budget, |image| workloads(image, shapes, ops))
}

pub(crate) fn scopes_on(
    images: impl IntoIterator<Item = Image>,
    budget: Budget,
    workloads: impl Fn(&Image) -> Vec<Workload>,
) -> Vec<Scope> {
    let scope = |image| Scope { image, budget, workloads: workloads(&image) };
    let scopes = images.into_iter().map(scope);
    scopes.filter(|scope| !scope.workloads.is_empty()).collect()
}

/// The gate's scopes: single requests with a fault and a deadline, pairs with either, triples of
/// the most telling requests with neither. Exceptions:
///
/// - Images of which each request does the same to several files at once, or that differ only in
///   how they grow, or that copy whole tables, see single requests and the most telling pairs.
/// - Of a qcow2 disk with a snapshot, changes of the size and the most telling pairs are seen without
///   a fault, and a few pairs with one.
/// - Changes of a qcow2 disk's size that change its tables are seen alone with a fault, and with one
///   of the most telling requests without.
/// - qcow2 knows no deadlines, and leaves more in flight than there is time for: of pairs with a
///   fault it sees the most telling, and all of them where little is allocated or clusters are
///   small.
///
/// Then devices; what lasts: drains that may fail, devices that break for good; two disks in one
/// engine, and copies between them; a filter over a disk.
pub fn gate_scopes() -> Vec<Scope> {
    Format::ALL.into_iter().flat_map(gate_scopes_of).collect()
}

/// As [`gate_scopes`], of one format.
pub fn gate_scopes_of(format: Format) -> Vec<Scope> {
    let fault = Budget { faults: 1, ..QUIET };
    let ticks = Budget { ticks: 1, ..QUIET };
    let both = Budget { faults: 1, ticks: 1, ..QUIET };
    let is_shared = |image: &Image| image.state == State::Shared;
    let is_large = |image: &Image| image.layout == Layout::Split || is_shared(image);
    let (large, small): (Vec<Image>, Vec<Image>) =
        subjects::of(format).images().into_iter().partition(is_large);
    let small = || small.iter().copied();
    let others = || large.iter().copied().chain(subjects::of(format).growing_images());
    let kinds = || small().chain(others());
    let long = || subjects::of(format).long_images();
    let count = |ops: usize| {
        let shapes: &[Shape] = if ops < 3 { &Shape::ALL } else { &Shape::CORE };
        move |image: &Image| workloads(image, shapes, ops)
    };
    let core = |image: &Image| workloads(image, &Shape::CORE, 2);
    let of_all = [
        scopes_on(kinds(), Budget { stalls: true, ..both }, count(1)),
        scopes_on(kinds().filter(|image| !is_shared(image)), fault, resizes),
        scopes_on(kinds().filter(is_shared), QUIET, resizes),
        scopes_on(kinds(), Budget { crashes: 1, ..QUIET }, core),
        scopes_on(small(), fault, statuses),
        scopes_on(others().filter(|image| !is_shared(image)), fault, core),
        scopes_on(others().filter(is_shared), QUIET, core),
        scopes_on(others().filter(is_shared), fault, |image| workloads(image, &Shape::FEW, 2)),
        scopes_on(small(), QUIET, count(3)),
    ];
    // Clusters that deflate to less; and some, of 512 bytes, that do not.
    let is_packing = |image: &Image| !image.backing && image.align < 4096;
    let packing = || small().filter(is_packing);
    let is_quick = |image: &Image| image.cluster < CLUSTER || image.state == State::Warm;
    let pairs = match format {
        Format::Qcow2 => vec![
            scopes_on(small().filter(is_quick), fault, count(2)),
            scopes_on(small().filter(|image| !is_quick(image)), fault, core),
            scopes_on(small().filter(is_quick), ticks, core),
            scopes_on(small().filter(|image| !is_quick(image)), QUIET, count(2)),
            scopes_on(small().chain(long()), fault, |image| table_resizes(image, 1)),
            scopes_on(small().chain(long()), QUIET, |image| table_resizes(image, 2)),
            scopes_on(packing(), fault, compressed),
            scopes_on(packing(), QUIET, compressed_rows),
            scopes_on(packing().take(1), Budget { crashes: 1, ..QUIET }, compressed_rows),
        ],
        _ => vec![
            scopes_on(small().take(1), both, core),
            scopes_on(others(), ticks, core),
            scopes_on(small(), ticks, count(2)),
            scopes_on(small(), fault, count(2)),
        ],
    };
    let slow = |image: &Image| Image { slow: true, ..*image };
    let turns = scopes_on(small().take(2).map(|image| slow(&image)), QUIET, core);
    let more = [
        turns,
        subjects::of(format).device_scopes(),
        subjects::of(format).own_scopes(),
        lasting_scopes(format),
        scopes_beside(format),
    ];
    let more =
        more.into_iter().chain([copy_scopes(format), filter_scopes(format), damage_scopes(format)]);
    of_all.into_iter().chain(pairs).chain(more).flatten().collect()
}

/// Use after a drain that may have failed, devices that break for good or are mended, and one
/// session after the other: single requests, and of two images the most telling pairs.
fn lasting_scopes(format: Format) -> Vec<Scope> {
    let plain = Image { ahead: 2, frees: 1, ..Image::new(format) };
    let warm = Image { state: State::Warm, ..plain };
    let drains = Budget { faults: 1, drains: 1, ..QUIET };
    let breaks = Budget { faults: 1, breaks: true, ..QUIET };
    let mends = Budget { mends: true, ..breaks };
    let sessions = Budget { drains: 2, reopens: true, ..QUIET };
    let single = |image: &Image| workloads(image, &Shape::ALL, 1);
    let again = |image: &Image| {
        let at = |table, cluster| image.place(table, cluster);
        let write = Request::write(at(0, 0), image.cluster());
        let head = Request::write(at(0, 2), 1024);
        let discard = Request::discard(at(0, 0), image.cluster());
        vec![
            Workload::new([write, head]),
            Workload::new([discard, head]),
            Workload::new([write, Request::read(at(0, 0), image.cluster())]),
        ]
    };
    // What one session gives up is what the next needs.
    let turns = |image: &Image| {
        let at = |table, cluster| image.place(table, cluster);
        let discard = Request::discard(at(0, 0), 2 * image.cluster());
        let writes = [2, 3].map(|cluster| Request::write(at(0, cluster), 1024));
        vec![Workload::new([discard, writes[0], writes[1]]), Workload::new(writes)]
    };
    let images = if format == Format::Raw { vec![plain] } else { vec![plain, warm] };
    // What is given up keeps its bytes; there are holes, and fewer or more clusters counted ahead.
    let kept = subjects::of(format).kept_images(plain);
    [
        scopes_on(images.iter().copied(), breaks, single),
        scopes_on(images.iter().copied(), mends, again),
        scopes_on(images.iter().copied(), drains, again),
        scopes_on(kept.iter().copied(), drains, again),
        scopes_on(images.iter().chain(&kept).copied(), sessions, turns),
    ]
    .concat()
}

/// Two disks in one engine: what happens to one does not happen to the other.
fn scopes_beside(format: Format) -> Vec<Scope> {
    let image =
        Image { beside: Some(subjects::of(format).beside()), ahead: 2, ..Image::new(format) };
    let breaks = Budget { faults: 1, breaks: true, ..QUIET };
    let few = |image: &Image| {
        let write = Request::write(image.place(0, 0), 1024);
        vec![Workload::new([write]), Workload::new([Request::write_fua(image.place(0, 0), 1024)])]
    };
    let closes = Budget { faults: 1, closes: 1, ..QUIET };
    let pauses = Budget { pauses: 1, ..closes };
    let closes_twice = Budget { closes: 2, ..QUIET };
    let pairs = |image: &Image| {
        let at = |table, cluster| image.place(table, cluster);
        let head = Request::write(at(0, 0), 1024);
        let discard = Request::discard(at(0, 0), image.cluster());
        vec![
            Workload::new([head, Request::write(at(1, 0), 1024)]),
            Workload::new([head, Request::read(at(0, 0), image.cluster())]),
            Workload::new([discard, Request::zero(at(0, 0), image.cluster())]),
            Workload::new([head, Request::flush()]),
        ]
    };
    // What is given up, and what comes after it in the same place.
    let again = |image: &Image| {
        let at = |table, cluster| image.place(table, cluster);
        let head = Request::write(at(0, 0), 1024);
        let part = Request::write(at(0, 0) + 512, 1024);
        vec![
            Workload::new([head, part]),
            Workload::new([head, Request::discard(at(0, 0), image.cluster())]),
            Workload::new([Request::zero(at(0, 0), image.cluster()), part]),
            Workload::new([head, Request::read(at(0, 0), image.cluster())]),
            Workload::new([head, Request::flush()]),
        ]
    };
    let shared = match format {
        Format::Qed | Format::Qcow2 => vec![Image { backing: true, shares: true, ..image }],
        _ => Vec::new(),
    };
    let shared = shared.into_iter().map(|image| Image { beside: Some(format), ..image });
    let alone = Image { beside: None, ..image };
    let warm = Image { state: State::Warm, ..alone };
    // Where both go on for long the one beside is raw: whatever it is, it is only to go on.
    let simple = Image { beside: Some(Format::Raw), ..image };
    let lives = if format == Format::Raw { vec![alone] } else { vec![alone, warm] };
    [
        scopes_on([image], breaks, few),
        scopes_on([image], closes, few),
        scopes_on([image], pauses, few),
        scopes_on([simple], closes_twice, pairs),
        scopes_on([simple], Budget { pauses: 1, quota: true, ..QUIET }, pairs),
        scopes_on(lives.iter().copied(), Budget { abandons: 1, ..QUIET }, again),
        scopes_on(lives, Budget { pauses: 1, ..closes }, pairs),
        scopes_on(shared, Budget { closes: 1, ..QUIET }, few),
    ]
    .concat()
}

/// A copy from the disk to the one beside it, or from there: of two clusters and a part of a third, in
/// three pieces, while guests use both.
pub fn copy_scopes(format: Format) -> Vec<Scope> {
    let size = 2 * CLUSTER + 1536;
    let image = Image { size: Some(size), ahead: 2, ..Image::new(format) };
    let noise = Image { beside: Some(Format::Raw), ..image };
    // Zeros, but for what its guest writes.
    let empty = Image { beside: Some(Format::Qcow2), ..image };
    // What is behind the end of the source becomes zeros.
    let short = Image { beside_size: Some(CLUSTER + 512), ..noise };
    let (copy_in, copy_out) = (CopyPlan::new(Way::In), CopyPlan::new(Way::Out));
    let budget = |copy: CopyPlan, faults: u8| Budget { copy: Some(copy), faults, ..QUIET };
    let stops = |copy: CopyPlan| CopyPlan { pauses: 1, cancels: true, drains: true, ..copy };
    let used = |copy: CopyPlan| CopyPlan { beside: true, ..copy };
    let is_zero = |copy: CopyPlan| CopyPlan { target_is_zero: true, ..copy };
    let of_start = |copy: CopyPlan| CopyPlan { of_start: true, ..copy };
    let gives_up = |copy: CopyPlan| CopyPlan { gives_up: true, ..of_start(copy) };
    let mirror = CopyPlan { mirrors: true, ..copy_out };
    let wide = |copy: CopyPlan| CopyPlan { wide: true, ..copy };
    let resumed = |copy: CopyPlan| CopyPlan { stops: true, ..copy };
    let shown = |copy: CopyPlan| CopyPlan { shown: true, ..copy };
    let offloaded = |copy: CopyPlan| CopyPlan { offload: true, ..copy };
    let pair = |_: &Image| {
        let pair = [Request::write(CLUSTER, 1024), Request::write(CLUSTER + 512, 1024)];
        let flushed = [Request::write(0, 1024), Request::flush()];
        [pair, flushed].map(Workload::new).to_vec()
    };
    // In two pieces, and then in one of those again.
    let two = |_: &Image| {
        let write = Request::write(CLUSTER + 512, 2 * CLUSTER - 1024);
        let of_both = Workload::new([Request::write(512, CLUSTER), Request::discard(0, CLUSTER)]);
        vec![of_both, Workload::new([write])]
    };
    // Nobody's when the copy has just begun.
    let last = |_: &Image| vec![Workload::new([Request::write(2 * CLUSTER + 512, 1024)])];
    let none = |_: &Image| vec![Workload::default()];
    // What is old, and what is new in the same place.
    let over = |_: &Image| {
        vec![Workload::new([Request::write(3072, CLUSTER), Request::write(CLUSTER, 512)])]
    };
    // A part of a cluster, of which only some disks can give back anything.
    let cut = |_: &Image| vec![Workload::new([Request::discard(512, 512)])];
    let few = |_: &Image| vec![Workload::new([Request::write(CLUSTER, 1024)])];
    let one = |_: &Image| {
        let (zero, discard) = (Request::zero(0, CLUSTER), Request::discard(0, CLUSTER));
        let write = Request::write(CLUSTER, 1024);
        [write, zero, discard].map(|request| Workload::new([request])).to_vec()
    };
    if format == Format::Raw {
        return [
            scopes_on([noise, short], budget(copy_in, 1), none),
            scopes_on([noise], budget(used(copy_in), 0), one),
            scopes_on([noise], budget(stops(copy_in), 1), few),
            scopes_on([empty], budget(used(copy_in), 0), none),
            scopes_on([noise], budget(copy_out, 1), none),
            scopes_on([noise], budget(used(copy_out), 0), one),
            scopes_on([noise, short], budget(shown(copy_in), 1), none),
            scopes_on([noise], budget(stops(shown(copy_in)), 0), few),
            scopes_on([noise, short], budget(offloaded(copy_in), 1), none),
            scopes_on([noise], budget(stops(offloaded(copy_in)), 0), few),
            scopes_on([noise], budget(used(offloaded(copy_out)), 0), one),
            scopes_on([noise], budget(offloaded(of_start(copy_out)), 0), one),
            scopes_on([noise], budget(offloaded(mirror), 0), few),
            scopes_on([noise], budget(of_start(copy_out), 1), one),
            scopes_on([noise], budget(of_start(copy_out), 0), two),
            scopes_on([noise], budget(stops(of_start(copy_out)), 0), last),
            scopes_on([noise], Budget { ticks: 1, ..budget(gives_up(copy_out), 0) }, last),
            scopes_on([noise], budget(used(of_start(copy_in)), 0), none),
            scopes_on([noise], budget(mirror, 1), few),
            scopes_on([noise], budget(mirror, 0), pair),
            scopes_on([noise], budget(stops(mirror), 0), few),
            scopes_on([noise], Budget { abandons: 1, ..budget(wide(mirror), 0) }, over),
            scopes_on([noise], budget(resumed(copy_in), 1), none),
            scopes_on([noise], budget(resumed(of_start(copy_out)), 1), one),
            scopes_on([noise], budget(resumed(mirror), 1), few),
        ]
        .concat();
    }
    let warm = Image { state: State::Warm, ..noise };
    let mut all = vec![
        scopes_on([noise, short, warm], budget(copy_in, 1), none),
        scopes_on([noise], budget(used(copy_in), 0), none),
        scopes_on([noise, warm], budget(copy_in, 0), one),
        scopes_on([empty], budget(used(is_zero(copy_in)), 0), none),
        scopes_on([noise, warm], budget(stops(copy_in), 0), none),
        scopes_on([warm], budget(copy_out, 1), one),
        scopes_on([warm], budget(stops(copy_out), 1), none),
        scopes_on([warm], budget(of_start(copy_out), 0), one),
        scopes_on([empty], budget(of_start(is_zero(copy_out)), 0), last),
        scopes_on([warm], budget(mirror, 0), one),
        scopes_on([empty], budget(mirror, 0), few),
        scopes_on([noise], budget(CopyPlan { drains: true, ..wide(mirror) }, 0), cut),
        scopes_on([empty], budget(wide(mirror), 0), pair),
        scopes_on([empty], budget(wide(of_start(copy_out)), 0), pair),
        scopes_on([noise, warm], budget(wide(copy_out), 1), none),
        scopes_on([noise], budget(wide(of_start(copy_out)), 0), few),
    ];
    if format != Format::Vdi {
        let pulled = Image { backing: true, ..image };
        let (up, zeros) = (CopyPlan::new(Way::Up), Image { state: State::Zeros, ..pulled });
        let warm = Image { state: State::Warm, ..pulled };
        all.push(scopes_on([pulled, zeros], budget(up, 1), none));
        all.push(scopes_on([warm], budget(up, 0), few));
        all.push(scopes_on([pulled], budget(stops(up), 0), none));
        if format == Format::Qed {
            // What a driver does is nothing to the job: the orders of its own are tried here.
            all.push(scopes_on([pulled, warm], budget(up, 0), one));
            all.push(scopes_on([pulled], budget(stops(up), 0), few));
            all.push(scopes_on([pulled], budget(resumed(up), 1), few));
        }
    }
    if matches!(format, Format::Qed | Format::Qcow2) {
        let overlay = Image { backing: true, ..noise };
        all.push(scopes_on([overlay], budget(copy_in, 0), none));
        all.push(scopes_on([overlay], budget(copy_out, 0), few));
        all.push(scopes_on([overlay], budget(of_start(copy_out), 0), last));
        // Where the backing file ends within a piece, zeros follow: as far as they are there still.
        all.push(scopes_on([overlay], budget(mirror, 0), last));
    }
    all.concat()
}

/// A filter over the disk, which passes on what comes, in pieces where that is long, in an engine that
/// has as little of everything as may be: it does not starve what is below it, errors come up, and it
/// is closed and paused with all that it has passed on.
pub fn filter_scopes(format: Format) -> Vec<Scope> {
    let image = Image { filter: true, ahead: 2, buffers: 2, ..Image::new(format) };
    let overlay = Image { backing: true, ..image };
    let images = match format {
        Format::Qed | Format::Qcow2 => vec![image, overlay],
        _ => vec![image],
    };
    let fault = Budget { faults: 1, ..QUIET };
    let lives = Budget { closes: 1, pauses: 1, ..QUIET };
    let few = |image: &Image| {
        let whole = Request::write(image.place(0, 0), image.cluster());
        let part = Request::write(image.place(0, 0) + 300, 2048);
        let zero = Request::zero(image.place(0, 0), image.cluster());
        let read = Request::read(image.place(0, 0), image.cluster());
        vec![
            Workload::new([whole]),
            Workload::new([part, Request::flush()]),
            Workload::new([zero, Request::status(0, image.cluster())]),
            Workload::new([part, read]),
        ]
    };
    let single = |image: &Image| workloads(image, &Shape::ALL, 1);
    [
        scopes_on(images.iter().copied(), fault, single),
        scopes_on(images.iter().copied(), QUIET, few),
        scopes_on(images.iter().copied(), lives, single),
    ]
    .concat()
}

/// Writes that are lost or go astray, and bits of tables that change: somebody notices, if anybody can.
/// Single requests with either, and the most telling pairs with a write that is lost.
pub fn damage_scopes(format: Format) -> Vec<Scope> {
    let lost = Budget { lost_writes: 1, ..QUIET };
    let rots = Budget { bit_rots: 1, ..QUIET };
    let images = || {
        // Holes of VDI are leaks, which are not counted where they are wanted. A split image's tables are
        // smaller than a sector: what is behind them in it nobody reads, and a directory that leads to
        // a grain of zeros leads to a table in which nothing is.
        let is_fit = |image: &Image| match format {
            Format::Vdi => image.state != State::Holes,
            Format::Vmdk => image.layout != Layout::Split,
            _ => true,
        };
        subjects::of(format)
            .images()
            .into_iter()
            .filter(is_fit)
            .map(|image| Image { ahead: 2, ..image })
    };
    let single = |image: &Image| workloads(image, &Shape::ALL, 1);
    let pairs = |image: &Image| workloads(image, &Shape::CORE, 2);
    let few = |image: &Image| {
        let at = |table, cluster| image.place(table, cluster);
        vec![
            Workload::new([Request::write(at(0, 2), 1024)]),
            Workload::new([Request::read(at(0, 0), 1024)]),
            Workload::new([Request::zero(at(0, 1), image.cluster())]),
        ]
    };
    [
        scopes_on(images(), lost, single),
        scopes_on(images().skip(1).take(1), lost, pairs),
        scopes_on(images(), rots, few),
    ]
    .concat()
}

/// Runs the gate.
pub fn gate(threads: usize) -> Report {
    explore(&gate_scopes(), threads, None)
}

/// What a run came to. Prints as a few lines, or as JSON.
#[derive(Clone, Debug)]
pub struct Report<S: Subject = Image> {
    /// What was run.
    pub title: String,
    /// How much was done.
    pub counts: Counts,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// By how many threads.
    pub threads: usize,
    /// False: time ran out first.
    pub complete: bool,
    /// What failed, as traces; no more than [`FAILURES_MAX`].
    pub failures: Vec<Trace<S>>,
    /// Scopes, with what was done in each.
    pub scopes: Vec<Done>,
}

/// What was done in a scope. Prints as a line.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// The scope.
    pub name: String,
    /// How much.
    pub counts: Counts,
    /// How long it took, in seconds of one thread.
    pub seconds: f64,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { runs, states, crash_images, .. } = self.counts;
        write!(f, "{:7.1} s {runs:6} workloads {states:9} states ", self.seconds)?;
        write!(f, "{crash_images:9} crash images: {}", self.name)
    }
}

/// After so many failures a run stops.
pub const FAILURES_MAX: usize = 8;

impl<S: Subject> Default for Report<S> {
    fn default() -> Self {
        Report {
            title: String::new(),
            counts: Counts::default(),
            seconds: 0.0,
            threads: 0,
            complete: false,
            failures: Vec::new(),
            scopes: Vec::new(),
        }
    }
}

impl<S: Subject> Report<S> {
    /// Did everything hold?
    pub fn is_good(&self) -> bool {
        self.failures.is_empty()
    }

    /// As one JSON object.
    pub fn to_json(&self) -> String {
        let Counts { runs, states, transitions, schedules, .. } = self.counts;
        let Counts { crash_states, crash_images, crash_images_distinct, .. } = self.counts;
        let verdicts: Vec<String> = self
            .failures
            .iter()
            .map(|trace| quoted(trace.verdict.as_deref().unwrap_or_default()))
            .collect();
        format!(
            "{{\"title\":{},\"good\":{},\"complete\":{},\"threads\":{},\"seconds\":{:.3},\
             \"runs\":{runs},\"states\":{states},\"transitions\":{transitions},\
             \"schedules\":{schedules:.0},\"crash_states\":{crash_states},\
             \"crash_images\":{crash_images},\
             \"crash_images_distinct\":{crash_images_distinct},\"failures\":[{}]}}",
            quoted(&self.title),
            self.is_good(),
            self.complete,
            self.threads,
            self.seconds,
            verdicts.join(",")
        )
    }
}

/// A string in JSON.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out + "\""
}

impl<S: Subject> fmt::Display for Report<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { counts, seconds, threads, .. } = self;
        let cpu = seconds * *threads as f64;
        let rate = |n: u64| n as f64 / cpu.max(1e-9);
        writeln!(
            f,
            "{}: {} workloads in {seconds:.1} s on {threads} threads",
            self.title, counts.runs
        )?;
        writeln!(
            f,
            "  {} states, {} transitions ({:.0} a second and thread), {:.3e} schedules",
            counts.states,
            counts.transitions,
            rate(counts.transitions),
            counts.schedules
        )?;
        writeln!(
            f,
            "  {} crash states, {} crash images ({:.0} a second and thread), {} opened and checked",
            counts.crash_states,
            counts.crash_images,
            rate(counts.crash_images),
            counts.crash_images_distinct
        )?;
        if !self.complete {
            writeln!(f, "  stopped before the end")?;
        }
        for trace in &self.failures {
            writeln!(f, "FAILED: {}", trace.verdict.as_deref().unwrap_or_default())?;
            writeln!(f, "{}", trace.shown())?;
        }
        write!(f, "  {}", if self.is_good() { "no failure" } else { "FAILURES" })
    }
}

/// Explores scopes, on `threads` threads, for at most `seconds`.
pub fn explore(scopes: &[Scope], threads: usize, seconds: Option<f64>) -> Report {
    let watch = Stopwatch::start();
    let items: Vec<(usize, usize)> = scopes
        .iter()
        .enumerate()
        .flat_map(|(scope, of)| (0..of.workloads.len()).map(move |workload| (scope, workload)))
        .collect();
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let per_scope = Mutex::new(vec![(Counts::default(), 0.0); scopes.len()]);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|threads_of| {
        for _ in 0..threads {
            threads_of.spawn(|| {
                let mut base: Option<(usize, Base<Image>)> = None;
                while !stopped.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&(scope, workload)) = items.get(at) else { return };
                    if seconds.is_some_and(|limit| watch.seconds() > limit) {
                        stopped.store(true, Ordering::Relaxed);
                        return;
                    }
                    let of = &scopes[scope];
                    if base.as_ref().is_none_or(|(which, _)| *which != scope) {
                        let made = Base::new(of.image, of.most_requests())
                            .expect("the gate's images can be made");
                        base = Some((scope, made));
                    }
                    let (_, base) = base.as_ref().expect("just made");
                    let begun = watch.seconds();
                    let explored = explore_one(base, of, workload);
                    lock(&per_scope)[scope].1 += watch.seconds() - begun;
                    match explored {
                        Ok(counts) => lock(&per_scope)[scope].0 += counts,
                        Err(trace) => {
                            let mut failures = lock(&failures);
                            failures.push(*trace);
                            if failures.len() >= FAILURES_MAX {
                                stopped.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                }
            });
        }
    });
    let per_scope = lock(&per_scope).clone();
    let mut counts = Counts::default();
    per_scope.iter().for_each(|(scope, _)| counts += *scope);
    let done = scopes.iter().zip(per_scope).map(|(scope, (counts, seconds))| {
        let requests = scope.workloads.first().map_or(0, |workload| workload.requests.len());
        let Budget { faults, ticks, crashes, drains, breaks, mends, reopens, .. } = scope.budget;
        let drains = if drains > 0 { format!(", {drains} drains") } else { String::new() };
        let Budget { closes, pauses, quota, abandons, lost_writes, bit_rots, .. } = scope.budget;
        let words = [
            (", opened again", reopens),
            (", breaks", breaks),
            (", is mended", mends),
            (", closed", closes > 0),
            (", paused", pauses > 0),
            (", one at a time", quota),
            (", given up", abandons > 0),
            (", writes lost", lost_writes > 0),
            (", bits rot", bit_rots > 0),
            (", copied", scope.budget.copy.is_some()),
        ];
        let more: String = words.iter().filter(|(_, is)| *is).map(|(word, _)| *word).collect();
        let name = format!(
            "{requests} requests, {faults} faults, {ticks} deadlines, {crashes} crashes{drains}{more}: {}",
            scope.image
        );
        Done { name, counts, seconds }
    });
    Report {
        title: "explored".into(),
        counts,
        seconds: watch.seconds(),
        threads,
        complete: !stopped.into_inner(),
        failures: lock(&failures).clone(),
        scopes: done.collect(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics while holding it")
}

fn explore_one(base: &Base<Image>, scope: &Scope, workload: usize) -> Result<Counts, Box<Trace>> {
    let workload = &scope.workloads[workload];
    let world = base.world(workload, scope.budget);
    exhaust(&world, Limit::default())
        .map_err(|failure| Box::new(Trace::of(scope.image, scope.budget, workload, &failure)))
}
