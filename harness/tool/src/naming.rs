//! How images are named on the command line, and what is followed of what they name themselves.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::slice;

use cowbell_formats::chain::{driver_named, open_named};
use cowbell_formats::name::{Backing, is_remote};
use cowbell_formats::{
    Chain, CreateOptions, Error, Format, Host, Name, OpenOptions, Policy, create,
};

use cowbell_engine::sys::lock::Locking;
use cowbell_sim::kept::{path_of, word_of};

use crate::disk::{Files, address};
use crate::fail::Fail;
use crate::locking;

/// The options that say how to take an image's name.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Naming {
    /// The image is named by options, as driver=qcow2,file.filename=NAME
    #[arg(long)]
    image_opts: bool,
    /// No object is of use here: each is refused by its type
    #[arg(long = "object", value_name = "OBJDEF", hide = true)]
    objects: Vec<String>,
    /// Read although another program may write the image meanwhile
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Follow no name in the image to another folder, and to no backing file
    #[arg(long, help_heading = "Beyond QEMU")]
    untrusted: bool,
    /// Options that belong to the image beside its name, as driver=qcow2.
    #[arg(skip)]
    more: OsString,
}

/// An image on the command line.
#[derive(Clone, Debug)]
pub struct Image {
    /// As it was named.
    pub given: PathBuf,
    /// What that means.
    pub name: Name,
    /// Its format; `None` to probe.
    pub format: Option<Format>,
    /// Names in it are not followed.
    untrusted: bool,
    /// Others may write it meanwhile.
    force_share: bool,
    /// Its locks are held already, by this command.
    locked: bool,
}

impl Naming {
    /// Are images named by options?
    pub fn is_by_options(&self) -> bool {
        self.image_opts
    }

    /// The same, for an image that is named by options.
    pub fn by_options(&self) -> Naming {
        Naming { image_opts: true, ..self.clone() }
    }

    /// The same, for an image that is named by its name.
    pub fn by_name(&self) -> Naming {
        Naming { image_opts: false, ..self.clone() }
    }

    /// The same, for an image that others may write meanwhile.
    pub fn sharing(&self, force_share: bool) -> Naming {
        Naming { force_share, ..self.clone() }
    }

    /// The same, for an image that has more options than its name says.
    pub fn with_options(&self, more: &str) -> Naming {
        Naming { more: more.into(), ..self.clone() }
    }

    /// The image `given`, with the value of `-f`.
    pub fn image(&self, given: &OsStr, format: Option<&str>) -> Result<Image, Fail> {
        refuse_objects(&self.objects)?;
        let open = |why| Fail::open(Path::new(given), why);
        let mut named = if self.image_opts {
            if format.is_some() {
                return Err(Fail::other("--image-opts and --format are mutually exclusive"));
            }
            Name::from_options(given).map_err(open)?
        } else {
            let name = Name::parse(given).map_err(open)?;
            if is_remote(&name.path) && !self.more.is_empty() {
                return Err(open(Error::Unsupported("options beside an address".into())));
            } else if self.more.is_empty() {
                name
            } else if given.as_encoded_bytes().starts_with(b"json:") {
                let what = "options beside a name in JSON";
                return Err(open(Error::Unsupported(what.into())));
            } else {
                let mut options = self.more.clone().into_vec();
                options.extend_from_slice(b",file.filename=");
                for &byte in name.path.as_os_str().as_bytes() {
                    options.extend_from_slice(if byte == b',' {
                        b",,"
                    } else {
                        slice::from_ref(&byte)
                    });
                }
                Name::from_options(&OsString::from_vec(options)).map_err(open)?
            }
        };
        if is_remote(&named.path) {
            // Early, and in one spelling.
            let address =
                address(&named.path).map_err(|why| Fail::open_io(Path::new(given), &why))?;
            named.path = address.to_string().into();
        }
        let said = format.map(driver_named).transpose().map_err(open)?;
        Ok(Image {
            given: given.into(),
            format: said.or(named.format),
            name: named,
            untrusted: self.untrusted,
            force_share: self.force_share,
            locked: false,
        })
    }
}

/// `--object`: encryption is what they are for.
pub fn refuse_objects(objects: &[String]) -> Result<(), Fail> {
    let Some(object) = objects.first() else { return Ok(()) };
    let kind = object.split(',').next().unwrap_or_default();
    let kind = kind.strip_prefix("qom-type=").unwrap_or(kind);
    Err(Fail::other(format!("--object: objects of type '{kind}' are not supported")))
}

/// A target to make: a path, perhaps as `file:PATH`.
pub fn target(given: &OsStr) -> Result<PathBuf, Fail> {
    let at = |why: Error| Fail::file(Path::new(given), why);
    if given.as_encoded_bytes().starts_with(b"json:") {
        return Err(at(Error::Unsupported("Unknown protocol 'json'".into())));
    }
    let path = Name::parse(given).map_err(at)?.path;
    if is_remote(&path) {
        let what = "a server's disk is not made; to write one that is there, say -n";
        return Err(at(Error::Unsupported(what.into())));
    }
    Ok(path)
}

impl Image {
    /// A plain path.
    pub fn plain(path: &Path, format: Option<Format>) -> Image {
        let name = Name::plain(path, format);
        Image {
            given: path.into(),
            name,
            format,
            untrusted: false,
            force_share: false,
            locked: false,
        }
    }

