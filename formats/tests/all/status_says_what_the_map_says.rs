//! What an engine says is where, asked at work, is what the map at rest says: of every format, through
//! chains, with snapshots, zero clusters, compressed clusters and backing files that are too short.
//! (That the map is QEMU's others test.)

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::drive::{folder, settle};
use crate::common::{DISK, have_qemu, ok};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::status::{Status, StatusKind};
use cowbell_engine::step::{Driver, Io};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, HostOffset, NodeId};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::LayerMeta;
use cowbell_formats::map::{self, Kind, extents};
use cowbell_formats::{
    Chain, CreateOptions, Format, Node, OpenOptions, Policy, RunOptions, attach, create, open,
};

/// A stretch of the disk: its first byte, and what is said of it.
type Said = (u64, Status);

fn chain(path: &Path) -> Chain<DiskFile> {
    let options = OpenOptions { backing: Policy::SameDirectory, ..OpenOptions::default() };
    open(&DISK, path, &options).expect("it opens")
}

/// What the map says, in the engine's words.
fn mapped(chain: &Chain<DiskFile>) -> Vec<Said> {
    // Files are attached from the lowest layer up.
    let files_of = |depth: usize| 1 + chain.layers[depth].more.len();
    let number = |depth: usize, file: usize| {
        (depth + 1..chain.layers.len()).map(files_of).sum::<usize>() + file
    };
    let all = extents(chain).map(|extent| {
        let e = extent.expect("sound tables");
        let meta = &chain.layers[e.depth].meta;
        let tells_holes = matches!(meta, LayerMeta::Qcow2(_) | LayerMeta::Raw { .. });
        let (kind, host) = match e.kind {
            Kind::Data(host) => (StatusKind::Data, Some(host)),
            Kind::Compressed => (StatusKind::Compressed, None),
            Kind::Zero(host) if host.is_none() || tells_holes => (StatusKind::Zero, host),
            // A hole of a file that a table leads to, which nobody looks for at work.
            Kind::Zero(host) => (StatusKind::Data, host),
            Kind::Unallocated => (StatusKind::Unallocated, None),
        };
        let host = host.map(|host| (FileId(number(e.depth, e.file) as u32), host));
        (e.start, Status { kind, len: e.len, depth: e.depth as u8, host })
    });
    joined(all)
}

/// Stretches of a kind, side by side on the disk and in a file, as one.
fn joined(all: impl IntoIterator<Item = Said>) -> Vec<Said> {
    let mut out: Vec<Said> = Vec::new();
    for (start, next) in all {
        if let Some((before, last)) = out.last_mut() {
            let follows = last.host.map(|(file, at)| (file, HostOffset(at.0 + last.len)));
            let goes_on = (last.kind, last.depth, follows) == (next.kind, next.depth, next.host);
            if goes_on && *before + last.len == start {
                last.len += next.len;
                continue;
            }
        }
        out.push((start, next));
    }
    out
}

struct Asked {
    engine: Engine<Node, Inline>,
    disk: NodeId,
    size: u64,
}

impl Asked {
    /// With so little memory for tables that they come and go.
    fn new(path: &Path) -> Asked {
        let limits = Limits { requests: 32, ..Limits::default() };
        let mut engine = Engine::new(Inline::new(), limits);
        let mut options = RunOptions::default();
        (options.qed.cache_slices, options.qcow2.cache_slices) = (8, 8);
        options.vmdk.cache_tables = 8;
        let disk = attach(&mut engine, chain(path), &options).expect("it attaches");
        let size = engine.node(disk).size();
        Asked { engine, disk, size }
    }

    /// Asks all at once.
    fn ask(&mut self, ranges: &[(u64, u64)]) -> Vec<Said> {
        for (tag, &(offset, len)) in ranges.iter().enumerate() {
            let mem = Buf::zeroed(Status::BYTES);
            self.engine.submit(self.disk, Io::status(offset, len), mem, tag as u64).expect("room");
        }
        let mut finished = settle(&mut self.engine);
        finished.sort_by_key(|done| done.tag);
        let said = finished.into_iter().map(|done| {
            let (offset, len) = ranges[done.tag as usize];
            assert_eq!(done.result, Ok(()), "{offset}+{len}");
            let answer = done.mem.into_buf().expect("as given");
            let status = Status::from_bytes(&answer).expect("an answer");
            assert!((1..=len).contains(&status.len), "{offset}+{len}: {status:?}");
            (offset, status)
        });
        said.collect()
    }

