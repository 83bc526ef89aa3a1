//! Ctrl-C: long work notices it, ends what is under way, and leaves everything consistent.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use cowbell_engine::sys::clock;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// What comes sooner after the first signal is the same wish: `timeout`, and many a terminal, send it to a
/// process and to its group.
const AGAIN_NS: u64 = 300_000_000;

/// Has somebody asked us to stop?
#[derive(Clone, Debug)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on SIGINT and SIGTERM only ask; one that comes [later](AGAIN_NS) than the first ends the
    /// process as ever.
    pub fn on_signals() -> io::Result<Stop> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            flag::register(signal, Arc::clone(&asked))?;
        }
        // On a thread of its own, which is there also when the work hangs.
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        thread::Builder::new().name("signals".into()).spawn(move || {
            let mut first = None;
            for signal in signals.forever() {
                if clock().since(*first.get_or_insert(clock())) >= AGAIN_NS {
                    // It does not fail for these two.
                    let _ = emulate_default_handler(signal);
                }
            }
        })?;
        Ok(Stop(asked))
    }

    /// Has somebody?
    #[inline]
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