    /// An empty image of the same size, backed by this one. Its file is gone when it is closed: who
    /// holds what comes with it can open it until then.
    pub fn overlay(&self) -> Result<(Image, fs::File), Fail> {
        let host = Files::default();
        let size = Some(self.open(&host, false)?.size());
        let name = format!("cowbell-{}-{:08x}", std::process::id(), host.entropy());
        let path = std::env::temp_dir().join(name);
        let options = CreateOptions { size, ..CreateOptions::default() };
        create(&host, &path, Format::Qcow2, &options).map_err(|why| self.failed(why))?;
        let file = fs::File::open(&path);
        let removed = fs::remove_file(&path);
        let file = file.map_err(|error| Fail::open_io(&path, &error))?;
        removed.map_err(|error| Fail::open_io(&path, &error))?;
        let backing = Name { format: self.format, ..self.name.clone() };
        let name = Name {
            backing: Backing::Named(Box::new(backing)),
            ..Name::plain(format!("/proc/self/fd/{}", file.as_raw_fd()), Some(Format::Qcow2))
        };
        Ok((Image { format: name.format, name, ..self.clone() }, file))
    }

    /// The same, beside a holder of its locks that is this command.
    pub fn locked(self) -> Image {
        Image { locked: true, ..self }
    }

    /// The image's own file.
    pub fn path(&self) -> &Path {
        &self.name.path
    }

    /// How to open it: the names in it are followed as QEMU follows them, unless it is untrusted.
    pub fn options(&self, write: bool) -> OpenOptions {
        let options = OpenOptions {
            format: self.format,
            write,
            locking: if self.locked { Locking::Off } else { locking::chosen() },
            force_share: self.force_share,
            ..OpenOptions::default()
        };
        let options = self.name.locking(&options);
        if self.untrusted {
            return options;
        }
        OpenOptions { backing: Policy::Any, files: Policy::Any, ..options }
    }

    /// It may be written, as far as its name says.
    pub fn check_writable(&self) -> Result<(), Fail> {
        if !self.name.read_only {
            return Ok(());
        }
        Err(self.failed(Error::Invalid("Block node is read-only".into())))
    }

    /// The image and what it is backed by.
    pub fn open<H: Host>(&self, host: &H, write: bool) -> Result<Chain<H::File>, Fail> {
        open_named(host, &self.name, &self.options(write)).map_err(|why| self.failed(why))
    }

    /// The same, for reading, beside a holder of its locks that is this command.
    pub fn open_unlocked<H: Host>(&self, host: &H) -> Result<Chain<H::File>, Fail> {
        let options = OpenOptions { locking: Locking::Off, ..self.options(false) };
        open_named(host, &self.name, &options).map_err(|why| self.failed(why))
    }

    /// The same, only to say what it is.
    pub fn describe<H: Host>(&self, host: &H) -> Result<Chain<H::File>, Fail> {
        let options = OpenOptions { describe: true, ..self.options(false) };
        open_named(host, &self.name, &options).map_err(|why| self.failed(why))
    }

    /// It could not be opened.
    pub fn failed(&self, why: Error) -> Fail {
        Fail::open(&self.given, why)
    }
}

impl Image {
    /// All that decides how it is opened, locks apart, as words for a record.
    pub fn to_words(&self) -> String {
        let format = self.format.map_or("-", Format::name);
        let mut words = format!("{} {format} {}", word_of(&self.given), u8::from(self.untrusted));
        let mut name = Some(&self.name);
        while let Some(its) = name {
            let format = its.format.map_or("-", Format::name);
            let (backing, below) = match &its.backing {
                Backing::AsImageSays => ("asked", None),
                Backing::Nothing => ("none", None),
                Backing::Named(below) => ("named", Some(&**below)),
            };
            let read_only = u8::from(its.read_only);
            words.push_str(&format!(" {} {format} {read_only} {backing}", word_of(&its.path)));
            name = below;
        }
        words
    }

    /// The same image. `None`: these are no such words.
    pub fn from_words(words: &str) -> Option<Image> {
        let mut words = words.split(' ');
        let given = path_of(words.next()?)?;
        let format = format_of(words.next()?)?;
        let untrusted = words.next()? == "1";
        let mut names = Vec::new();
        loop {
            let (path, format) = (path_of(words.next()?)?, format_of(words.next()?)?);
            let read_only = words.next()? == "1";
            let backing = words.next()?;
            names.push((Name { read_only, ..Name::plain(path, format) }, backing));
            if backing != "named" {
                break;
            }
        }
        let name = names.into_iter().rev().fold(None, |below: Option<Name>, (name, backing)| {
            let backing = match (backing, below) {
                ("none", _) => Backing::Nothing,
                (_, Some(below)) => Backing::Named(Box::new(below)),
                (_, None) => Backing::AsImageSays,
            };
            Some(Name { backing, ..name })
        });
        Some(Image { given, name: name?, format, untrusted, force_share: false, locked: false })
    }
}

fn format_of(word: &str) -> Option<Option<Format>> {
    if word == "-" { Some(None) } else { Format::from_name(word).map(Some) }
}
