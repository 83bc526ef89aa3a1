//! Remote disks as files of an engine: the contract of backends, and what is read and written at rest.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use cowbell_engine::backend::{Backend, FileInfo};
use cowbell_engine::both::{Both, Either};
use cowbell_engine::contract::{FILE, Rig, run_all};
use cowbell_engine::store::Store;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_nbd::{Export, Place, Remote, RemoteFile, RemoteOptions};

use crate::serving::{Qemu, Server};

/// A remote disk beside the threads that compute.
pub type Beside = Both<Pool, Remote>;

pub fn beside() -> Beside {
    let pool = Pool::new(PoolOptions { threads: 2, ..PoolOptions::default() }).expect("threads");
    Both::new(pool, Remote::new().expect("a backend")).expect("a descriptor")
}

fn attached(file: RemoteFile) -> (Beside, FileInfo) {
    let mut backend = beside();
    let info = backend.attach(FILE, Either::Second(file)).expect("it attaches");
    (backend, info)
}

/// Disks of servers that are made by `make`.
struct Over<S, F> {
    make: F,
    server: Option<S>,
}

impl<F: FnMut(&[u8]) -> Server> Rig for Over<Server, F> {
    type Backend = Beside;

    fn make(&mut self, contents: &[u8]) -> (Beside, FileInfo) {
        let server = self.server.insert((self.make)(contents));
        attached(RemoteFile::open(server.address(), RemoteOptions::default()).expect("it opens"))
    }

    fn contents(&mut self, _: &mut Beside) -> Vec<u8> {
        self.server.as_ref().expect("one was made").contents()
    }
}

impl<F: FnMut(&[u8]) -> Qemu> Rig for Over<Qemu, F> {
    type Backend = Beside;

    fn make(&mut self, contents: &[u8]) -> (Beside, FileInfo) {
        let server = self.server.insert((self.make)(contents));
        attached(RemoteFile::open(server.address(), RemoteOptions::default()).expect("it opens"))
    }

    fn contents(&mut self, _: &mut Beside) -> Vec<u8> {
        self.server.as_ref().expect("one was made").contents()
    }
}

#[test]
fn over_our_server() {
    run_all(&mut Over { make: Server::new, server: None });
}

#[test]
fn over_qemus_server() {
    if Qemu::new(&[0; 512], &[]).is_none() {
        return;
    }
    run_all(&mut Over {
        make: |contents: &[u8]| Qemu::new(contents, &[]).expect("it was there"),
        server: None,
    });
}

