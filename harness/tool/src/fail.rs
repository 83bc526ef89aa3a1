//! How a verb fails, and how that is said: one line, in the words of the program we are called as.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cowbell_engine::units::Errno;
use cowbell_formats::Error;
use cowbell_formats::error::Shown;

/// Which program this is: the name it was called by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    /// Itself.
    Cowbell,
    /// QEMU's image tool.
    QemuImg,
    /// QEMU's I/O exerciser.
    QemuIo,
}

impl Program {
    /// From the first argument; whoever calls us something else means us.
    pub fn called_as(argument: Option<&Path>) -> Program {
        match argument.and_then(Path::file_name).and_then(|name| name.to_str()) {
            Some("qemu-img") => Program::QemuImg,
            Some("qemu-io") => Program::QemuIo,
            _ => Program::Cowbell,
        }
    }

    /// The line that says which version this is: of QEMU's programs, the one whose options and
    /// output are ours. Scripts look for `version` and a number behind it.
    pub fn version(self) -> String {
        let own = env!("CARGO_PKG_VERSION");
        match self {
            Program::Cowbell => format!("cowbell {own}"),
            Program::QemuImg | Program::QemuIo => {
                format!("{} version 10.0.2 (cowbell {own})", self.name())
            }
        }
    }

    /// The name to put before an error.
    pub fn name(self) -> &'static str {
        match self {
            Program::Cowbell => "cowbell",
            Program::QemuImg => "qemu-img",
            Program::QemuIo => "qemu-io",
        }
    }
}

/// Why a verb failed.
#[derive(Debug)]
pub struct Fail {
    what: What,
    /// The exit code.
    code: u8,
}

#[derive(Debug)]
enum What {
    /// The arguments; and where to read about them.
    Usage { what: String, help: String },
    /// An image that could not be opened.
    Open { file: PathBuf, why: Error },
    /// Something about a file; QEMU names the file too.
    File { file: PathBuf, what: String },
    /// Something else; the file, where there is one, is for our own users.
    Other { file: Option<PathBuf>, what: String },
    /// Nobody reads our output any more.
    Unread,
    /// Said already.
    Said,
}

impl Fail {
    fn new(what: What) -> Fail {
        Fail { what, code: 1 }
    }

    /// The arguments make no sense.
    pub fn usage(what: String, help: String) -> Fail {
        Fail::new(What::Usage { what, help })
    }

    /// `file` could not be opened.
    pub fn open(file: &Path, why: Error) -> Fail {
        Fail::new(What::Open { file: file.into(), why })
    }

    /// `file` could not be opened; an operating system's reason.
    pub fn open_io(file: &Path, why: &io::Error) -> Fail {
        let errno = Errno::from_io(why);
        let why = why.raw_os_error().map_or(why.to_string(), |_| errno.to_string());
        Fail::open(file, Error::Open { path: file.into(), errno, why })
    }

    /// Something is wrong about `file`.
    pub fn file(file: &Path, what: impl ToString) -> Fail {
        Fail::new(What::File { file: file.into(), what: what.to_string() })
    }

    /// Something went wrong while working on `file`; for QEMU, that says it all.
    pub fn at(file: &Path, what: impl ToString) -> Fail {
        Fail::new(What::Other { file: Some(file.into()), what: what.to_string() })
    }

    /// Something else.
    pub fn other(what: impl ToString) -> Fail {
        Fail::new(What::Other { file: None, what: what.to_string() })
    }

    /// Everything there is to say was said.
    pub fn said(code: u8) -> Fail {
        Fail { what: What::Said, code }
    }

    /// The same with another exit code.
    #[must_use]
    pub fn with_code(self, code: u8) -> Fail {
        Fail { code, ..self }
    }

    /// Says so on standard error, and answers the exit code.
    pub fn report(self, program: Program, verb: &str) -> ExitCode {
        if let Some(line) = self.line(program, verb) {
            // What happens on standard error is beyond help.
            let _ = io::Write::write_all(&mut io::stderr(), line.as_bytes());
        }
        ExitCode::from(self.code)
    }

    /// The error's text with its line end; `None` if there is nothing to say.
    pub fn line(&self, program: Program, verb: &str) -> Option<String> {
        let name = program.name();
        if program == Program::Cowbell {
            let verb = if verb.is_empty() { String::new() } else { format!(" {verb}:") };
            let start = format!("cowbell:{verb}");
            return Some(match &self.what {
                What::Usage { what, help } => {
                    let help = help.replacen("Try", "try", 1).replace(" for more info", "");
                    format!("{start} {what} ({help})\n")
                }
                What::Open { file, why } => {
                    format!("{start} {}: {}\n", Shown(file), short(file, why))
                }
                What::File { file, what } | What::Other { file: Some(file), what } => {
                    format!("{start} {}: {what}\n", Shown(file))
                }
                What::Other { file: None, what } => format!("{start} {what}\n"),
                What::Unread | What::Said => return None,
            });
        }
        Some(match &self.what {
            What::Usage { what, help } => {
                // Mistakes in options are found by the library that QEMU parses them with.
                let lower = what.starts_with(char::is_lowercase);
                let is_named = lower && !verb.is_empty();
                let verb = if is_named { format!(" {verb}") } else { String::new() };
                format!("{name}{verb}: {what}\n{help}\n")
            }
            What::Open { file, why } if program == Program::QemuIo => {
                format!("{name}: can't open device {}: {why}\n", Shown(file))
            }
            What::Open { file, why } => {
                format!("{name}: Could not open '{}': {why}\n", Shown(file))
            }
            What::File { file, what } => format!("{name}: {}: {what}\n", Shown(file)),
            What::Other { what, .. } => format!("{name}: {what}\n"),
            What::Unread | What::Said => return None,
        })
    }
}

/// `why`, without naming `file` once more.
fn short(file: &Path, why: &Error) -> String {
    match why {
        Error::Open { path, why, .. } if path == file => why.clone(),
        // What QEMU says of options that only it has.
        Error::Invalid(what) if what.starts_with("aio=native") => {
            "native AIO needs -t none or -t directsync".into()
        }
        why => why.to_string(),
    }
}

/// Output that could not be written: its reader is gone, or the disk is full.
impl From<io::Error> for Fail {
    fn from(error: io::Error) -> Fail {
        if error.kind() == io::ErrorKind::BrokenPipe {
            // What a shell reports of a program that is ended by SIGPIPE.
            return Fail { what: What::Unread, code: 141 };
        }
        Fail::other(format!("standard output: {}", Errno::from_io(&error)))
    }
}
