//! VDI under random requests at depth: images of ours and of QEMU's, dynamic and fixed, of small
//! blocks and large ones; checked afterwards, by QEMU too where it knows them.

use std::path::Path;

use crate::common::shadow::{Rig, Rng, SIZE};
use crate::common::{have_qemu, ok};
use cowbell_engine::backend::Backend;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_formats::check::Repair;
use cowbell_formats::parts::growth::{Grow, Growth};
use cowbell_formats::vdi::VdiOptions;
use cowbell_formats::vdi::rest::check::check;
use cowbell_formats::{CreateOptions, DiskHost, Format, Host, RunOptions, create};

const HOST: DiskHost = DiskHost { direct: false };

/// Who makes it.
#[derive(Clone, Copy, PartialEq, Debug)]
enum By {
    Us,
    Qemu,
}

fn make(by: By, path: &Path, block: u64, fixed: bool) {
    match by {
        By::Us => {
            let options = CreateOptions {
                size: Some(SIZE),
                cluster_size: Some(block),
                fixed: Some(fixed),
                ..CreateOptions::default()
            };
            create(&HOST, path, Format::Vdi, &options).expect("it is made");
        }
        By::Qemu => {
            let on = if fixed { "on" } else { "off" };
            let line = format!("qemu-img create -q -f vdi -o static={on} image.vdi {SIZE}");
            ok(path.parent().expect("a folder"), &line);
        }
    }
}

fn drive<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool, seed: u64) {
    let kinds = [
        (By::Us, 4096, false, Grow::Truncate),
        (By::Us, 65536, false, Grow::Allocate),
        (By::Us, 1 << 20, false, Grow::Write),
        (By::Us, 1 << 20, true, Grow::Truncate),
        (By::Qemu, 1 << 20, false, Grow::Truncate),
        (By::Qemu, 1 << 20, true, Grow::Truncate),
    ];
    for (n, (maker, block, fixed, by)) in kinds.into_iter().enumerate() {
        if maker == By::Qemu && !have_qemu() {
            continue;
        }
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let path = folder.path().join("image.vdi");
        make(maker, &path, block, fixed);
        let mut shadow = vec![0; SIZE as usize];
        let mut rng = Rng(seed + n as u64);
        for round in 0..2 {
            let growth = Growth { by, step_min: 64 << 10, step_max: 1 << 20 };
            let run = RunOptions {
                vdi: VdiOptions { growth, ..VdiOptions::default() },
                ..RunOptions::default()
            };
            let mut rig = Rig::open(backend(), &path, direct, block, shadow, &run);
            assert!(!rig.has_backing);
            // QEMU's blocks share blocks of the file system, whose edges a discard leaves.
            rig.discards = maker == By::Us;
            for _ in 0..300 {
                rig.one(&mut rng);
            }
            shadow = rig.finish();
            let file = HOST.open(&path, false).expect("it opens");
            let report = check(&file, Repair::None).expect("it is checked");
            assert!(report.is_clean(), "round {round}, case {n}: {report:?}");
            if block == 1 << 20 && have_qemu() {
                std::fs::write(folder.path().join("shadow"), &shadow).expect("written");
                ok(folder.path(), "qemu-img check -f vdi image.vdi");
                ok(folder.path(), "qemu-img compare -f vdi -F raw image.vdi shadow");
            }
        }
    }
}

#[test]
fn over_the_inline_backend() {
    drive(Inline::new, false, 31);
}

#[test]
fn over_the_inline_backend_past_the_page_cache() {
    drive(Inline::new, true, 32);
}

#[test]
fn over_native_aio() {
    drive(|| Aio::new(AioOptions::default()).expect("there is AIO"), true, 33);
}
