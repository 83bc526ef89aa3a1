//! Disks behind an async executor: a future for each request.
//!
//! The engine needs no runtime, and this one is any: tasks are polled until all of them wait; then the
//! engine runs, what has finished wakes its task, and the thread sleeps on the engine's descriptor. A program with a
//! reactor of its own registers that descriptor there instead of the last step.
//!
//! A future that is dropped gives its request up ([`Engine::abandon`]): the engine keeps the memory until the
//! device lets go of it, so dropping is safe at any time, which is what callers of futures expect.
//!
//! ```text
//! cargo run --release --example executor
//! ```

use std::error::Error;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use cowbell_engine::event_loop::EventLoop;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits, Why};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};
use futures_executor::LocalPool;
use futures_util::future::poll_immediate;
use futures_util::task::LocalSpawnExt;
use slab::Slab;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DISK_BYTES: u64 = 16 << 20;
const BLOCK: u64 = 16 << 10;
const TASKS: u64 = 24;
/// Fewer than there are tasks: some wait for room.
const REQUESTS: usize = 16;

/// What was done.
#[derive(Debug, Default)]
pub struct Served {
    /// Blocks copied.
    pub copied: u64,
    /// Requests that were given up while they were under way.
    pub given_up: u64,
    /// Times that a task had to wait for room in the engine.
    pub held_back: u64,
}

/// The engine, and who waits for what of it. One thread has it; the lock is never waited for.
struct Disks(Mutex<State>);

struct State {
    engine: Engine<Node, Aio>,
    /// Requests in flight, by tag.
    flying: Slab<Flying>,
    /// Tasks that wait for room.
    roomless: Vec<Waker>,
    served: Served,
}

enum Flying {
    Waits(Waker),
    Ended(std::result::Result<(), Errno>, Mem),
}

impl Disks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody has panicked")
    }

    /// A request: its memory comes back when it has ended.
    fn request(self: &Arc<Self>, disk: NodeId, io: Io, mem: impl Into<Mem>) -> Request {
        Request { disks: Arc::clone(self), disk, io, mem: mem.into(), tag: None }
    }

    /// Runs the engine, and wakes whose request has ended. Is there more to do?
    fn run(&self) -> bool {
        let mut state = self.state();
        let mut more = state.engine.run(clock()).again;
        while let Some(done) = state.engine.poll() {
            let flying = &mut state.flying[done.tag as usize];
            let ended = Flying::Ended(done.result, done.mem);
            if let Flying::Waits(waker) = std::mem::replace(flying, ended) {
                waker.wake();
            }
            more = true;
        }
        if more {
            // Some may have gone meanwhile: all look, and who finds none waits again.
            state.roomless.drain(..).for_each(Waker::wake);
        }
        more
    }
}

/// A request as a future.
struct Request {
    disks: Arc<Disks>,
    disk: NodeId,
    io: Io,
    mem: Mem,
    /// Its name in the engine, when it is there.
    tag: Option<usize>,
}

