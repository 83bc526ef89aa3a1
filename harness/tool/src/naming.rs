//! How images are named on the command line, and what is followed of what they name themselves.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use cowbell_formats::chain::{driver_named, open_named};
use cowbell_formats::{Chain, Error, Format, Host, Name, OpenOptions, Policy};

use crate::fail::Fail;

/// The options that say how to take an image's name.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Naming {
    /// The image is named by options, as driver=qcow2,file.filename=NAME
    #[arg(long)]
    image_opts: bool,
    /// No object is of use here: each is refused by its type
    #[arg(long = "object", value_name = "OBJDEF", hide = true)]
    objects: Vec<String>,
    /// Follow no name in the image to another folder, and to no backing file
    #[arg(long, help_heading = "Beyond QEMU")]
    untrusted: bool,
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
}

impl Naming {
    /// The image `given`, with the value of `-f`.
    pub fn image(&self, given: &OsStr, format: Option<&str>) -> Result<Image, Fail> {
        refuse_objects(&self.objects)?;
        let open = |why| Fail::open(Path::new(given), why);
        let named = if self.image_opts {
            if format.is_some() {
                return Err(Fail::other("--image-opts and --format are mutually exclusive"));
            }
            Name::from_options(given).map_err(open)?
        } else {
            Name::parse(given).map_err(open)?
        };
        let said = format.map(driver_named).transpose().map_err(open)?;
        Ok(Image {
            given: given.into(),
            format: said.or(named.format),
            name: named,
            untrusted: self.untrusted,
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
pub fn target(given: &OsString) -> Result<PathBuf, Fail> {
    let at = |why: Error| Fail::file(Path::new(given), why);
    if given.as_encoded_bytes().starts_with(b"json:") {
        return Err(at(Error::Unsupported("Unknown protocol 'json'".into())));
    }
    Name::parse(given).map(|name| name.path).map_err(at)
}

impl Image {
    /// A plain path.
    pub fn plain(path: &Path, format: Option<Format>) -> Image {
        let name = Name::plain(path, format);
        Image { given: path.into(), name, format, untrusted: false }
    }

    /// The image's own file.
    pub fn path(&self) -> &Path {
        &self.name.path
    }

    /// How to open it: the names in it are followed as QEMU follows them, unless it is untrusted.
    pub fn options(&self, write: bool) -> OpenOptions {
        let options = OpenOptions { format: self.format, write, ..OpenOptions::default() };
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