/// What is done at rest, on a disk of `contents`.
fn at_rest(file: &RemoteFile, contents: &[u8]) -> Vec<u8> {
    let mut expected = contents.to_vec();
    let mut got = vec![0xee; contents.len() + 700];
    file.read_at(0, &mut got).expect("all of it, and what is behind");
    assert!(got[..contents.len()] == *contents && got[contents.len()..].iter().all(|&b| b == 0));
    for (offset, len) in [(0, 1), (511, 2), (4097, 5000), (contents.len() - 3, 3), (512, 1024)] {
        let new: Vec<u8> = (0..len).map(|at| (at % 200 + offset % 55) as u8).collect();
        file.write_at(offset as u64, &new).expect("within the disk");
        expected[offset..offset + len].copy_from_slice(&new);
        let mut got = vec![0; len + 20];
        let start = offset.saturating_sub(10);
        file.read_at(start as u64, &mut got).expect("around it");
        let there = got.len().min(contents.len() - start);
        assert!(got[..there] == expected[start..start + there]);
    }
    file.flush().expect("it flushes");
    let len = contents.len() as u64;
    assert_eq!(file.len().expect("a length"), len);
    assert!(file.has_fixed_len() && file.is_writable());
    assert!(file.set_len(len - 1).is_ok() && file.set_len(len + 1).is_err());
    for error in
        [file.write_at(len - 1, &[1, 2]), file.allocate(len, 1), file.write_at(u64::MAX, &[1])]
    {
        let error = error.expect_err("behind the end");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
    expected
}

#[test]
fn a_disk_at_rest_is_read_and_written_at_any_place() {
    let contents: Vec<u8> = (0..200 << 10).map(|at| (at % 251) as u8).collect();
    let server = Server::new(&contents);
    let file = RemoteFile::open(server.address(), RemoteOptions::default()).expect("it opens");
    let expected = at_rest(&file, &contents);
    assert!(server.contents() == expected);
    // Blocks of 512 bytes: QEMU's server, past the page cache.
    let Some(qemu) = Qemu::new(&contents, &["--cache=none"]) else { return };
    let file = RemoteFile::open(qemu.address(), RemoteOptions::default()).expect("it opens");
    assert_eq!(at_rest(&file, &contents), expected);
    drop(file);
    assert!(qemu.contents() == expected);
}

#[test]
fn a_disk_says_where_it_has_holes() {
    let mut contents = vec![0; 1 << 20];
    contents[128 << 10..192 << 10].fill(7);
    let server = Server::new(&contents);
    let qemu = Qemu::new(&contents, &[]);
    for address in [Some(server.address()), qemu.as_ref().map(Qemu::address)].into_iter().flatten()
    {
        let file = RemoteFile::open(address, RemoteOptions::default()).expect("it opens");
        assert!(file.info().knows_holes);
        let (mut at, mut data) = (0, 0);
        while at < contents.len() as u64 {
            let extent = file.extent_at(at).expect("it says");
            assert!(extent.end > at && extent.end <= contents.len() as u64);
            let is_zero = contents[at as usize..extent.end as usize].iter().all(|&byte| byte == 0);
            assert!(extent.data || is_zero);
            data += if extent.data { extent.end - at } else { 0 };
            at = extent.end;
        }
        // (A file that was written whole has no holes.)
        assert!(data >= 64 << 10);
    }
    let file = RemoteFile::open(server.address(), RemoteOptions::default()).expect("it opens");
    assert_eq!(file.extent_at(512).expect("it says").end, 128 << 10);
    assert!(file.extent_at(130 << 10).expect("it says").data);
}

#[test]
fn what_the_server_has_against_it_is_said() {
    let server = Server::with(&[0; 4096], |export| Export { read_only: true, ..export });
    let file = RemoteFile::open(server.address(), RemoteOptions::default()).expect("it opens");
    assert!(!file.is_writable());
    assert_eq!(
        file.write_at(0, &[1]).expect_err("read-only").kind(),
        io::ErrorKind::ReadOnlyFilesystem
    );
    let mut address = server.address();
    address.export = "another".into();
    let error = RemoteFile::open(address, RemoteOptions::default()).expect_err("no such export");
    assert!(error.to_string().ends_with("the NBD server has no such export"), "{error}");
    let gone = server.address();
    drop(server);
    RemoteFile::open(gone, RemoteOptions::default()).expect_err("nobody is there");
}

#[test]
fn a_disk_over_tcp() {
    let contents: Vec<u8> = (0..200 << 10).map(|at| (at % 251) as u8).collect();
    let server = Server::new(&contents);
    let Place::Unix(socket) = server.address().place else { panic!("it is one") };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("it has one").port();
    // Passes on what either says.
    let passing = std::thread::spawn(move || {
        let (tcp, _) = listener.accept().expect("a client");
        let unix = UnixStream::connect(socket).expect("the server");
        let (mut from_tcp, mut to_unix) =
            (tcp.try_clone().expect("a copy"), unix.try_clone().expect("a copy"));
        let back = std::thread::spawn(move || io::copy(&mut { unix }, &mut { tcp }));
        let _ = io::copy(&mut from_tcp, &mut to_unix);
        let _ = to_unix.shutdown(std::net::Shutdown::Both);
        let _ = back.join();
    });
    let address = format!("nbd://localhost:{port}/disk").parse().expect("an address");
    let file = RemoteFile::open(address, RemoteOptions::default()).expect("it opens");
    let expected = at_rest(&file, &contents);
    assert!(server.contents() == expected);
    // The same connection goes into an engine and comes back.
    let (mut backend, _) = attached(file);
    let Some(Either::Second(file)) = backend.detach(FILE) else { panic!("it was there") };
    let mut first = [0; 100];
    file.read_at(0, &mut first).expect("it is connected");
    assert_eq!(first, expected[..100]);
    drop(file);
    passing.join().expect("no panic");
    assert_eq!(server.shared.connections.load(Ordering::SeqCst), 1);
}
