//! Where what is said goes. Standard output is buffered, and there is no panic when nobody reads it.

use std::fs;
use std::io::{self, BufWriter, IsTerminal, Stdout, Write};
use std::path::Path;

use crate::fail::Fail;

/// Writes a file, anew.
pub fn to_file(path: &Path, text: impl AsRef<[u8]>) -> Result<(), Fail> {
    fs::write(path, text).map_err(|error| Fail::at(path, error))
}

/// Standard output.
#[derive(Debug)]
pub struct Out {
    to: BufWriter<Stdout>,
    quiet: bool,
    colour: bool,
}

impl Out {
    /// Standard output; one that swallows everything if `quiet`.
    pub fn new(quiet: bool) -> Out {
        let stdout = io::stdout();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colour = stdout.is_terminal() && !plain;
        Out { to: BufWriter::new(stdout), quiet, colour }
    }

    /// `text` in the colour of this SGR code, on a terminal.
    pub fn paint(&self, sgr: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_string() }
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.quiet { Ok(bytes.len()) } else { self.to.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
