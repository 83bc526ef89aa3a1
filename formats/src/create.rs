//! Making images: the options, their text form, and the files.
//!
//! In two steps. [`plan`] looks at the options and at the backing file and finds everything there
//! is to refuse; [`Plan::run`] makes the file. So a mistake never costs anybody an existing file,
//! and a failure on the way leaves no half-made one behind under the target's name.
//!
//! The text form is that of `qemu-img create -o`: `key=value,key=value`, a comma in a value doubled.

use std::ffi::OsStr;
use std::fmt;
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cowbell_engine::store::Store;
use cowbell_engine::sys::lock::{Lock, Locking};
use cowbell_engine::units::Errno;

use crate::chain::{self, Host, Layer, OpenOptions, Policy, backing_name};
use crate::error::{Error, Shown};
use crate::locks;
use crate::preallocation::{Preallocation, preallocate};
use crate::probe::{Foreign, Format};
use crate::qcow2;
use crate::qcow2::disk::header::Compression;
use crate::qed;
use crate::qed::disk::layout::{Header, OFFSET_MAX, SECTOR};
use crate::vdi;
use crate::vmdk;

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CreateOptions {
    /// The disk's size in bytes, rounded up to a multiple of 512; `None`: the backing file's.
    pub size: Option<u64>,
    /// The backing file's name as it shall be in the image; relative to the image's folder.
    pub backing_file: Option<PathBuf>,
    /// The backing file's format; has to be said where there is one.
    pub backing_format: Option<Format>,
    /// Do not look at the backing file; then the size has to be said.
    pub backing_unchecked: bool,
    /// Bytes in a cluster, a power of two. QED: from 4 KiB to 64 MiB; qcow2: from 512 to 2 MiB.
    /// 64 KiB if not said. VDI: bytes in a block, from 4 KiB to 256 MiB, 1 MiB if not said; QEMU
    /// reads no other.
    pub cluster_size: Option<u64>,
    /// QED: clusters in a table, a power of two from 1 to 16. 4 if not said.
    pub table_size: Option<u64>,
    /// VDI: all blocks are there from the start. Off if not said.
    pub fixed: Option<bool>,
    /// Raw, qcow2 and fixed VDI: how to take the space. Off if not said.
    pub preallocation: Option<Preallocation>,
    /// Ask the file system not to copy what is written over, where it would (btrfs); others need
    /// no asking. A wish: nothing fails for it.
    pub nocow: Option<bool>,
    /// qcow2: the version, as `v2` or `0.10`, `v3` or `1.1`. 3 if not said.
    pub compat: Option<String>,
    /// qcow2: where guest data goes, if not into the image; relative to the image's folder. This
    /// file is made too.
    pub data_file: Option<PathBuf>,
    /// qcow2: the data file is the disk, byte for byte.
    pub data_file_raw: Option<bool>,
    /// qcow2: refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// qcow2: bits in a refcount, a power of two from 1 to 64. 16 if not said.
    pub refcount_bits: Option<u64>,
    /// qcow2: clusters have subclusters.
    pub extended_l2: Option<bool>,
    /// qcow2: how compressed clusters will be compressed.
    pub compression_type: Option<Compression>,
    /// Lock the files while they are made; where the file system can, if not said. One that somebody
    /// else has open for writing, or as an image, is left as it is.
    pub locking: Locking,
    /// What only VMDK images have.
    pub vmdk: vmdk::rest::create::Wanted,
}

impl CreateOptions {
    /// Is it a qcow2 image of the old version, which has no extensions that go away by themselves?
    pub fn is_version_2(&self) -> bool {
        matches!(self.compat.as_deref(), Some("v2" | "0.10"))
    }

    /// Takes in an option string for an image of this format. May be called again: what is said
    /// later counts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], naming the option or its value.
    pub fn parse(&mut self, format: Format, text: &str) -> Result<(), Error> {
        for (key, value) in split_options(text) {
            self.set(format, &key, &value)?;
        }
        Ok(())
    }