impl Future for Request {
    type Output = std::result::Result<Mem, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let disks = Arc::clone(&self.disks);
        let state = &mut *disks.state();
        if let Some(tag) = self.tag {
            if let Flying::Waits(waker) = &mut state.flying[tag] {
                waker.clone_from(cx.waker());
                return Poll::Pending;
            }
            self.tag = None;
            let Flying::Ended(result, mem) = state.flying.remove(tag) else { unreachable!() };
            return Poll::Ready(result.map(|()| mem));
        }
        let tag = state.flying.insert(Flying::Waits(cx.waker().clone()));
        let mem = std::mem::take(&mut self.mem);
        match state.engine.submit(self.disk, self.io, mem, tag as u64) {
            Ok(()) => {
                self.tag = Some(tag);
                Poll::Pending
            }
            Err(refused) => {
                state.flying.remove(tag);
                self.mem = refused.mem;
                if refused.why != Why::Full {
                    return Poll::Ready(Err(Errno::SHUT_DOWN));
                }
                state.served.held_back += 1;
                state.roomless.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let Some(tag) = self.tag else { return };
        let mut state = self.disks.state();
        if matches!(state.flying[tag], Flying::Waits(_)) {
            let given_up = state.engine.abandon(self.disk, |its| its == tag as u64);
            assert_eq!(given_up, [tag as u64], "its memory is the engine's to keep");
            state.served.given_up += 1;
        }
        state.flying.remove(tag);
    }
}

/// One task's share of the copy.
async fn copy(
    disks: Arc<Disks>,
    [from, to]: [NodeId; 2],
    first: u64,
) -> std::result::Result<(), Errno> {
    for block in (first..DISK_BYTES / BLOCK).step_by(TASKS as usize) {
        let offset = block * BLOCK;
        // Impatient at first: it asks, does not wait, and drops what it has asked for.
        let hasty = disks.request(from, Io::read(offset, BLOCK), Buf::zeroed(BLOCK as usize));
        if block % 7 == 0
            && let Some(read) = poll_immediate(hasty).await
        {
            read?;
        }
        let read =
            disks.request(from, Io::read(offset, BLOCK), Buf::zeroed(BLOCK as usize)).await?;
        disks.request(to, Io::write(offset, BLOCK), read).await?;
        disks.state().served.copied += 1;
    }
    disks.request(to, Io::flush(), Mem::None).await.map(drop)
}

/// Copies an image in `folder` to another.
pub fn serve(folder: &Path) -> Result<Served> {
    let (from, to) = (folder.join("from.raw"), folder.join("to.qed"));
    std::fs::write(&from, contents())?;
    let options = CreateOptions { size: Some(DISK_BYTES), ..CreateOptions::default() };
    create(&DiskHost::default(), &to, Format::Qed, &options)?;
    let limits = Limits { requests: REQUESTS, ..Limits::default() };
    let mut engine = Engine::new(Aio::new(AioOptions::default())?, limits);
    let mut open_disk = |path: &Path, format, write| -> Result<NodeId> {
        let options = OpenOptions { format: Some(format), write, ..OpenOptions::default() };
        let image = open(&DiskHost { direct: true }, path, &options)?;
        Ok(attach(&mut engine, image, &RunOptions::default())?)
    };
    let ends = [open_disk(&from, Format::Raw, false)?, open_disk(&to, Format::Qed, true)?];
    let mut events = EventLoop::new(engine.fd())?;
    let (flying, roomless) = (Slab::new(), Vec::new());
    let state = State { engine, flying, roomless, served: Served::default() };
    let disks = Arc::new(Disks(Mutex::new(state)));

    let mut pool = LocalPool::new();
    let (left, failed) = (Arc::new(AtomicU64::new(TASKS)), Arc::new(Mutex::new(None)));
    for first in 0..TASKS {
        let (disks, left, failed) = (Arc::clone(&disks), Arc::clone(&left), Arc::clone(&failed));
        pool.spawner().spawn_local(async move {
            if let Err(errno) = copy(disks, ends, first).await {
                *failed.lock().expect("nobody has panicked") = Some(errno);
            }
            left.fetch_sub(1, Ordering::Relaxed);
        })?;
    }
    loop {
        pool.run_until_stalled();
        if left.load(Ordering::Relaxed) == 0 {
            disks.state().engine.drain();
        }
        let more = disks.run();
        if let Some(result) = disks.state().engine.drained() {
            result?;
            break;
        }
        if !more {
            let due = disks.state().engine.next_deadline();
            events.wait(due, clock())?;
        }
    }
    let failed = *failed.lock().expect("nobody has panicked");
    if let Some(errno) = failed {
        return Err(errno.to_string().into());
    }
    let served = std::mem::take(&mut disks.state().served);
    Ok(served)
}

/// What the image that is copied holds.
pub fn contents() -> Vec<u8> {
    (0..DISK_BYTES).map(|at| (at / 512 % 241) as u8).collect()
}

#[allow(dead_code, reason = "a test runs `serve` by itself")]
fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let served = serve(folder.path())?;
    println!("{served:#?}");
    Ok(())
}
