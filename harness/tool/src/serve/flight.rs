//! `--flight`: the last that was done is kept, and drawn when something goes wrong.
//!
//! What is recorded is not written to a file. It stays in memory until there is enough of it; then a second engine, on a
//! thread, does the oldest part again, as `replay` does. So that engine is always where the kept part begins, and when
//! somebody wants to see it, it does the kept part, too, and draws what it sees.
//!
//! The loop waits for nothing of that: it hands over what was recorded. If the thread falls behind by more than a few pieces, the
//! recording ends.

use std::collections::VecDeque;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use cowbell_engine::record::{Recorder, Sink};
use cowbell_sim::played::Verdict;

use crate::disk::Disk;
use crate::fail::Fail;
use crate::form::Form;
use crate::record::{Replay, Told, again};
use crate::session::eprint_quietly;

/// Bytes that are kept at least: 16, for a request, are few.
pub const KEPT_MIN: u64 = 64 << 10;
/// And at most: what is drawn has to be looked at.
pub const KEPT_MAX: u64 = 16 << 20;
/// Pieces that the kept part consists of.
const PIECES: usize = 4;
/// Pieces on their way to the thread at once.
const AHEAD: usize = 64;
/// Drawn so many times at most: each time is a file.
const FILES_MAX: u32 = 100;

/// What the thread is told.
enum Message {
    /// That was recorded.
    Piece(Vec<u8>),
    /// Draw what is kept: this has happened.
    Draw(String),
}

/// See the module.
pub struct Flight {
    thread: Option<JoinHandle<()>>,
    tell: Option<SyncSender<Message>>,
    /// A request has failed, and that was drawn.
    has_failed: bool,
}

impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flight")
    }
}

/// Hands over what was recorded.
struct Pieces(SyncSender<Message>);

impl Sink for Pieces {
    fn take(&mut self, piece: Vec<u8>) -> Option<Vec<u8>> {
        let next = Vec::with_capacity(piece.capacity());
        self.0.try_send(Message::Piece(piece)).ok().map(|()| next)
    }
}

impl Flight {
    /// From now on the last `kept` bytes of what is recorded are drawn into files called like `path` when somebody
    /// [wants](Flight::draw) it.
    pub fn begin(
        path: &Path,
        kept: u64,
        told: Told,
        recorder: &mut Recorder<Disk>,
    ) -> Result<Flight, Fail> {
        let form = Form::of(path)?;
        let size = kept as usize / PIECES;
        let (tell, messages) = sync_channel(AHEAD);
        let head = told.finish(recorder.infos());
        let path = path.to_path_buf();
        // An engine of this kind stays on its thread, which says whether there is one.
        let (say_begun, begun) = sync_channel(1);
        let follow = move || match Follower::new(&head, path, form, kept) {
            Ok(follower) => {
                let _ = say_begun.send(Ok(()));
                follower.follow(&messages);
            }
            Err(why) => drop(say_begun.send(Err(why))),
        };
        let thread = thread::Builder::new().name("cowbell-flight".into()).spawn(follow)?;
        begun.recv().map_err(Fail::other)??;
        recorder.start_with(Box::new(Pieces(tell.clone())), size);
        Ok(Flight { thread: Some(thread), tell: Some(tell), has_failed: false })
    }

    /// What is kept is drawn, as soon as the thread has the time. `why`: what has happened.
    pub fn draw(&mut self, why: &str, recorder: &mut Recorder<Disk>) {
        recorder.hand_over();
        let told = self.tell.iter().map(|tell| tell.try_send(Message::Draw(why.into())));
        if !recorder.is_recording() || told.flatten().next().is_none() {
            say("the recorder of the last requests has fallen behind, and draws nothing any more");
            self.tell = None;
        }
    }

    /// A request has failed: the first one is a reason to draw.
    pub fn failed(&mut self, why: &str, recorder: &mut Recorder<Disk>) {
        if !std::mem::replace(&mut self.has_failed, true) {
            self.draw(why, recorder);
        }
    }
}