    /// Sets one option for an image of this format.
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse).
    pub fn set(&mut self, format: Format, key: &str, value: &str) -> Result<(), Error> {
        let number = || option_number(key, value);
        match (format, key) {
            (_, "size") => self.size = Some(number()?),
            (_, "nocow") => self.nocow = Some(switch(key, value)?),
            (Format::Qed | Format::Qcow2 | Format::Vmdk, "backing_file") => {
                self.backing_file = Some(value.into());
            }
            (Format::Qed | Format::Qcow2 | Format::Vmdk, "backing_fmt") => {
                self.backing_format = Some(format_named(value)?);
            }
            (Format::Qed | Format::Qcow2, "cluster_size") => self.cluster_size = Some(number()?),
            (Format::Qed, "table_size") => self.table_size = Some(number()?),
            (Format::Vdi, "static") => self.fixed = Some(switch(key, value)?),
            (Format::Raw | Format::Qcow2 | Format::Vdi, "preallocation") => {
                let how = Preallocation::from_name(value).filter(|how| how.suits(format));
                self.preallocation = Some(how.ok_or_else(|| match format {
                    Format::Qcow2 => not_accepted(key, value),
                    _ => Error::Invalid(format!("invalid parameter value: {value}")),
                })?);
            }
            (Format::Qcow2, key) => return self.set_qcow2(key, value),
            (Format::Vmdk, key) => return self.vmdk.set(key, value),
            _ => return Err(Error::Invalid(format!("Invalid parameter '{key}'"))),
        }
        Ok(())
    }

    /// Sets an option that only qcow2 has.
    fn set_qcow2(&mut self, key: &str, value: &str) -> Result<(), Error> {
        let number = || option_number(key, value);
        let switch = || switch(key, value);
        match key {
            "compat" => match value {
                "v2" | "0.10" | "v3" | "1.1" => self.compat = Some(value.into()),
                _ => return Err(not_accepted("version", value)),
            },
            "compression_type" => {
                self.compression_type = Some(match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    _ => return Err(not_accepted("compression-type", value)),
                });
            }
            "data_file" => self.data_file = Some(value.into()),
            "data_file_raw" => self.data_file_raw = Some(switch()?),
            "extended_l2" => self.extended_l2 = Some(switch()?),
            "lazy_refcounts" => self.lazy_refcounts = Some(switch()?),
            "refcount_bits" => self.refcount_bits = Some(number()?),
            "encryption" if value == "off" => {}
            "encryption" => return Err(no_encryption("AES")),
            "encrypt.format" if value == "aes" => return Err(no_encryption("AES")),
            key if key.starts_with("encrypt.") => return Err(no_encryption("LUKS")),
            _ => return Err(Error::Invalid(format!("Invalid parameter '{key}'"))),
        }
        Ok(())
    }
}

/// The format of this name.
///
/// # Errors
///
/// [`Error::Invalid`].
pub fn format_named(name: &str) -> Result<Format, Error> {
    Format::from_name(name).ok_or_else(|| match Foreign::from_name(name) {
        Some(foreign) => {
            Error::Unsupported(format!("{} images are not supported", foreign.title()))
        }
        None => Error::Invalid(format!("Unknown file format '{name}'")),
    })
}

