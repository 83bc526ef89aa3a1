//! Images of a format lie on remote disks: made there, worked with there, and as QEMU understands them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cowbell_engine::both::Either;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{CreateOptions, Format, Host as Files, Node, OpenOptions, RunOptions};
use cowbell_nbd::{Address, RemoteFile, RemoteOptions};

use crate::connections_are_made_again::{BLOCK, BLOCKS, Host, work};
use crate::remote_files_keep_the_contract::{Beside, beside};
use crate::serving::Server;

/// Where all paths are one remote disk.
struct There(Address);

impl Files for There {
    type File = Either<DiskFile, RemoteFile>;

    fn open(&self, _: &Path, write: bool) -> io::Result<Self::File> {
        let options = RemoteOptions { read_only: !write, reconnect: Duration::from_secs(60) };
        RemoteFile::open(self.0.clone(), options).map(Either::Second)
    }
    fn create_new(&self, path: &Path) -> io::Result<Self::File> {
        self.open(path, true)
    }
    fn remove(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.into())
    }
    fn identity(&self, _: &Self::File) -> io::Result<(u64, u64)> {
        Ok((1, 1))
    }
}

#[test]
fn a_qcow2_image_is_made_and_worked_with_while_connections_are_cut() {
    let server = Server::new(&vec![0; 8 << 20]);
    let there = There(server.address());
    let (path, size) = (Path::new("disk"), BLOCK * BLOCKS);
    let options = CreateOptions { size: Some(size), ..CreateOptions::default() };
    cowbell_formats::create(&there, path, Format::Qcow2, &options).expect("it is made");
    server.shared.short_lived.store(400_000, Ordering::SeqCst);
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let chain = cowbell_formats::open(&there, path, &options).expect("it opens");
    let limits = Limits { requests: 64, ..Limits::default() };
    let mut engine: Engine<Node, Beside> = Engine::new(beside(), limits);
    let node = cowbell_formats::attach(&mut engine, chain, &RunOptions::default());
    let mut host = Host::of(engine, node.expect("it attaches"));
    let model = work(&mut host, BLOCK, 400, |_| {});
    host.engine.drain();
    let mut done = Vec::new();
    while host.engine.drained().is_none() {
        host.turn(&mut done);
    }
    assert_eq!(host.engine.drained(), Some(Ok(())));
    drop(host);
    let connections = server.shared.connections.load(Ordering::SeqCst);
    assert!(connections > 4, "{connections} connections");

    let dir = tempfile::tempdir().expect("a directory");
    let [image, raw] = ["image", "raw"].map(|name| dir.path().join(name));
    fs::write(&image, server.contents()).expect("a copy");
    let Ok(checked) = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&image).status()
    else {
        return eprintln!("SKIPPED: there is no qemu-img");
    };
    assert!(checked.success());
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    let converted = Command::new("qemu-img").args(convert).args([&image, &raw]).status();
    assert!(converted.expect("it was there").success());
    assert!(fs::read(&raw).expect("its contents") == model);
}
