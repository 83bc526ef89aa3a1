//! qcow2 images made small.

use std::ops::Range;
use std::path::Path;

use cowbell_formats::parts::growth::Grow;
use cowbell_formats::qcow2::disk::layout::L1Entry;
use cowbell_formats::qcow2::rest::open::{Access, open, read_words};
use cowbell_formats::qcow2::rest::snapshots::{self, Moment};
use cowbell_formats::{CreateOptions, Format, Host};

use super::{
    CLUSTER, FormatSubject, Image, Medium, ROOMY, State, TOP, images_with_backing, scope_of,
};
use crate::backend::IsMetadata;
use crate::disk::{Contents, Sector};
use crate::gate::{Scope, Shape, scopes_on, workloads};
use crate::host::{SimFile, SimHost};
use crate::subject::Subject;
use crate::workload::{Request, Workload};
use crate::world::{Budget, CopyPlan, QUIET, Way};

/// Clusters that [`State::Warm`] adds to a qcow2 image: data and tables.
const FULL: u64 = 5;

/// See the module.
pub struct Qcow2;

impl FormatSubject for Qcow2 {
    fn span(&self, image: &Image) -> u64 {
        image.cluster * image.cluster / 8
    }

    fn make(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        let options = CreateOptions {
            compat: image.old.then(|| "v2".into()),
            refcount_bits: (image.cluster < CLUSTER).then_some(64),
            ..CreateOptions::default()
        };
        image.create(host, options)
    }

    fn filled(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        if image.state != State::Shared {
            return Ok(());
        }
        take_snapshot(&host.open(Path::new(TOP), true).map_err(|why| why.to_string())?)
    }

    fn holes(&self, image: &Image, file: &Contents) -> Option<u64> {
        // Refcounts that want clusters of their own are not counted.
        (image.cluster >= CLUSTER).then(|| holes(file))
    }

    fn header_len(&self, image: &Image) -> u64 {
        image.cluster
    }

    fn only_in_header(&self) -> &'static [Range<usize>] {
        &[8..20, 24..32]
    }

    fn references(&self, image: &Image, _: u64, sector: &Sector) -> Vec<u64> {
        // Bit 0 says that a cluster is zeros, which no other place says.
        let told = if image.old { u64::MAX } else { !1 };
        let words =
            sector.bytes().as_chunks().0.iter().map(|word| u64::from_be_bytes(*word) & told);
        words.filter(|&word| word != 0).collect()
    }

    fn metadata(&self) -> Option<IsMetadata> {
        Some(is_metadata)
    }

    fn resizes(&self) -> &'static [Shape] {
        &[Shape::Grow]
    }

    fn images(&self) -> Vec<Image> {
        let plain = Image { ahead: 8, ..Image::new(Format::Qcow2) };
        let mut images = images_with_backing(plain);
        images.extend([
            Image { state: State::Shared, ..plain },
            Image { state: State::Holes, ..plain },
            // A refcount block counts 64 clusters: the first allocation makes another.
            Image { cluster: 512, ahead: 64, ..plain },
        ]);
        images
    }

    fn long_images(&self) -> Vec<Image> {
        let long = Image { backing: true, long: true, ahead: 8, ..Image::new(Format::Qcow2) };
        vec![long, Image { old: true, ..long }]
    }

    fn kept_images(&self, plain: Image) -> Vec<Image> {
        // What is given up keeps its bytes; there are holes, and fewer or more clusters counted ahead.
        vec![
            Image { pass_discards: false, state: State::Warm, ..plain },
            Image { state: State::Holes, ..plain },
            Image { state: State::Holes, ahead: 8, ..plain },
        ]
    }

    fn device_scopes(&self) -> Vec<Scope> {
        let image = Image::new(Format::Qcow2);
        let fault = Budget { faults: 1, ..QUIET };
        let single = |image: &Image| workloads(image, &Shape::ALL, 1);
        let core = |image: &Image| workloads(image, &Shape::CORE, 2);
        let roomy = Image { medium: Medium::Device(ROOMY), frees: 1, ahead: 2, ..image };
        let warm = Image { state: State::Warm, ..roomy };
        let full = Image { medium: Medium::Device(FULL), ahead: 1, ..warm };
        let room = |image: &Image| {
            let at = |table, cluster| image.place(table, cluster);
            let (discard, zero) = (Request::discard(0, CLUSTER), Request::zero(0, CLUSTER));
            let write = Request::write(at(0, 2), 1024);
            let read = Request::read(at(0, 2), CLUSTER);
            vec![
                Workload::new([discard, write]),
                Workload::new([discard, Request::flush(), write]),
                Workload::new([zero, write, read]),
            ]
        };
        [
            scopes_on([roomy, warm], fault, single),
            scopes_on([warm], fault, core),
            scopes_on([full], QUIET, room),
        ]
        .concat()
    }

    fn special(&self) -> Vec<Scope> {
        special()
    }
}