fn switch(key: &str, value: &str) -> Result<bool, Error> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(Error::Invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

fn not_accepted(key: &str, value: &str) -> Error {
    Error::Invalid(format!("Parameter '{key}' does not accept value '{value}'"))
}

fn no_encryption(how: &str) -> Error {
    Error::Unsupported(format!("{how} encryption of qcow2 images is not supported"))
}

fn no_backing_for(format: Format) -> Error {
    Error::Invalid(format!("Backing file not supported for file format '{format}'"))
}

/// `k=v` pairs between single commas; two commas are one within a value. A key alone is a switch
/// that is on, or off if `no` stands in front of it.
fn split_options(text: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut item = String::new();
    let mut chars = text.chars().peekable();
    loop {
        match chars.next() {
            Some(',') if chars.peek() == Some(&',') => {
                chars.next();
                item.push(',');
            }
            Some(c) if c != ',' => item.push(c),
            end => {
                if !item.is_empty() {
                    let (key, value) = match (item.split_once('='), item.strip_prefix("no")) {
                        (Some(pair), _) => pair,
                        (None, Some(key)) => (key, "off"),
                        (None, None) => (&item[..], "on"),
                    };
                    pairs.push((key.to_string(), value.to_string()));
                    item.clear();
                }
                if end.is_none() {
                    return pairs;
                }
            }
        }
    }
}

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadSize {
    /// It is no number, or has no such suffix, or is a fraction of a byte.
    NotANumber,
    /// It does not fit 64 bits, or is negative.
    OutOfRange,
}

/// A size in bytes: a decimal number with an optional suffix `b`, `k`, `M`, `G`, `T`, `P` or `E`
/// in either case (powers of 1024), a fraction only with one (`1.5G`, rounded down to a byte); or
/// `0x` and hexadecimal digits.
///
/// # Errors
///
/// [`BadSize`].
pub fn parse_size(text: &str) -> Result<u64, BadSize> {
    let text = text.trim_start();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(BadSize::NotANumber);
        }
        return match u64::from_str_radix(hex, 16) {
            Ok(size) if !negative || size == 0 => Ok(size),
            _ => Err(BadSize::OutOfRange),
        };
    }
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = text.split_at(digits(text));
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits(rest)),
        None => ("", rest),
    };
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(BadSize::NotANumber),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(BadSize::NotANumber);
    }
    // 19 digits times 2^60 fit 128 bits; digits behind them are worth less than a byte.
    let fraction = fraction.trim_end_matches('0');
    if !fraction.is_empty() && shift == 0 {
        return Err(BadSize::NotANumber);
    }
    let mut numerator = 0u128;
    let mut denominator = 1u128;
    for digit in fraction.bytes().take(19) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    let mut size = 0u128;
    for digit in whole.bytes() {
        size = size * 10 + u128::from(digit - b'0');
        if size > u128::from(u64::MAX) {
            return Err(BadSize::OutOfRange);
        }
    }
    let size = (size << shift) + (numerator << shift) / denominator;
    match u64::try_from(size) {
        Ok(size) if !negative || size == 0 => Ok(size),
        _ => Err(BadSize::OutOfRange),
    }
}

/// The size of a disk, as given on a command line.
///
/// # Errors
///
/// [`Error::Invalid`] with QEMU's text.
pub fn image_size(text: &str) -> Result<u64, Error> {
    match parse_size(text) {
        Ok(size) if size <= OFFSET_MAX => Ok(size),
        Err(BadSize::NotANumber) => {
            Err(Error::Invalid(format!("Invalid image size specified: '{text}'.")))
        }
        Ok(_) | Err(BadSize::OutOfRange) => Err(Error::Invalid(format!(
            "Invalid image size specified. Must be between 0 and {OFFSET_MAX}."
        ))),
    }
}

fn option_number(key: &str, value: &str) -> Result<u64, Error> {
    parse_size(value).map_err(|bad| {
        Error::Invalid(match bad {
            BadSize::OutOfRange => format!("Value '{value}' is out of range for parameter '{key}'"),
            BadSize::NotANumber => format!(
                "Parameter '{key}' expects a non-negative number below 2^64, \
                 with an optional suffix k, M, G, T, P or E"
            ),
        })
    })
}

/// An image that can be made: everything about it is known and valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    path: PathBuf,
    format: Format,
    size: u64,
    options: CreateOptions,
    made: Made,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Made {
    Raw { size: u64, preallocation: Preallocation },
    Qed { header: Header },
    Qcow2(Box<qcow2::rest::create::Plan>),
    Vmdk(Box<vmdk::rest::create::Options>),
    Vdi { header: Box<vdi::disk::layout::Header>, preallocation: Preallocation },
}