    fn whole(&mut self) -> Vec<Said> {
        let (mut all, mut at) = (Vec::new(), 0);
        while at < self.size {
            let said = self.ask(&[(at, self.size - at)]);
            at += said[0].1.len;
            all.extend(said);
        }
        joined(all)
    }
}

/// What `map` says of the byte `at` and those behind it, in this stretch.
fn said_at(map: &[Said], at: u64) -> Status {
    let index = map.partition_point(|(start, _)| *start <= at) - 1;
    let (start, status) = map[index];
    let inside = at - start;
    let host = status.host.map(|(file, host)| (file, HostOffset(host.0 + inside)));
    Status { len: status.len - inside, host, ..status }
}

fn compare(dir: &Path, name: &str, what: &str) {
    let path = dir.join(name);
    let map = mapped(&chain(&path));
    let mut asked = Asked::new(&path);
    assert_eq!(asked.whole(), map, "{what}");
    // From anywhere, many at once, the answer is the rest of such a stretch, or a part of it.
    let places: Vec<(u64, u64)> =
        (0..asked.size).step_by(77_777).map(|at| (at, (asked.size - at).min(150_001))).collect();
    for places in places.chunks(32) {
        for (at, status) in asked.ask(places) {
            let expected = said_at(&map, at);
            assert!(status.len <= expected.len, "{what}: at {at}: {status:?}, {expected:?}");
            assert_eq!(Status { len: status.len, ..expected }, status, "{what}: at {at}");
        }
    }
}

const WRITES: &str = "-c 'write -q -P 1 4095k 5k' -c 'write -q -P 2 0 100k' \
    -c 'write -q -z 64k 128k' -c 'write -q -P 3 512k 64k' -c 'write -q -P 4 576k 1100k' \
    -c 'write -q -P 5 3M 1k'";

/// Images to stand on: raw ones of 700 kB and of an odd length, and one of each other format.
fn bases(dir: &Path) {
    std::fs::write(dir.join("odd.raw"), [9; 700_001]).expect("written");
    ok(dir, "qemu-img create -q -f qcow2 -b odd.raw -F raw mid.qcow2 3M");
    ok(dir, "qemu-io -f qcow2 -c 'write -q -P 9 300k 10k' -c 'write -q -z 640k 64k' mid.qcow2");
    ok(dir, "qemu-img create -q -f qed -b mid.qcow2 -F qcow2 mid.qed 4M");
    ok(dir, "qemu-io -f qed -c 'write -q -P 8 1M 64k' -c 'write -q -z 2M 64k' mid.qed");
}

#[test]
fn of_qcow2_with_every_kind_of_cluster() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    bases(dir);
    for options in [
        "cluster_size=64k",
        "compat=v2,cluster_size=512",
        "cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "data_file=d.raw",
    ] {
        for backing in ["", "-b odd.raw -F raw", "-b mid.qed -F qed"] {
            let what = format!("{options} {backing}");
            let _ = std::fs::remove_file(dir.join("d.raw"));
            ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} {backing} a.qcow2 5M"));
            // A version 2 image cannot say that there are zeros over a backing file.
            let zeros = !options.contains("v2") || backing.is_empty();
            let writes =
                if zeros { WRITES.into() } else { WRITES.replace("write -q -z", "read -q") };
            ok(dir, &format!("qemu-io -f qcow2 {writes} a.qcow2"));
            if zeros {
                ok(dir, "qemu-io -f qcow2 -d unmap -c 'write -q -z -u 1M 200k' a.qcow2");
            }
            compare(dir, "a.qcow2", &what);
            if !options.contains("data_file") {
                ok(dir, "qemu-img snapshot -c one a.qcow2");
                ok(dir, "qemu-io -f qcow2 -c 'write -q -P 6 32k 700k' a.qcow2");
                compare(dir, "a.qcow2", &format!("{what}, a snapshot"));
            }
        }
    }
    let mut text = Vec::new();
    (0..200_000u64).for_each(|i| text.extend((i / 50).to_le_bytes()));
    std::fs::write(dir.join("in.raw"), text).expect("written");
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on"] {
        ok(dir, &format!("qemu-img convert -c -O qcow2 -o {options} in.raw c.qcow2"));
        compare(dir, "c.qcow2", options);
        ok(dir, "qemu-img create -q -f qcow2 -b c.qcow2 -F qcow2 b.qcow2 3M");
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 1 70k 1k' b.qcow2");
        compare(dir, "b.qcow2", &format!("an overlay of {options}"));
    }
}

