//! A disk in a loop around `mio::Poll`.
//!
//! A copier: it reads one image and writes another, both through one engine, a number of blocks at
//! a time. Meanwhile a thread asks through a pipe how far it is, and a heartbeat beats: neither
//! waits for a disk.
//!
//! Two things differ from a plain epoll loop. mio reports *edges*: a descriptor is reported once,
//! when it becomes readable, so what it stands for must be taken in whole. [`Engine::run`] does
//! that for the engine's. And mio has no timers: the loop's next moment is the earlier of its own
//! and the engine's.
//!
//! (A program that has nothing but disks to wait for takes `cowbell_engine::event_loop`, which is
//! this with less in it.)
//!
//! ```text
//! cargo run --release --example mio
//! ```

use std::error::Error;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Finished, Limits};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};
use mio::unix::{SourceFd, pipe};
use mio::{Events, Interest, Poll, Token};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DISK: Token = Token(0);
const QUESTIONS: Token = Token(1);

const DISK_BYTES: u64 = 32 << 20;
const BLOCK: u64 = 16 << 10;
/// Blocks on their way: the engine is made for as many requests, so that it is never full.
const DEPTH: usize = 32;
const HEARTBEAT_MS: u64 = 2;

/// What the loop saw.
#[derive(Debug, Default)]
pub struct Served {
    /// Blocks copied.
    pub copied: u64,
    /// Questions answered while blocks were on their way.
    pub answers: u64,
    /// Heartbeats while blocks were on their way.
    pub beats: u64,
}

/// A copy under way.
struct Copier {
    engine: Engine<Node, Aio>,
    from: NodeId,
    to: NodeId,
    begun: u64,
    copied: u64,
    free: Vec<Mem>,
}

impl Copier {
    /// Begins to read blocks for as long as there are buffers.
    fn go_on(&mut self) -> Result<()> {
        while self.begun < DISK_BYTES / BLOCK
            && let Some(mem) = self.free.pop()
        {
            // The tag says which block it is, and its lowest bit that it is being read.
            let (io, tag) = (Io::read(self.begun * BLOCK, BLOCK), self.begun << 1);
            self.engine.submit(self.from, io, mem, tag).map_err(|no| format!("{:?}", no.why))?;
            self.begun += 1;
        }
        Ok(())
    }

    /// What was read is written; what was written frees a buffer.
    fn finished(&mut self, done: Finished) -> Result<()> {
        let block = done.tag >> 1;
        done.result.map_err(|errno| format!("block {block}: {errno}"))?;
        if done.tag & 1 == 0 {
            let io = Io::write(block * BLOCK, BLOCK);
            let taken = self.engine.submit(self.to, io, done.mem, done.tag | 1);
            taken.map_err(|no| format!("{:?}", no.why))?;
        } else {
            self.copied += 1;
            self.free.push(done.mem);
        }
        Ok(())
    }
}

/// Copies an image in `folder` to another, and answers questions meanwhile.
pub fn serve(folder: &Path) -> Result<Served> {
    let (from, to) = (folder.join("from.raw"), folder.join("to.qed"));
    std::fs::write(&from, contents())?;
    let options = CreateOptions { size: Some(DISK_BYTES), ..CreateOptions::default() };
    create(&DiskHost::default(), &to, Format::Qed, &options)?;

    let limits = Limits { requests: DEPTH, ..Limits::default() };
    let mut engine = Engine::new(Aio::new(AioOptions::default())?, limits);
    let mut open_disk = |path: &Path, format, write| -> Result<NodeId> {
        let options = OpenOptions { format: Some(format), write, ..OpenOptions::default() };
        let image = open(&DiskHost { direct: true }, path, &options)?;
        Ok(attach(&mut engine, image, &RunOptions::default())?)
    };
    let from = open_disk(&from, Format::Raw, false)?;
    let to = open_disk(&to, Format::Qed, true)?;
    let free = (0..DEPTH).map(|_| Buf::zeroed(BLOCK as usize).into()).collect();
    let mut copier = Copier { engine, from, to, begun: 0, copied: 0, free };

    let mut poll = Poll::new()?;
    let (question, mut questions) = pipe::new()?;
    poll.registry().register(&mut questions, QUESTIONS, Interest::READABLE)?;
    let fd = copier.engine.fd().ok_or("this backend has no descriptor")?.as_raw_fd();
    poll.registry().register(&mut SourceFd(&fd), DISK, Interest::READABLE)?;

    let (answer, answers) = channel();
    let asker = std::thread::spawn(move || {
        let mut question = question;
        question.set_nonblocking(false)?;
        // Until the copier has hung up.
        while question.write_all(b"?").is_ok() && answers.recv().is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        io::Result::Ok(())
    });

    let mut served = Served::default();
    let mut events = Events::with_capacity(16);
    let mut heartbeat = clock().plus_ms(HEARTBEAT_MS);
    copier.go_on()?;
    loop {
        // After any submission: run, then drain `poll`. That may have submitted more: run again
        // rather than wait.
        let mut more = copier.engine.run(clock()).again;
        while let Some(done) = copier.engine.poll() {
            copier.finished(done)?;
            copier.go_on()?;
            more = true;
        }
        if let Some(result) = copier.engine.drained() {
            result?;
            break;
        }
        if copier.copied == DISK_BYTES / BLOCK {
            // All is copied: leave the new image clean and stable. Drained are all, and it is one
            // more reason to run.
            copier.engine.drain();
            more = true;
        }

        let now = clock();
        let until = copier.engine.next_deadline().map_or(heartbeat, |due| due.min(heartbeat));
        let timeout = if more { 0 } else { until.since(now) };
        match poll.poll(&mut events, Some(Duration::from_nanos(timeout))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        }
        if events.iter().any(|event| event.token() == QUESTIONS) {
            let asked = take_all(&mut questions)?;
            answer_questions(asked, copier.copied, &answer, &mut served);
        }
        let now = clock();
        if now >= heartbeat {
            served.beats += u64::from(copier.engine.in_flight() > 0);
            heartbeat = now.plus_ms(HEARTBEAT_MS);
        }
    }
    drop((questions, answer));
    asker.join().map_err(|_| "the asker panicked")??;
    served.copied = copier.copied;
    Ok(served)
}

/// Reads a pipe until there is nothing left in it: mio will not say a second time that there is.
fn take_all(pipe: &mut pipe::Receiver) -> io::Result<usize> {
    let (mut taken, mut bytes) = (0, [0; 64]);
    loop {
        match pipe.read(&mut bytes) {
            Ok(0) => return Ok(taken),
            Ok(count) => taken += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn answer_questions(asked: usize, copied: u64, answer: &Sender<u64>, served: &mut Served) {
    for _ in 0..asked {
        // Who asked may have gone.
        served.answers += u64::from(answer.send(copied).is_ok());
    }
}

/// What the image that is copied holds.
pub fn contents() -> Vec<u8> {
    (0..DISK_BYTES).map(|at| (at / 512 % 251) as u8).collect()
}

#[allow(dead_code, reason = "a test runs `serve` by itself")]
fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let served = serve(folder.path())?;
    println!("{served:#?}");
    Ok(())
}