/// Finds out what image `options` ask for. Reads the backing file's size, and nothing else;
/// writes nothing.
///
/// # Errors
///
/// [`Error::Invalid`] naming the option; [`Error::Backing`] if the backing file cannot be opened;
/// [`Error::BackingLoop`] if the target is in its own backing chain;
/// [`Error::Unsupported`] for formats that cannot be made yet.
pub fn plan<H: Host>(
    host: &H,
    path: &Path,
    format: Format,
    options: &CreateOptions,
) -> Result<Plan, Error> {
    if let Some(key) = foreign_option(format, options) {
        return Err(Error::Invalid(format!("Invalid parameter '{key}'")));
    }
    let mut size = options.size;
    let mut parent = None;
    if options.backing_file.is_none() && options.backing_format.is_some() {
        match format {
            Format::Raw | Format::Vdi => {
                let what = format!("Backing file format not supported for file format '{format}'");
                return Err(Error::Invalid(what));
            }
            Format::Qcow2 => {
                let what = "Backing format cannot be used without backing file";
                return Err(Error::Invalid(what.into()));
            }
            // They record nothing of it, and QEMU says nothing.
            Format::Qed | Format::Vmdk => {}
        }
    }
    if options.backing_file.as_ref().is_some_and(|name| name.as_os_str().is_empty()) {
        return Err(Error::Invalid("Expected backing file name, got empty string".into()));
    }
    if let Some(name) = &options.backing_file {
        if matches!(format, Format::Raw | Format::Vdi) {
            return Err(no_backing_for(format));
        }
        let Some(backing_format) = options.backing_format else {
            let mut what = "Backing file specified without backing format".to_string();
            if !options.backing_unchecked {
                let (_, _, detected) = look_at_backing(host, path, name, None)
                    .map_err(|error| Error::Backing(Box::new(error)))?;
                // Writing to a string cannot fail.
                let _ = write!(what, "\nDetected format of {detected}.");
            }
            return Err(Error::Invalid(what));
        };
        if format == Format::Vmdk && backing_format != Format::Vmdk {
            return Err(Error::Invalid("backing_file must be a vmdk image".into()));
        }
        // A VMDK image records which state of its parent it was made for.
        if !options.backing_unchecked || format == Format::Vmdk {
            let (backing_size, cid, _) = look_at_backing(host, path, name, Some(backing_format))
                .map_err(|error| Error::Backing(Box::new(error)))?;
            size = size.or(Some(backing_size));
            parent = cid.map(|cid| (name.as_os_str().as_bytes().to_vec(), cid));
        }
    }
    let Some(size) = size else {
        return Err(Error::Invalid("Image creation needs a size parameter".into()));
    };
    let made = match format {
        Format::Qed => Made::Qed { header: qed_header(size, options)? },
        Format::Qcow2 => Made::Qcow2(Box::new(qcow2_plan(size, options)?)),
        Format::Vmdk => {
            let sectors = size.checked_next_multiple_of(SECTOR).filter(|&size| size <= OFFSET_MAX);
            let size = sectors.ok_or_else(|| too_large(format))?;
            let name = path.file_name().unwrap_or_default().as_bytes();
            let made = options.vmdk.options(name, size, parent, host.entropy())?;
            Made::Vmdk(Box::new(made))
        }
        Format::Vdi => {
            let uuid = || (0..4).fold(0, |uuid, _| uuid << 32 | u128::from(host.entropy()));
            let (block, fixed) = (
                options.cluster_size.unwrap_or(vdi::disk::layout::DEFAULT_BLOCK),
                options.fixed == Some(true),
            );
            let header = vdi::disk::layout::Header::new(size, block, fixed, [uuid(), uuid()])?;
            let preallocation = options.preallocation.unwrap_or(Preallocation::Off);
            Made::Vdi { header: Box::new(header), preallocation }
        }
        Format::Raw => Made::Raw {
            size: size
                .checked_next_multiple_of(SECTOR)
                .filter(|&size| size <= OFFSET_MAX)
                .ok_or_else(|| too_large(format))?,
            preallocation: options.preallocation.unwrap_or(Preallocation::Off),
        },
    };
    Ok(Plan { path: path.to_path_buf(), format, size, options: options.clone(), made })
}

/// Makes an image; returns the disk's size in bytes. [`plan`] and [`Plan::run`] in one.
///
/// # Errors
///
/// As both.
pub fn create<H: Host>(
    host: &H,
    path: &Path,
    format: Format,
    options: &CreateOptions,
) -> Result<u64, Error> {
    let plan = plan(host, path, format, options)?;
    plan.run(host)?;
    Ok(plan.size())
}