/// What is written back, given up and used again.
fn special() -> Vec<Scope> {
    let image = Image { ahead: 8, ..Image::new(Format::Qcow2) };
    let overlay = Image { backing: true, ..image };
    let long = Image { long: true, ..overlay };
    let zeros = Image { state: State::Zeros, ..overlay };
    let warm = Image { state: State::Warm, ..image };
    // So little in reserve that what is given up is used again at once.
    let tight = Image { ahead: 1, ..warm };
    // New clusters are used ones; tables too.
    let holes = Image { state: State::Holes, ..image };
    let shared = Image { state: State::Shared, ..image };
    // A refcount block counts 64 clusters.
    let small = Image { cluster: 512, ahead: 64, ..image };
    let device = Image { medium: Medium::Device(8), ..warm };
    // What fills the image fills the device.
    let full = Image { medium: Medium::Device(FULL), ahead: 1, ..warm };
    let kept = Image { pass_discards: false, ..warm };
    // More is counted ahead than there are holes.
    let many_holes = Image { ahead: 8, ..holes };
    let few = Image { frees: 1, ..warm };
    // Mirrored to a new disk, and zeroed meanwhile.
    let mirrored = Image { size: Some(2 * CLUSTER), beside: Some(Format::Qcow2), ahead: 2, ..warm };
    let mirror = CopyPlan { mirrors: true, target_is_zero: true, ..CopyPlan::new(Way::Out) };
    let at = |table, cluster| image.place(table, cluster);
    let head = |table, cluster| Request::write(at(table, cluster), 1024);
    let middle = |table, cluster| Request::write(at(table, cluster) + 1024, 1024);
    let whole = |table, cluster| Request::write(at(table, cluster), 4096);
    let discard = |table, cluster| Request::discard(at(table, cluster), 4096);
    let discards = |table, cluster| Request::discard(at(table, cluster), 8192);
    let packed = |table, cluster| Request::write_compressed(at(table, cluster), 4096);
    let flush = Request::flush();
    let scope =
        |image: Image, faults: u8, requests: &[Request]| scope_of(image, faults, 0, requests);
    vec![
        Scope { budget: Budget { closes: 1, ..QUIET }, ..scope(image, 0, &[head(0, 0)]) },
        Scope {
            budget: Budget { pauses: 1, ..QUIET },
            ..scope(Image { filter: true, buffers: 2, ahead: 2, ..image }, 0, &[head(0, 0)])
        },
        Scope {
            budget: Budget { copy: Some(mirror), ..QUIET },
            ..scope(mirrored, 0, &[Request::zero(0, CLUSTER)])
        },
        scope(overlay, 0, &[middle(0, 0), flush]),
        scope(zeros, 0, &[middle(0, 0), flush]),
        scope(overlay, 0, &[head(0, 0), middle(0, 0)]),
        scope(image, 0, &[head(0, 0), flush]),
        scope(image, 0, &[whole(0, 0), Request::read(at(0, 0), 4096)]),
        scope(image, 1, &[head(0, 0), middle(0, 0)]),
        scope(overlay, 0, &[middle(0, 0), flush, head(0, 1), flush]),
        scope(overlay, 0, &[Request::read(at(1, 0), 4096)]),
        scope(image, 0, &[head(0, 1), Request::status(at(0, 0), 8192)]),
        scope(warm, 0, &[Request::write(at(0, 2) - 1024, 2048), Request::read(at(0, 1), 8192)]),
        scope(image, 0, &[head(0, 0), Request::zero(at(0, 0), 4096)]),
        scope(warm, 1, &[head(0, 2), flush, flush]),
        scope(tight, 0, &[discard(0, 0), flush, whole(0, 2)]),
        scope(Image { frees: 1, ..tight }, 0, &[discard(0, 0), flush, whole(0, 2)]),
        scope(overlay, 0, &[middle(0, 0), Request::zero(at(0, 0), 4096)]),
        scope(shared, 0, &[head(0, 0), flush]),
        scope(shared, 1, &[head(0, 0), head(0, 1), flush]),
        scope(
            Image { ahead: 1, ..shared },
            0,
            &[middle(0, 0), flush, Request::write(at(0, 2), 8192)],
        ),
        scope(holes, 0, &[head(2, 0), flush]),
        scope(holes, 0, &[head(2, 0), head(2, 1)]),
        scope(long, 0, &[Request::truncate(image.size() + 8192)]),
        scope(warm, 0, &[Request::truncate(at(3, 1)), Request::read(at(0, 0), 512)]),
        scope(image, 0, &[Request::truncate(at(3, 1)), head(0, 0), flush]),
        scope(image, 1, &[Request::truncate(4608), whole(1, 0)]),
        scope(small, 0, &[Request::write(0, 20480), Request::write(20480, 10240), flush]),
        // A refcount block whose write failed, while another is added.
        scope(small, 1, &[Request::write(0, 28672)]),
        scope(device, 0, &[head(0, 2), Request::read(at(0, 2), 4096)]),
        scope(full, 0, &[discard(0, 0), whole(0, 2)]),
        scope(full, 0, &[discard(0, 0), flush, whole(0, 2)]),
        scope(Image { ahead: 2, ..holes }, 0, &[head(0, 2)]),
        scope(few, 1, &[discard(0, 0), discard(1, 0), discard(0, 1)]),
        Scope {
            budget: Budget { faults: 1, drains: 1, ..QUIET },
            ..scope(image, 0, &[whole(0, 0), discard(0, 0), head(0, 1)])
        },
        // What a drain could not cut off.
        Scope {
            budget: Budget { faults: 1, drains: 1, ..QUIET },
            ..scope(kept, 0, &[whole(0, 2), discard(0, 2), head(0, 3)])
        },
        // Sessions: what one gives up the next uses.
        Scope {
            budget: Budget { drains: 3, reopens: true, ..QUIET },
            ..scope(many_holes, 0, &[head(0, 2), head(0, 3)])
        },
        Scope {
            budget: Budget { drains: 1, ..QUIET },
            ..scope(Image { ahead: 2, ..kept }, 0, &[discards(0, 0), head(0, 2)])
        },
        scope(Image { ahead: 1, ..holes }, 0, &[head(0, 2), head(0, 3)]),
        // No space, and then space.
        Scope {
            budget: Budget { faults: 1, breaks: true, mends: true, ..QUIET },
            ..scope(tight, 0, &[head(0, 2), head(0, 3)])
        },
        scope(image, 0, &[packed(0, 0), Request::read(at(0, 0), 4096), flush]),
        scope(image, 0, &[packed(0, 0), flush, packed(0, 1), flush]),
        scope(image, 0, &[packed(0, 0), packed(0, 1), flush]),
        scope(image, 1, &[packed(0, 0), packed(0, 1), flush]),
        // Two compressed clusters in one, while the file cannot be made longer, or the header is in doubt.
        scope(
            Image { cluster: 512, ahead: 1, grow: Grow::Write, ..warm },
            1,
            &[Request::write_compressed(0, 1024)],
        ),
        scope(image, 1, &[Request::truncate(image.size() + 8192), packed(0, 0), packed(0, 1)]),
        scope(warm, 0, &[packed(0, 0), flush]),
        scope(tight, 0, &[packed(0, 2), discard(0, 2), flush, packed(0, 3), whole(0, 4)]),
        // A rewrite in place, a discard of the cluster, an allocation: whose is it?
        scope(tight, 0, &[whole(0, 0), discard(0, 0), flush, whole(0, 2)]),
    ]
}

