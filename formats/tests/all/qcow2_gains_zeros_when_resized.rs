//! Disks are made larger and smaller at random, with whatever behind their ends: a longer backing
//! file, old data, other programs' leavings. What a disk gains reads as zeros, what it keeps stays,
//! and `qemu-img` finds the image sound.

use std::path::Path;

use crate::common::drive::{add, drain, folder, make_with, settle};
use crate::common::shadow::Rng;
use crate::common::{have_qemu, ok};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{CreateOptions, Format, Node};

const MOST: u64 = 6 << 20;
const BACKING: u64 = (4 << 20) + 3 * 512;

const SHAPES: [&str; 12] = [
    "cluster_size=64k",
    "cluster_size=64k,backing_file=base,backing_fmt=raw",
    "cluster_size=4k,backing_file=base,backing_fmt=raw",
    "cluster_size=512,backing_file=base,backing_fmt=raw,refcount_bits=64",
    "cluster_size=2M,backing_file=base,backing_fmt=raw",
    "cluster_size=64k,compat=v2",
    "cluster_size=64k,compat=v2,backing_file=base,backing_fmt=raw",
    "cluster_size=1k,compat=v2,backing_file=base,backing_fmt=raw",
    "cluster_size=16k,extended_l2=on,backing_file=base,backing_fmt=raw",
    "cluster_size=4k,data_file=data",
    "cluster_size=4k,data_file=data,backing_file=base,backing_fmt=raw",
    "cluster_size=64k,data_file=data,data_file_raw=on",
];

struct Disk<B: Backend> {
    engine: Engine<Node, B>,
    node: NodeId,
    bytes: Vec<u8>,
}

impl<B: Backend> Disk<B> {
    fn ask(&mut self, io: Io, mem: impl Into<Mem>) -> Result<Mem, Errno> {
        self.engine.submit(self.node, io, mem, 0).expect("room");
        let done = settle(&mut self.engine).remove(0);
        done.result.map(|()| done.mem)
    }

    fn resize(&mut self, size: u64) {
        let io = Io { kind: IoKind::Truncate, offset: size, len: 0 };
        self.ask(io, Mem::None).expect("it is resized");
        self.bytes.resize(size as usize, 0);
    }

    fn change(&mut self, rng: &mut Rng) {
        let size = self.bytes.len() as u64;
        let offset = match rng.below(4) {
            // Around the end, of which there are more to come.
            0 => size.saturating_sub(1 + rng.below(100_000)),
            _ => rng.below(size),
        };
        let len = (1 + rng.below(200_000)).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        let kind = IoKind::Zero { unmap: rng.below(2) == 0, fua: false };
        let byte = rng.below(256) as u8;
        match rng.below(4) {
            0 => {
                self.ask(Io { kind, offset, len }, Mem::None).expect("zeroed");
                self.bytes[range].fill(0);
            }
            _ => {
                self.ask(Io::write(offset, len), Buf::copied(&vec![byte; len as usize]))
                    .expect("written");
                self.bytes[range].fill(byte);
            }
        }
    }

    fn compare(&mut self, what: &str) {
        let len = self.bytes.len();
        let read = self.ask(Io::read(0, len as u64), Buf::zeroed(len)).expect("read");
        let read = read.into_buf().expect("ours");
        let wrong = read.iter().zip(&self.bytes).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{what}: of {len}");
    }
}