impl Plan {
    /// The disk's size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        match &self.made {
            Made::Raw { size, .. } => *size,
            Made::Qed { header } => header.image_size,
            Made::Qcow2(plan) => plan.disk_size(),
            Made::Vmdk(options) => options.size,
            Made::Vdi { header, .. } => header.size,
        }
    }

    /// The line that `qemu-img create` prints before it starts, with the target's name as it was
    /// given.
    pub fn formatting(&self, name: &Path) -> String {
        let mut line = format!("Formatting '{}', fmt={}", Shown(name), self.format);
        let options = &self.options;
        if self.format == Format::Qcow2 {
            self.qcow2_options(&mut line);
            return line;
        }
        // Writing to a string cannot fail.
        let _ = write!(line, " size={}", self.size);
        let mut say = |key: &str, value: Option<&dyn fmt::Display>| {
            if let Some(value) = value {
                // Writing to a string cannot fail.
                let _ = write!(line, " {key}={value}");
            }
        };
        let backing = options.backing_file.as_deref().map(value_of);
        say("adapter_type", options.vmdk.adapter.as_ref().map(|value| value as _));
        say("backing_file", backing.as_ref().map(|value| value as _));
        say("backing_fmt", options.backing_format.as_ref().map(|value| value as _));
        if let Made::Qed { header } = &self.made {
            say("cluster_size", Some(&header.geometry.cluster_size()));
        }
        if self.format == Format::Vdi {
            say("static", Some(&if options.fixed == Some(true) { "on" } else { "off" }));
        }
        say("table_size", options.table_size.as_ref().map(|value| value as _));
        say("preallocation", options.preallocation.as_ref().map(|value| value as _));
        if self.format == Format::Vmdk {
            for (key, value) in options.vmdk.formatting() {
                say(key, value.as_ref().map(|value| value as _));
            }
        }
        let nocow = options.nocow.map(|on| if on { "on" } else { "off" });
        say("nocow", nocow.as_ref().map(|value| value as _));
        line
    }

    /// Fills the other file of this number.
    fn write_part<F: Store>(&self, file: &F, number: usize) -> Result<(), Error> {
        match &self.made {
            Made::Vmdk(vmdk) => vmdk::rest::create::write_file(file, vmdk, number),
            _ => {
                let how = self.options.preallocation.unwrap_or(Preallocation::Off);
                write_raw(file, self.size(), how)
            }
        }
    }

    /// Fills the image's own file, which makes all of them an image.
    fn write_own<F: Store>(&self, file: &F, parts: usize) -> Result<(), Error> {
        match &self.made {
            Made::Raw { size, preallocation } => write_raw(file, *size, *preallocation),
            Made::Qed { header } => qed::rest::create::write(file, header),
            Made::Qcow2(plan) => plan.write(file),
            Made::Vdi { header, preallocation } => {
                vdi::rest::create::write(file, header, *preallocation)
            }
            Made::Vmdk(vmdk) => vmdk::rest::create::write_file(file, vmdk, parts),
        }
    }

    /// The other files that the image will consist of, in order.
    fn parts(&self) -> Vec<PathBuf> {
        match &self.made {
            Made::Qcow2(_) => {
                let name = self.options.data_file.as_ref();
                name.map(|name| self.path.with_file_name("").join(name)).into_iter().collect()
            }
            Made::Vmdk(vmdk) => {
                let mut names = vmdk.files();
                names.pop(); // the image's own
                let path = |name: &Vec<u8>| self.path.with_file_name(OsStr::from_bytes(name));
                names.iter().map(path).collect()
            }
            Made::Raw { .. } | Made::Qed { .. } | Made::Vdi { .. } => Vec::new(),
        }
    }

    /// What a qcow2 image will be, for [`formatting`](Self::formatting).
    fn qcow2_options(&self, line: &mut String) {
        let options = &self.options;
        let on_off = |on: bool| if on { "on" } else { "off" }.to_string();
        let path = |path: &PathBuf| value_of(path);
        let cluster_size =
            options.cluster_size.unwrap_or(qcow2::rest::create::DEFAULT_CLUSTER_SIZE);
        let refcount_bits =
            options.refcount_bits.unwrap_or(qcow2::rest::create::DEFAULT_REFCOUNT_BITS);
        let pairs = [
            ("cluster_size", Some(cluster_size.to_string())),
            ("extended_l2", Some(on_off(options.extended_l2 == Some(true)))),
            ("preallocation", options.preallocation.map(|how| how.to_string())),
            ("compression_type", Some(options.compression_type.unwrap_or_default().name().into())),
            ("size", Some(self.size.to_string())),
            ("compat", options.compat.clone()),
            ("backing_file", options.backing_file.as_ref().map(path)),
            ("backing_fmt", options.backing_format.map(|format| format.to_string())),
            ("data_file", options.data_file.as_ref().map(path)),
            ("data_file_raw", options.data_file_raw.map(on_off)),
            ("lazy_refcounts", Some(on_off(options.lazy_refcounts == Some(true)))),
            ("refcount_bits", Some(refcount_bits.to_string())),
            ("nocow", options.nocow.map(on_off)),
        ];
        for (key, value) in pairs {
            if let Some(value) = value {
                // Writing to a string cannot fail.
                let _ = write!(line, " {key}={value}");
            }
        }
    }

    /// Makes the file, over one that is there already.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], [`Error::Io`]. A new file is removed again; one that was there is left
    /// empty.
    pub fn run<H: Host>(&self, host: &H) -> Result<(), Error> {
        let options = &self.options;
        // Its lock comes before anything is written, and so do those of the other files that are
        // there.
        let own = Target::open(host, &self.path, options)?;
        let paths = self.parts();
        let there: Result<Vec<_>, _> =
            paths.iter().map(|path| Target::existing(host, path, &own, options)).collect();
        let there = match there {
            Ok(there) => there,
            Err(error) => {
                own.forget(host);
                return Err(error);
            }
        };
        let mut made = Vec::new();
        let result = own.fill(host, |file| {
            for (i, (path, there)) in paths.iter().zip(there).enumerate() {
                let part = there.map_or_else(|| Target::open(host, path, options), Ok)?;
                part.fill(host, |file| self.write_part(file, i))?;
                made.push(part);
            }
            self.write_own(file, paths.len())
        });
        if result.is_err() {
            made.iter().for_each(|part| part.forget(host));
        }
        match result {
            Err(Error::Io { errno: Errno::TOO_BIG, .. }) => Err(too_large(self.format)),
            result => result,
        }
    }
}

