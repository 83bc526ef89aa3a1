//! Servers for clients of ours: this crate's own on a thread, and QEMU's.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use cowbell_engine::mem::Buf;
use cowbell_nbd::wire::{error, state};
use cowbell_nbd::{Address, Connection, Export, Extent, Limits, Place, Request, Want, What};
use tempfile::TempDir;

/// What a [`Server`] has, for those who serve and those who look.
#[derive(Debug)]
pub struct Shared {
    pub disk: Mutex<Vec<u8>>,
    /// No connection lives longer than so many bytes that it has sent, if not 0.
    pub short_lived: AtomicU64,
    /// Connections so far.
    pub connections: AtomicU64,
    /// Requests that were done.
    pub requests: AtomicU64,
    /// Nobody is let in, and who is there is thrown out.
    pub is_closed: AtomicBool,
    is_over: AtomicBool,
}

/// A server with one disk in memory, on threads.
#[derive(Debug)]
pub struct Server {
    pub shared: Arc<Shared>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
    _dir: TempDir,
}

impl Server {
    pub fn new(contents: &[u8]) -> Server {
        Server::with(contents, |export| export)
    }

    /// The export as it is to be.
    pub fn with(contents: &[u8], change: impl FnOnce(Export) -> Export) -> Server {
        let dir = tempfile::tempdir().expect("a directory for a socket");
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        let shared = Arc::new(Shared {
            disk: Mutex::new(contents.to_vec()),
            short_lived: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        });
        let exports: Arc<[Export]> = [change(Export::new("disk", contents.len() as u64))].into();
        let its = Arc::clone(&shared);
        let thread = std::thread::spawn(move || serve(&listener, &exports, &its));
        Server { shared, path, thread: Some(thread), _dir: dir }
    }

    pub fn address(&self) -> Address {
        Address { place: Place::Unix(self.path.clone()), export: "disk".into() }
    }

    pub fn contents(&self) -> Vec<u8> {
        self.shared.disk.lock().expect("no panic").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server did not panic");
        }
    }
}

fn serve(listener: &UnixListener, exports: &Arc<[Export]>, shared: &Arc<Shared>) {
    let mut clients = Vec::new();
    while !shared.is_over.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((socket, _)) => {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let (exports, shared) = (Arc::clone(exports), Arc::clone(shared));
                clients.push(std::thread::spawn(move || one_client(socket, exports, &shared)));
            }
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
        }
    }
    clients.into_iter().for_each(|client| client.join().expect("no panic"));
}

fn one_client(mut socket: UnixStream, exports: Arc<[Export]>, shared: &Shared) {
    socket.set_nonblocking(false).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(5))).expect("a socket");
    let mut client = Connection::new(exports, Limits::default());
    let life = shared.short_lived.load(Ordering::SeqCst);
    let is_abrupt = shared.connections.load(Ordering::SeqCst).is_multiple_of(3);
    let (mut sent, mut buf) = (0, vec![0; 64 << 10]);
    loop {
        while client.has_output() {
            let mut slices = [std::io::IoSlice::new(&[]); 1];
            client.output(&mut slices);
            let left = if life == 0 { u64::MAX } else { life.saturating_sub(sent) };
            let most = slices[0].len().min(left.try_into().unwrap_or(usize::MAX));
            let Ok(count) = socket.write(&slices[0][..most]) else { return };
            if count == 0 {
                // What was sent is received, unless there is something that was not read.
                let _ = socket.shutdown(Shutdown::Write);
                while !is_abrupt && matches!(socket.read(&mut buf), Ok(1..)) {}
                return;
            }
            sent += count as u64;
            client.sent(count, drop);
        }
        let is_closed = shared.is_closed.load(Ordering::SeqCst);
        if client.is_over() || is_closed || shared.is_over.load(Ordering::SeqCst) {
            return;
        }
        let count = match socket.read(&mut buf) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => 0,
            Err(_) => return,
        };
        let mut rest = &buf[..count];
        loop {
            match client.want() {
                Want::Bytes if rest.is_empty() => break,
                Want::Bytes => rest = &rest[client.take(rest)..],
                Want::Memory(len) => client.give(Buf::zeroed(len)),
                Want::Submit => {
                    let request = client.next().expect("one is ready");
                    do_it(&mut client, request, &mut shared.disk.lock().expect("no panic"));
                    shared.requests.fetch_add(1, Ordering::SeqCst);
                }
                Want::Room => {
                    // All is done at once: only what is to be sent is in the way.
                    let mut slices = [std::io::IoSlice::new(&[]); 1];
                    client.output(&mut slices);
                    let Ok(count) = socket.write(&slices[0]) else { return };
                    client.sent(count, drop);
                }
                Want::Nothing => break,
            }
        }
    }
}

fn do_it(client: &mut Connection, request: Request, disk: &mut [u8]) {
    let Request { slot, what, offset, len, mut mem, .. } = request;
    let range = offset as usize..(offset + len) as usize;
    match (what, mem.as_mut()) {
        (What::Read, Some(mem)) => mem.copy_from_slice(&disk[range]),
        (What::Write { .. }, Some(mem)) => disk[range].copy_from_slice(mem),
        (What::Zero { fast: true, .. }, None) => {
            client.finish(slot, Err(error::NOTSUP), None);
            return;
        }
        (What::Zero { .. } | What::Trim { .. }, None) => disk[range].fill(0),
        (What::Status { .. }, None) => {
            let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
            let first = is_zero(&disk[range.start..range.end.min(range.start + 512)]);
            let same = disk[range].chunks(512).take_while(|block| is_zero(block) == first);
            let same = same.map(|block| block.len() as u64).sum();
            let flags = if first { state::ZERO | state::HOLE } else { 0 };
            return client.finish_status(slot, &[Extent { len: same, flags }]);
        }
        _ => {}
    }
    client.finish(slot, Ok(()), mem);
}

/// QEMU's server on a file.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    dir: TempDir,
}

impl Qemu {
    /// `None`, with a word about it: it is not installed.
    pub fn new(contents: &[u8], more: &[&str]) -> Option<Qemu> {
        let dir = tempfile::tempdir().expect("a directory for a disk");
        fs::write(dir.path().join("disk"), contents).expect("a disk");
        let child = Qemu::start(dir.path(), more)?;
        Some(Qemu { child, dir })
    }

    fn start(dir: &Path, more: &[&str]) -> Option<Child> {
        let socket = dir.join("socket");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-f", "raw", "-x", "disk", "--discard=unmap", "--socket"]);
        command.arg(&socket).args(more).arg(dir.join("disk")).stdin(Stdio::null());
        let Ok(mut child) = command.spawn() else {
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no qemu-nbd");
            return None;
        };
        for _ in 0..2000 {
            if UnixStream::connect(&socket).is_ok() {
                return Some(child);
            }
            assert!(child.try_wait().expect("it is ours").is_none(), "qemu-nbd has ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("qemu-nbd does not listen");
    }

    /// Ended without a word, and started anew.
    pub fn restart(&mut self) {
        self.kill();
        self.child = Qemu::start(self.dir.path(), &[]).expect("it was there before");
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The disk gets another length.
    pub fn grow(&self, len: u64) {
        let disk = fs::OpenOptions::new().write(true).open(self.dir.path().join("disk"));
        disk.and_then(|disk| disk.set_len(len)).expect("it grows");
    }

    pub fn address(&self) -> Address {
        Address { place: Place::Unix(self.dir.path().join("socket")), export: "disk".into() }
    }

    pub fn contents(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("disk")).expect("the disk")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}