/// A snapshot shares all that there is.
fn take_snapshot(file: &SimFile) -> Result<(), String> {
    let now = Moment { seconds: 0, nanos: 0 };
    snapshots::create(file, b"all", now).map(|_| ()).map_err(|why| why.to_string())
}

/// Does `start..end` of a qcow2 image touch its header or tables?
fn is_metadata(contents: &Contents, start: u64, end: u64) -> bool {
    let file = SimFile::new(contents.clone(), false);
    let Ok(image) = open(&file, Access::Read) else { return false };
    let header = &image.header;
    let entries = header.refcount_table_bytes() as usize / 8;
    let blocks = read_words(&file, header.refcount_table_offset, entries, "read the table");
    let geometry = header.geometry();
    let table = |&word: &u64| Some(L1Entry::decode(word, geometry).ok()??.table.0);
    let tables = image.l1.iter().filter_map(table).chain(blocks.unwrap_or_default());
    let fixed = [0, header.l1_offset, header.refcount_table_offset];
    let mut all = tables.filter(|&table| table != 0).chain(fixed);
    let size = header.cluster_size();
    all.any(|table| table < end && start < table.saturating_add(size))
}

/// Whole clusters of a qcow2 image that have a refcount of 0, as far as
/// refcount blocks count them.
fn holes(contents: &Contents) -> u64 {
    let file = SimFile::new(contents.clone(), false);
    let Ok(image) = open(&file, Access::Read) else { return 0 };
    let (geometry, cluster) = (image.geometry(), image.header.cluster_size());
    let per_block = 1 << geometry.block_bits();
    let clusters = contents.len() / cluster;
    let blocks = clusters.div_ceil(per_block) as usize;
    let table = read_words(&file, image.header.refcount_table_offset, blocks, "read the table");
    let mut holes = 0;
    let mut counts = vec![0; cluster as usize];
    for (i, block) in table.unwrap_or_default().into_iter().enumerate().filter(|(_, b)| *b != 0) {
        contents.read(block, &mut counts);
        let there = (clusters - i as u64 * per_block).min(per_block) as usize;
        holes += (0..there).filter(|&at| geometry.refcount(&counts, at) == 0).count() as u64;
    }
    holes
}