/// A file to be filled: a new one, or one that is there already.
struct Target<'a, F> {
    path: &'a Path,
    file: F,
    is_new: bool,
    options: &'a CreateOptions,
}

impl<'a, F: Store> Target<'a, F> {
    /// Opens it, and locks it. What is there stays as it is.
    fn open<H: Host<File = F>>(
        host: &H,
        path: &'a Path,
        options: &'a CreateOptions,
    ) -> Result<Target<'a, F>, Error> {
        let (file, is_new) = match host.create_new(path) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (host.open(path, true).map_err(Error::open(path))?, false)
            }
            Err(error) => return Err(Error::open(path)(error)),
        };
        let mut target = Target { path, file, is_new, options };
        if let Err(error) = target.lock(host) {
            target.forget(host);
            return Err(error);
        }
        Ok(target)
    }

    /// The same, for another file of the image than its `own`, if it is there.
    fn existing<H: Host<File = F>>(
        host: &H,
        path: &'a Path,
        own: &Target<'_, F>,
        options: &'a CreateOptions,
    ) -> Result<Option<Target<'a, F>>, Error> {
        let file = match host.open(path, true) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::open(path)(error)),
        };
        let id = |file: &F| host.identity(file).map_err(Error::open(path));
        if id(&file)? == id(&own.file)? {
            return Err(Error::Invalid("the image cannot be its own data file".into()));
        }
        let mut target = Target { path, file, is_new: false, options };
        target.lock(host)?;
        Ok(Some(target))
    }

    fn lock<H: Host<File = F>>(&mut self, host: &H) -> Result<(), Error> {
        locks::take(host, &mut self.file, self.path, Lock::WRITER, self.options.locking)
    }

    /// Removes it, if it is new.
    fn forget<H: Host<File = F>>(&self, host: &H) {
        if self.is_new {
            // The first error is the one to report, not that of the tidying up.
            let _ = host.remove(self.path);
        }
    }

    /// Has `write` fill it. A new one that cannot be filled is removed again; one that was there
    /// before is left empty, unless it is another file that is locked.
    fn fill<H: Host<File = F>>(
        &self,
        host: &H,
        write: impl FnOnce(&F) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.options.nocow == Some(true) {
            // Only an empty file can be asked for.
            self.file.set_len(0).map_err(Error::io("empty the file"))?;
            let _ = host.set_nocow(&self.file);
        }
        let result = write(&self.file);
        // The first error is the one to report, not that of the tidying up.
        let _ = match &result {
            Ok(()) => Ok(()),
            Err(_) if self.is_new => host.remove(self.path),
            // Another file is locked, and nothing was written yet.
            Err(Error::Locked { .. }) => Ok(()),
            Err(_) => self.file.set_len(0),
        };
        result
    }
}

