//! Whether images are locked: one choice for the whole command, as their users make it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cowbell_engine::sys::lock::Locking;
use cowbell_formats::error::Shown;

use crate::session::eprint_quietly;

static CHOSEN: OnceLock<Locking> = OnceLock::new();

/// Reads the value of `--locking`.
pub fn named(name: &str) -> Result<Locking, String> {
    match name {
        "auto" => Ok(Locking::Auto),
        "on" => Ok(Locking::On),
        "off" => Ok(Locking::Off),
        _ => Err("auto, on or off".into()),
    }
}

/// From now on, images are locked so.
pub fn choose(locking: Locking) {
    // It is chosen once, before anything is opened.
    let _ = CHOSEN.set(locking);
}

/// How to lock images.
pub fn chosen() -> Locking {
    CHOSEN.get().copied().unwrap_or_default()
}

/// Says which files are written without a lock although one was wanted.
pub fn warn(unlockable: &[PathBuf]) {
    for path in unlockable {
        warn_of(path);
    }
}

/// Says that `path` is written without a lock although one was wanted.
pub fn warn_of(path: &Path) {
    eprint_quietly(&format!(
        "WARNING: '{}' cannot be locked on its file system: make sure that no other program \
         writes it.\n",
        Shown(path)
    ));
}