fn drive<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool, seed: u64) {
    let folder = folder();
    let base: Vec<u8> = (0..BACKING).map(|at| (at / 509) as u8 | 1).collect();
    std::fs::write(folder.path().join("base"), &base).expect("written");
    for shape in SHAPES {
        let mut rng = Rng(seed);
        let path = folder.path().join("image");
        let size = 512 * (1 + rng.below(MOST / 1024));
        let mut options = CreateOptions { size: Some(size), ..CreateOptions::default() };
        options.parse(Format::Qcow2, shape).expect("valid options");
        make_with(&path, Format::Qcow2, &options);
        let mut bytes = vec![0; size as usize];
        if options.backing_file.is_some() {
            let shows = bytes.len().min(base.len());
            bytes[..shows].copy_from_slice(&base[..shows]);
        }
        for round in 0..3 {
            let mut engine = Engine::new(backend(), Limits::default());
            let node = add(&mut engine, &path, Format::Qcow2, direct);
            let mut disk = Disk { engine, node, bytes };
            for step in 0..8 {
                for _ in 0..rng.below(5) {
                    disk.change(&mut rng);
                }
                disk.resize(512 * (1 + rng.below(MOST / 512)));
                disk.compare(&format!("{shape}, seed {seed}, round {round}, step {step}"));
            }
            drain(&mut disk.engine);
            bytes = disk.bytes;
            is_sound(folder.path(), &bytes, shape);
        }
        bytes = shrunk_by_qemu(folder.path(), bytes, shape);
        let mut engine = Engine::new(backend(), Limits::default());
        let node = add(&mut engine, &path, Format::Qcow2, direct);
        let mut disk = Disk { engine, node, bytes };
        disk.resize(MOST);
        disk.compare(&format!("{shape}, seed {seed}, after QEMU"));
        drain(&mut disk.engine);
        is_sound(folder.path(), &disk.bytes, shape);
    }
}

fn is_sound(folder: &Path, bytes: &[u8], shape: &str) {
    if have_qemu() {
        println!("{shape}");
        std::fs::write(folder.join("shadow"), bytes).expect("written");
        ok(folder, "qemu-img check -U -q -f qcow2 image");
        ok(folder, "qemu-img compare -U -q -f qcow2 -F raw image shadow");
    }
}

/// QEMU leaves what was in the cut cluster where it was.
fn shrunk_by_qemu(folder: &Path, mut bytes: Vec<u8>, shape: &str) -> Vec<u8> {
    let size = bytes.len() as u64 / 3 / 512 * 512;
    if have_qemu() && size > 0 {
        println!("{shape}");
        ok(folder, "qemu-io -f qcow2 -c 'write -q -P 99 0 512' image");
        ok(folder, &format!("qemu-img resize -q --shrink -f qcow2 image {size}"));
        bytes[..512].fill(99);
        bytes.truncate(size as usize);
    }
    bytes
}

#[test]
fn over_the_inline_backend() {
    for seed in 1..3 {
        drive(Inline::new, false, seed);
    }
}

#[test]
fn over_native_aio() {
    drive(|| Aio::new(AioOptions::default()).expect("native AIO"), true, 7);
}

#[test]
fn over_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    drive(uring, true, 8);
}

/// Of 512-byte clusters, where the L1 table of a disk of 512 MiB needs a run of more clusters than
/// one piece of a refcount block counts.
#[test]
fn a_long_table_of_small_clusters() {
    let folder = folder();
    let path = folder.path().join("image");
    for bits in [64, 16] {
        let options = CreateOptions {
            size: Some(1 << 20),
            cluster_size: Some(512),
            refcount_bits: Some(bits),
            ..CreateOptions::default()
        };
        make_with(&path, Format::Qcow2, &options);
        let mut bytes = 1 << 20;
        for size in [(512 << 20) + 512, 40 << 30] {
            let mut engine = Engine::new(Inline::new(), Limits::default());
            let node = add(&mut engine, &path, Format::Qcow2, false);
            let mut disk = Disk { engine, node, bytes: Vec::new() };
            disk.ask(Io::write(bytes - 512, 512), Buf::copied(&[5; 512])).expect("written");
            let io = Io { kind: IoKind::Truncate, offset: size, len: 0 };
            disk.ask(io, Mem::None).expect("it is resized");
            disk.ask(Io::write(size - 512, 512), Buf::copied(&[6; 512])).expect("written");
            for at in [bytes - 512, size - 512] {
                let read = disk.ask(Io::read(at, 512), Buf::zeroed(512)).expect("read");
                assert!(read.into_buf().expect("ours").iter().all(|&byte| byte > 4));
            }
            drain(&mut disk.engine);
            bytes = size;
            if have_qemu() {
                ok(folder.path(), "qemu-img check -U -q -f qcow2 image");
            }
        }
    }
}
