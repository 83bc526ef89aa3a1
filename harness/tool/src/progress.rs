//! How far long work is: for people, and for programs.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowbell_engine::sys::clock;
use cowbell_engine::units::Time;
use signal_hook::consts::SIGUSR1;
use signal_hook::flag;

use crate::fail::{Fail, Program};
use crate::number::human;
use crate::session::eprint_quietly;

/// What is shown on standard output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shown {
    /// Nothing.
    Nothing,
    /// A percentage, over the one before, as QEMU shows it.
    Lines,
    /// A bar, with the rate and the time left.
    Bar,
}

impl Shown {
    /// What is shown, if that is asked for: a bar on a terminal, by the command under its own name.
    pub fn asked_for(is_asked: bool, program: Program) -> Shown {
        match program {
            _ if !is_asked => Shown::Nothing,
            Program::Cowbell if io::stdout().is_terminal() => Shown::Bar,
            _ => Shown::Lines,
        }
    }
}

/// How far it is. On SIGUSR1 that is said on standard error.
#[derive(Debug)]
pub struct Progress {
    shown: Shown,
    /// Bytes of all that is to be done.
    total: u64,
    /// The percentage that was shown last.
    percent: f64,
    began: Time,
    /// When it was told to programs, and drawn, last.
    told: Time,
    fd: Option<File>,
    asked: Arc<AtomicBool>,
}

/// Less than this is not worth a new line.
const PERCENT_STEP: f64 = 1.0;
/// Between two that programs are told, or a bar is drawn.
const PAUSE_MS: u64 = 250;

const O_NONBLOCK: i32 = 0o4000;

impl Progress {
    /// Nothing is done of `total` bytes. Programs are told on the descriptor `fd`.
    pub fn new(shown: Shown, total: u64, fd: Option<u32>) -> Result<Progress, Fail> {
        let asked = Arc::new(AtomicBool::new(false));
        flag::register(SIGUSR1, Arc::clone(&asked))?;
        let open = |fd: u32| {
            // An open file of our own: who reads a pipe slowly does not hold us up.
            let path = format!("/proc/self/fd/{fd}");
            let file = OpenOptions::new().append(true).custom_flags(O_NONBLOCK).open(path);
            file.map_err(|why| Fail::other(format!("--progress-fd {fd}: {why}")))
        };
        let fd = fd.map(open).transpose()?;
        let began = clock();
        Ok(Progress { shown, total, percent: 0.0, began, told: began, fd, asked })
    }

    /// When it wants to be asked again although nothing may have happened.
    pub fn next(&self, now: Time) -> Option<Time> {
        let ticks = self.fd.is_some() || self.shown == Shown::Bar;
        ticks.then(|| now.plus_ms(PAUSE_MS))
    }

    /// So many bytes are done.
    pub fn reached(&mut self, done: u64) -> Result<(), Fail> {
        if self.asked.swap(false, Ordering::Relaxed) {
            eprint_quietly(&format!("    ({:.2}/100%)\n", self.percent_of(done)));
        }
        let ticks = self.fd.is_some() || self.shown == Shown::Bar;
        let is_due = ticks && clock().since(self.told) >= PAUSE_MS * 1_000_000;
        let is_further = self.percent_of(done) - self.percent > PERCENT_STEP;
        if is_due || self.shown == Shown::Lines && is_further {
            self.show(done)?;
        }
        Ok(())
    }

    fn percent_of(&self, done: u64) -> f64 {
        if self.total == 0 { 100.0 } else { done as f64 * 100.0 / self.total as f64 }
    }

    /// Shows and tells it now.
    pub fn show(&mut self, done: u64) -> Result<(), Fail> {
        self.percent = self.percent_of(done);
        self.told = clock();
        let seconds = self.told.since(self.began) as f64 / 1e9;
        let rate = if seconds > 0.0 { done as f64 / seconds } else { 0.0 };
        let mut out = io::stdout().lock();
        match self.shown {
            Shown::Nothing => {}
            Shown::Lines => write!(out, "    ({:.2}/100%)\r", self.percent)?,
            Shown::Bar => {
                const WIDTH: usize = 30;
                let full = (self.percent / 100.0 * WIDTH as f64) as usize;
                let bar = "█".repeat(full.min(WIDTH));
                let left = self.total.saturating_sub(done) as f64 / rate.max(1.0);
                let left = if rate > 0.0 { format!("{left:.0} s left") } else { String::new() };
                let (percent, rate) = (self.percent, human(rate as u64));
                // The rest of a longer line goes.
                write!(out, "\r{bar:<WIDTH$} {percent:5.1} %  {rate}/s  {left}\x1b[K")?;
            }
        }
        out.flush()?;
        let total = self.total;
        self.tell(&format!("{{\"done\":{done},\"total\":{total},\"rate\":{rate:.0}}}\n"));
        Ok(())
    }

    /// Tells programs this line, if some listen.
    pub fn tell(&mut self, line: &str) {
        if let Some(fd) = &mut self.fd {
            // Nobody there, or too slow: the next one tells more.
            let _ = fd.write(line.as_bytes());
        }
    }

    /// All is done.
    pub fn end(&mut self) -> Result<(), Fail> {
        self.show(self.total)?;
        if self.shown != Shown::Nothing {
            let mut out = io::stdout().lock();
            writeln!(out)?;
            out.flush()?;
        }
        Ok(())
    }
}