/// A name as an option's value: its commas doubled.
fn value_of(path: impl AsRef<Path>) -> String {
    Shown(path.as_ref()).to_string().replace(',', ",,")
}

fn too_large(format: Format) -> Error {
    Error::Limit(format!("The image size is too large for file format '{format}'"))
}

/// An option that is set but means nothing for this format.
fn foreign_option(format: Format, options: &CreateOptions) -> Option<&'static str> {
    let CreateOptions { data_file, compat, .. } = options;
    let only = |formats: &[Format], is_set: bool, key| {
        (is_set && !formats.contains(&format)).then_some(key)
    };
    use Format::{Qcow2, Qed, Raw, Vdi, Vmdk};
    [
        only(&[Qed, Qcow2, Vdi], options.cluster_size.is_some(), "cluster_size"),
        only(&[Qed], options.table_size.is_some(), "table_size"),
        only(&[Vdi], options.fixed.is_some(), "static"),
        only(&[Raw, Qcow2, Vdi], options.preallocation.is_some(), "preallocation"),
        only(&[Qcow2], options.preallocation == Some(Preallocation::Metadata), "preallocation"),
        only(&[Qcow2], compat.is_some(), "compat"),
        only(&[Qcow2], data_file.is_some(), "data_file"),
        only(&[Qcow2], options.data_file_raw.is_some(), "data_file_raw"),
        only(&[Qcow2], options.lazy_refcounts.is_some(), "lazy_refcounts"),
        only(&[Qcow2], options.refcount_bits.is_some(), "refcount_bits"),
        only(&[Qcow2], options.extended_l2.is_some(), "extended_l2"),
        only(&[Qcow2], options.compression_type.is_some(), "compression_type"),
        only(&[Vmdk], options.vmdk != Default::default(), "subformat"),
    ]
    .into_iter()
    .flatten()
    .next()
}

fn qcow2_plan(size: u64, options: &CreateOptions) -> Result<qcow2::rest::create::Plan, Error> {
    let compat = options.compat.as_deref();
    let bytes = |path: &PathBuf| path.as_os_str().as_bytes().to_vec();
    let backing = options.backing_file.as_ref().map(bytes);
    let format = options.backing_format.map_or("", Format::name);
    let data_file = options.data_file.as_ref().map(bytes);
    let defaults = qcow2::rest::create::Options::default();
    qcow2::rest::create::Options {
        size,
        version: if matches!(compat, Some("v2" | "0.10")) { 2 } else { 3 },
        cluster_size: options.cluster_size.unwrap_or(defaults.cluster_size),
        refcount_bits: options.refcount_bits.unwrap_or(defaults.refcount_bits),
        lazy_refcounts: options.lazy_refcounts == Some(true),
        extended_l2: options.extended_l2 == Some(true),
        compression: options.compression_type.unwrap_or_default(),
        backing: backing.as_deref().map(|name| (name, format)),
        data_file: data_file.as_deref(),
        data_file_raw: options.data_file_raw == Some(true),
        preallocation: options.preallocation.unwrap_or(Preallocation::Off),
    }
    .plan()
}

fn qed_header(size: u64, options: &CreateOptions) -> Result<Header, Error> {
    qed::rest::create::Options {
        size,
        cluster_size: options.cluster_size.unwrap_or(qed::rest::create::DEFAULT_CLUSTER_SIZE),
        table_clusters: options.table_size.unwrap_or(qed::rest::create::DEFAULT_TABLE_CLUSTERS),
        backing_name: options.backing_file.as_deref().map(|name| name.as_os_str().as_bytes()),
        backing_is_raw: options.backing_format == Some(Format::Raw),
    }
    .header()
}