/// Waits until what was asked for is drawn. The engine is gone, and with it the last piece has come.
impl Drop for Flight {
    fn drop(&mut self) {
        if let Some(tell) = self.tell.take().filter(|_| thread::panicking()) {
            let _ = tell.send(Message::Draw("the server has panicked".into()));
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The engine on the thread.
struct Follower {
    player: Replay,
    /// What it has not done yet.
    kept: VecDeque<Vec<u8>>,
    /// Bytes of it, and how many these may be.
    len: usize,
    most: usize,
    /// What was not as recorded.
    verdict: Verdict,
    about: Vec<String>,
    path: PathBuf,
    form: Form,
    /// Times that it has drawn.
    drawn: u32,
}

impl Follower {
    fn new(head: &str, path: PathBuf, form: Form, most: u64) -> Result<Follower, Fail> {
        let (player, about) = again(head.as_bytes(), &path)?;
        let (kept, most, verdict) = (VecDeque::new(), most as usize, Verdict::Same);
        Ok(Follower { player, kept, len: 0, most, verdict, about, path, form, drawn: 0 })
    }

    /// Until nobody tells it anything.
    fn follow(mut self, messages: &Receiver<Message>) {
        for message in messages {
            match message {
                Message::Piece(piece) => {
                    self.len += piece.len();
                    self.kept.push_back(piece);
                    while self.len > self.most {
                        let Some(oldest) = self.kept.pop_front() else { break };
                        self.len -= oldest.len();
                        self.does(oldest);
                    }
                }
                Message::Draw(why) => self.draw(&why),
            }
        }
    }

    /// Does a piece again, unseen.
    fn does(&mut self, piece: Vec<u8>) {
        if self.verdict == Verdict::Same {
            self.player.goes_on(piece);
            self.verdict = self.player.play(&mut |_, _| true);
        }
    }

    /// Does all that is kept, and draws it. What comes next is kept anew.
    fn draw(&mut self, why: &str) {
        let kept: Vec<u8> = self.kept.drain(..).flatten().collect();
        self.len = 0;
        if let Verdict::Differs(how) | Verdict::Untold(how) = &self.verdict {
            return say(&format!("the last requests cannot be drawn: {how}"));
        }
        if self.drawn == FILES_MAX {
            return;
        }
        self.drawn += 1;
        self.player.goes_on(kept);
        let title = (why.to_string(), self.about.clone());
        let (verdict, mut timeline) = self.player.play_seen(title, 0, &mut |_, _| true);
        self.verdict = verdict;
        if let Verdict::Untold(name) = &self.verdict {
            timeline.about.push(format!("what came after a call of {name} is not known"));
        }
        let path = self.next_path();
        match self.form.draw(&timeline, &path) {
            Ok(()) => say(&format!("{why}: see {}", path.display())),
            Err(_) => say(&format!("{why}: {} cannot be written", path.display())),
        }
    }

    /// The path that was given; from the second time on with a number: `last.html`, `last.2.html`.
    fn next_path(&self) -> PathBuf {
        match self.drawn {
            1 => self.path.clone(),
            number => {
                let extension = self.path.extension().unwrap_or_default().display();
                self.path.with_extension(format!("{number}.{extension}"))
            }
        }
    }
}

fn say(what: &str) {
    eprint_quietly(&format!("cowbell serve: {what}\n"));
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use clap::Parser;
    use cowbell_engine::step::Io;
    use cowbell_engine::sys::clock;

    use super::*;
    use crate::cache::{Cache, How};
    use crate::naming::Naming;
    use crate::serve::disks::{Disks, Opening};
    use crate::serve::limit::Limits;

    #[derive(clap::Parser)]
    struct Names {
        #[command(flatten)]
        naming: Naming,
    }

    #[test]
    fn the_last_before_a_panic_is_drawn() {
        let folder = tempfile::tempdir().expect("a folder");
        let [image, page] = ["i", "last.html"].map(|name| folder.path().join(name));
        fs::write(&image, [0; 65536]).expect("an image");
        let naming = Names::parse_from(["x"]).naming;
        let opening = Opening {
            naming: &naming,
            format: Some("raw"),
            read_only: false,
            snapshot: false,
            cache: Cache::named("writeback").expect("there is one"),
            how: How::Threads,
            record: None,
            flight: Some((&page, KEPT_MIN)),
            limits: &Limits::parse(&[], &[], &[]).expect("none"),
        };
        let Ok(mut disks) = Disks::open(&[image.into()], &opening) else { panic!("it opens") };
        let panics = move || {
            disks.submit(0, Io::write(4096, 512), cowbell_engine::mem::Buf::zeroed(512), 1);
            disks.engine.run(clock());
            panic!("a test does");
        };
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        let page = fs::read_to_string(page).expect("it was drawn");
        assert!(
            page.contains("the server has panicked") && page.contains("the guest submits: write ")
        );
    }
}