#[test]
fn of_the_other_formats() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    bases(dir);
    compare(dir, "odd.raw", "raw");
    compare(dir, "mid.qed", "QED");
    for (cluster, backing) in
        [("4k", ""), ("64k", "-b odd.raw -F raw"), ("4k", "-b mid.qcow2 -F qcow2")]
    {
        ok(dir, &format!("qemu-img create -q -f qed -o cluster_size={cluster} {backing} a.qed 5M"));
        ok(dir, &format!("qemu-io -f qed {WRITES} a.qed"));
        compare(dir, "a.qed", &format!("QED, {cluster} {backing}"));
    }
    ok(dir, "qemu-img create -q -f raw src 40M");
    ok(dir, &format!("qemu-io -f raw {WRITES} -c 'write -q -P 7 33554000 1000' src"));
    for kind in [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
    ] {
        ok(dir, &format!("qemu-img convert -f raw -O vmdk -o subformat={kind} src d.vmdk"));
        compare(dir, "d.vmdk", kind);
    }
    ok(dir, "qemu-img create -q -f vmdk base.vmdk 4M");
    ok(dir, "qemu-io -f vmdk -c 'write -q -P 1 0 2M' base.vmdk");
    ok(dir, "qemu-img create -q -f vmdk -b base.vmdk -F vmdk -o zeroed_grain=on top.vmdk");
    ok(dir, "qemu-io -f vmdk -c 'write -q -P 2 100k 5k' -c 'write -q -z 640k 64k' top.vmdk");
    compare(dir, "top.vmdk", "a VMDK overlay");
    for options in ["static=off", "static=on"] {
        ok(dir, &format!("qemu-img convert -f raw -O vdi -o {options} src d.vdi"));
        compare(dir, "d.vdi", options);
    }
}

#[test]
fn an_answer_needs_a_place_and_a_range_on_the_disk() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("a.raw");
    std::fs::write(&path, [1; 4096]).expect("written");
    let mut asked = Asked::new(&path);
    let mut ask = |offset: u64, len: u64, mem: Mem| {
        asked.engine.submit(asked.disk, Io::status(offset, len), mem, 0).expect("room");
        settle(&mut asked.engine).remove(0)
    };
    let room = || Mem::from(Buf::zeroed(Status::BYTES));
    for (offset, len, mem) in [
        (0, 512, Mem::None),
        (0, 512, Buf::zeroed(Status::BYTES - 1).into()),
        (0, 512, Buf::zeroed(512).into()),
        (4096, 1, room()),
        (1, 4096, room()),
        (u64::MAX, 2, room()),
    ] {
        assert_eq!(ask(offset, len, mem).result, Err(Errno::INVALID), "{offset}+{len}");
    }
    let nothing = ask(4096, 0, room());
    assert_eq!(nothing.result, Ok(()));
    let memory = nothing.mem.into_buf().expect("as given");
    assert_eq!(Status::from_bytes(&memory), None, "nothing was asked, and nothing is answered");
    let last = ask(4095, 1, room());
    let said = Status::from_bytes(&last.mem.into_buf().expect("as given"));
    let host = Some((FileId(0), HostOffset(4095)));
    assert_eq!(said, Some(Status { kind: StatusKind::Data, len: 1, depth: 0, host }));
}

/// Who goes through a disk in small steps is told the same as who asks anew each time.
#[test]
fn what_is_known_is_what_is_told() {
    let folder = folder();
    let path = folder.path().join("raw");
    // A hole, bytes, and a hole.
    let file = std::fs::File::create(&path).expect("it is made");
    file.set_len(1 << 20).expect("it grows");
    file.write_all_at(&[1; 300 << 10], 200 << 10).expect("it is written");
    let qcow2 = folder.path().join("qcow2");
    let backed = CreateOptions {
        backing_file: Some("raw".into()),
        backing_format: Some(Format::Raw),
        ..CreateOptions::default()
    };
    create(&DISK, &qcow2, Format::Qcow2, &backed).expect("it is made");
    for (path, format) in [(&path, Format::Raw), (&qcow2, Format::Qcow2)] {
        let policy = Policy::SameDirectory;
        let options =
            OpenOptions { format: Some(format), backing: policy, ..OpenOptions::default() };
        let chain = open(&DISK, path, &options).expect("it opens");
        let mut known = map::Known::default();
        let mut at = 0;
        while at < chain.size() {
            let told = map::status(&chain, at, 3000).expect("it is told");
            let extent = known.status(&chain, at, 3000).expect("it is known");
            assert_eq!(extent, told, "{format} at {at}");
            at += extent.len;
        }
        // Back to where something else is.
        let told = map::status(&chain, 0, 512).expect("it is told");
        assert_eq!(known.status(&chain, 0, 512).expect("it is known"), told);
    }
}