/// The size of the backing file's disk, its content id if it has one, and its format. The user named
/// this file; those behind it are named by an image, and are looked at only to see whether the
/// target is about to overwrite one of them.
fn look_at_backing<H: Host>(
    host: &H,
    target: &Path,
    name: &Path,
    format: Option<Format>,
) -> Result<(u64, Option<u32>, Format), Error> {
    let said = |layer: &Layer<H::File>| (layer.size(), layer.meta.content_id(), layer.format);
    let path = backing_name(target, name)?.path;
    let (backing, files) = (Policy::Any, Policy::Any);
    // It is only asked for its size: others may have it open.
    let locking = Locking::Off;
    let options =
        OpenOptions { format, backing, files, locking, describe: true, ..Default::default() };
    let Ok(old) = host.open(target, false) else {
        return Ok(said(&chain::open_layer(host, &path, &options)?));
    };
    let old = host.identity(&old).map_err(Error::open(target))?;
    let chain = chain::open(host, &path, &options)?;
    for layer in &chain.layers {
        if host.identity(&layer.file).map_err(Error::open(&layer.path))? == old {
            return Err(Error::BackingLoop(layer.path.clone()));
        }
    }
    Ok(said(chain.layers.first().expect("a chain has at least one layer")))
}

/// Makes `file` a raw image of `size` bytes, all zeros.
fn write_raw<F: Store>(file: &F, size: u64, preallocation: Preallocation) -> Result<(), Error> {
    file.set_len(0).map_err(Error::io("empty the file"))?;
    file.set_len(size).map_err(Error::io("set the file's length"))?;
    preallocate(file, 0, size, preallocation)?;
    file.flush().map_err(Error::io("flush the file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_qemu_reads_them() {
        assert_eq!(parse_size("64K"), Ok(65536));
        assert_eq!(parse_size("64b"), Ok(64));
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert_eq!(parse_size("0.3k"), Ok(307));
        assert_eq!(parse_size(".5k"), Ok(512));
        assert_eq!(parse_size("0x10"), Ok(16));
        assert_eq!(parse_size("16E"), Err(BadSize::OutOfRange));
        assert_eq!(
            parse_size("99999999999999999999999999999999999999999E"),
            Err(BadSize::OutOfRange)
        );
        assert_eq!(parse_size("15.9999999999999999999999999999E").map(|n| n >> 59), Ok(31));
        assert_eq!(parse_size("-1"), Err(BadSize::OutOfRange));
        for bad in ["", "k", "1.3", "1e3", "64KB", "0x", "0x1k", "1 k", ".", ".k", "1,5G"] {
            assert_eq!(parse_size(bad), Err(BadSize::NotANumber), "{bad}");
        }
    }

    #[test]
    fn option_strings_are_taken_apart_at_single_commas() {
        let pairs = split_options("backing_file=a,,b=c,cluster_size=4k,,table_size");
        assert_eq!(pairs[0], ("backing_file".into(), "a,b=c".into()));
        assert_eq!(pairs[1], ("cluster_size".into(), "4k,table_size".into()));
        let mut options = CreateOptions::default();
        options.parse(Format::Qed, "size=1.5G,cluster_size=4k,cluster_size=8k").expect("valid");
        assert_eq!((options.size, options.cluster_size), (Some(3 << 29), Some(8192)));
    }

    #[test]
    fn a_key_alone_is_a_switch() {
        for (text, is_on) in [("lazy_refcounts", true), ("lazy_refcounts,nolazy_refcounts", false)]
        {
            let mut options = CreateOptions::default();
            options.parse(Format::Qcow2, text).expect("valid");
            assert_eq!(options.lazy_refcounts, Some(is_on), "{text}");
        }
        CreateOptions::default().parse(Format::Qcow2, "cluster_size").expect_err("not a switch");
    }

    #[test]
    fn unknown_options_are_named() {
        let error = CreateOptions::default().parse(Format::Qed, "foo=1").expect_err("unknown");
        assert_eq!(error.to_string(), "Invalid parameter 'foo'");
        let error = CreateOptions::default().parse(Format::Raw, "table_size=1").expect_err("qed's");
        assert_eq!(error.to_string(), "Invalid parameter 'table_size'");
    }
}
