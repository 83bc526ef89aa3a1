//! Opening an image, the other files it consists of, and the files it is backed by.
//!
//! The names in an image are untrusted. A backing file is therefore opened only as a [`Policy`]
//! from the caller allows, always read-only. Only [`Policy::Any`] takes a name for more than a plain
//! path, see [`crate::name`]. A chain that comes back to itself is found by the identity
//! of its files, at once; one that is merely long ends at [`DEPTH_MAX`].
//!
//! An image may be spread over several files: the extents that a VMDK descriptor lists. They are
//! opened under a policy of their own, as the image is (for writing too), and no file is ever
//! opened twice in one chain. [`open_layer`] opens none of them: it is for looking at what the
//! image's own file says.
//!
//! What a chain is *not*: something that runs. The drivers take its layers apart; until then it
//! can be mapped and read ([`crate::map`]), blocking.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cowbell_engine::store::Store;
use cowbell_engine::sys::lock::{Lock, LockError, Locking};
use cowbell_engine::sys::random;

use crate::error::{Error, Shown};
use crate::format::{self, LayerMeta};
use crate::locks::{self, Role};
use crate::name::{self, Name};
use crate::probe::{Foreign, Format, PROBE_BYTES, Probed, probe, probe_end};
use crate::vmdk::disk::descriptor::FILES_MAX;

/// A chain has at most this many layers.
pub const DEPTH_MAX: usize = 200;

/// Where files are: the real disk, or a simulated one.
pub trait Host {
    /// An open file.
    type File: Store;

    /// Opens a file that exists. Must not wait for anybody (a FIFO's other end) and must refuse
    /// what has no bytes at offsets (a FIFO, a folder). A path that [is an address](name::is_remote)
    /// was given by the caller, or by an image under [`Policy::Any`]: a host follows it or fails.
    fn open(&self, path: &Path, write: bool) -> io::Result<Self::File>;

    /// Makes an empty file, open for reading and writing. Fails with
    /// [`io::ErrorKind::AlreadyExists`] rather than touch one that exists.
    fn create_new(&self, path: &Path) -> io::Result<Self::File>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// The path with every link followed and no `..` in it. Host without links: the path.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf>;

    /// Asks that blocks of this file, which is empty, be written in place and never copied. Where
    /// files are like that anyway there is nothing to do.
    ///
    /// # Errors
    ///
    /// The host cannot, or has no need to.
    fn set_nocow(&self, file: &Self::File) -> io::Result<()> {
        let _ = file;
        Ok(())
    }

    /// Two numbers that no other file of this host has (device and inode).
    fn identity(&self, file: &Self::File) -> io::Result<(u64, u64)>;

    /// Takes a lock on an open file, before anything of it is written or believed. Hosts whose files
    /// nobody else has open need none: they do nothing.
    fn lock(
        &self,
        _file: &mut Self::File,
        _lock: Lock,
        _locking: Locking,
    ) -> Result<(), LockError> {
        Ok(())
    }

    /// Random bits: what content ids are made of. The system's, but from a simulated host.
    fn entropy(&self) -> u32 {
        random()
    }
}

impl<H: Host + ?Sized> Host for &H {
    type File = H::File;
    fn open(&self, path: &Path, write: bool) -> io::Result<Self::File> {
        (**self).open(path, write)
    }
    fn create_new(&self, path: &Path) -> io::Result<Self::File> {
        (**self).create_new(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        (**self).remove(path)
    }
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        (**self).resolve(path)
    }
    fn set_nocow(&self, file: &Self::File) -> io::Result<()> {
        (**self).set_nocow(file)
    }
    fn identity(&self, file: &Self::File) -> io::Result<(u64, u64)> {
        (**self).identity(file)
    }
    fn lock(&self, file: &mut Self::File, lock: Lock, locking: Locking) -> Result<(), LockError> {
        (**self).lock(file, lock, locking)
    }
    fn entropy(&self) -> u32 {
        (**self).entropy()
    }
}

/// Which files that an image names may be opened. For backing files said by the caller each time:
/// there is no safe answer that suits everybody.
///
/// A file is judged by where it really is, links followed. The names in between belong to whoever
/// can write to those folders; if that is the attacker, only [`Policy::Refuse`] is safe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Policy {
    /// None: an image that has one is not opened.
    Refuse,
    /// Those in the very folder of the image that names them.
    SameDirectory,
    /// Those in these folders or below.
    Directories(Vec<PathBuf>),
    /// Any; for backing files also those that have an address, if the host reaches it. For images
    /// one trusts.
    Any,
}

/// How to open a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// The top image's format; `None` to probe.
    pub format: Option<Format>,
    /// Open the top image for writing. The others are only ever read.
    pub write: bool,
    /// Which backing files may be opened.
    pub backing: Policy,
    /// Which other files of the image itself may be opened: those that hold part of its disk.
    /// [`Policy::SameDirectory`], the default, also wants their names to be just names: nothing
    /// with a `/` in it.
    pub files: Policy,
    /// Probe a backing file whose format the image does not record, as QEMU does for QED. If
    /// false, such an image is refused.
    pub probe_backing: bool,
    /// Open it only to say what it is: encrypted images too. What is so opened is not for reading.
    pub describe: bool,
    /// Open an image for writing that is marked as needing a check without checking it.
    pub ignore_need_check: bool,
    /// Lock the files against other programs, as QEMU does: see [`locks`]. Where the file system
    /// can, if not said; [`Chain::unlockable`] tells where it could not.
    pub locking: Locking,
    /// Read although others may write meanwhile: what is read may be of no one moment, or look
    /// corrupt. Only for reading.
    pub force_share: bool,
}

impl Default for OpenOptions {
    /// For reading, probed, without any backing file.
    fn default() -> Self {
        OpenOptions {
            format: None,
            write: false,
            backing: Policy::Refuse,
            files: Policy::SameDirectory,
            probe_backing: true,
            describe: false,
            ignore_need_check: false,
            locking: Locking::Auto,
            force_share: false,
        }
    }
}

/// An image and its backing files, top first; never empty.
#[derive(Debug)]
pub struct Chain<F> {
    /// At least one, at most [`DEPTH_MAX`].
    pub layers: Vec<Layer<F>>,
}

impl<F> Chain<F> {
    /// The size of the disk that the guest sees: the top layer's, in bytes.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::size)
    }
}

/// One open image file.
#[derive(Debug)]
pub struct Layer<F> {
    /// Where it was found.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The format is a guess from its first bytes; nobody said so.
    pub probed: bool,
    /// The open file.
    pub file: F,
    /// The other files that the image consists of, in the order in which it names them. Empty for
    /// most formats, and where [`open_layer`] opened it.
    pub more: Vec<F>,
    /// What its format keeps in memory.
    pub meta: LayerMeta,
}

impl<F: Store> Layer<F> {
    /// All files are open: reads what is in the others.
    fn complete(&mut self, options: &OpenOptions) -> Result<(), Error> {
        self.meta.complete(&self.more, options)
    }
}

impl<F> Layer<F> {
    /// The file of this number: 0 is the image's own, the others follow.
    pub fn numbered(&self, file: usize) -> &F {
        if file == 0 { &self.file } else { &self.more[file - 1] }
    }

    /// Where that file was found.
    pub fn numbered_path(&self, file: usize) -> PathBuf {
        match self.meta.files().get(file.wrapping_sub(1)) {
            Some(name) => name::as_local(folder_of(&self.path).join(name)),
            None => self.path.clone(),
        }
    }

    /// The size of the disk in this image, in bytes; a multiple of 512.
    pub fn size(&self) -> u64 {
        self.meta.size()
    }

    /// The backing file's name as the image spells it.
    pub fn backing_name(&self) -> Option<&Path> {
        self.meta.backing_name()
    }

    /// The backing file's format as the image records it; `None`: not recorded, or no backing.
    pub fn backing_format(&self) -> Option<Format> {
        self.meta.backing_format()
    }

    /// The backing file's format as the image spells it: untrusted text, control characters
    /// escaped. Not every name is that of a format.
    pub fn backing_format_name(&self) -> Option<String> {
        self.meta.backing_format_name()
    }
}

/// Opens `path` and the files it is backed by.
///
/// # Errors
///
/// What is wrong with the image itself, as it is; with a backing file, inside
/// [`Error::Backing`]; [`Error::Policy`] and [`Error::BackingLoop`] likewise.
pub fn open<H: Host>(
    host: &H,
    path: &Path,
    options: &OpenOptions,
) -> Result<Chain<H::File>, Error> {
    open_named(host, &Name::plain(path, None), options)
}

/// As [`open`], for an image whose name may say what it is and what it is backed by. The format in
/// `options` comes first. The policy is not asked of backing files that are named here.
///
/// # Errors
///
/// As [`open`]; [`Error::Invalid`] to open for writing what is named as read-only.
pub fn open_named<H: Host>(
    host: &H,
    name: &Name,
    options: &OpenOptions,
) -> Result<Chain<H::File>, Error> {
    if name.read_only && options.write {
        return Err(Error::Invalid("Block node is read-only".into()));
    }
    let format = options.format.or(name.format);
    let options = &OpenOptions { format, ..name.locking(options) };
    let mut file = host.open(&name.path, options.write).map_err(Error::open(&name.path))?;
    let known = lock_own(host, &mut file, &name.path, options)?;
    let as_known = OpenOptions { write: false, format: known, ..options.clone() };
    let top = layer_in(file, &name.path, &as_known)?;
    let top = Layer { probed: options.format.is_none(), ..top };
    let mut seen = vec![identity(host, &top)?];
    let mut layers = vec![with_files(host, top, options, Role::Part, &mut seen)?];
    let mut said = &name.backing;
    while let Some(top) = layers.last() {
        let backing = match said {
            name::Backing::Nothing => break,
            name::Backing::AsImageSays => backing_of(top, options),
            name::Backing::Named(name) => Ok(Some(Backing::said(name))),
        };
        let Some(backing) = backing.transpose() else { break };
        let below = backing
            .and_then(|backing| open_backing(host, &backing, layers.len(), options, &mut seen))
            .map_err(|error| Error::Backing(Box::new(error)))?;
        layers.push(below);
        said = match said {
            name::Backing::Named(name) => &name.backing,
            said => said,
        };
    }
    // Nothing is written, not even a repair, before everything is known to open.
    if let (true, Some(top)) = (options.write, layers.first_mut()) {
        top.meta = LayerMeta::open(&top.file, top.format, options)?;
        top.complete(options)?;
    }
    for i in 1..layers.len() {
        let below = layers[i].meta.content_id();
        layers[i - 1].meta.found_backing(below);
    }
    Ok(Chain { layers })
}

/// Opens one image, the other files that it consists of, and no backing file.
///
/// # Errors
///
/// As [`open`].
pub fn open_whole_layer<H: Host>(
    host: &H,
    path: &Path,
    options: &OpenOptions,
) -> Result<Layer<H::File>, Error> {
    let layer = open_layer(host, path, options)?;
    let mut seen = vec![identity(host, &layer)?];
    with_files(host, layer, options, Role::Part, &mut seen)
}

/// Opens the other files of the image whose own `file` is open, and locks them, without looking at
/// its tables: they may be what is to be repaired. Where not even the header can be read there are
/// none. Only for formats whose header names them: a VMDK image is for [`open_whole_layer`].
///
/// # Errors
///
/// As [`open_files`].
pub fn open_named_in_header<H: Host>(
    host: &H,
    path: &Path,
    file: &H::File,
    format: Format,
    options: &OpenOptions,
) -> Result<Vec<H::File>, Error> {
    let names = format::names_in_header(file, format);
    let names: Vec<&Path> = names.iter().map(PathBuf::as_path).collect();
    let mut seen = vec![host.identity(file).map_err(Error::open(path))?];
    open_files(host, path, &names, options, &mut seen)
}

/// Opens one image's own file and no other, whatever the policies say.
pub fn open_layer<H: Host>(
    host: &H,
    path: &Path,
    options: &OpenOptions,
) -> Result<Layer<H::File>, Error> {
    let mut file = host.open(path, options.write).map_err(Error::open(path))?;
    let known = lock_own(host, &mut file, path, options)?;
    let layer = layer_in(file, path, &OpenOptions { format: known, ..options.clone() })?;
    Ok(Layer { probed: options.format.is_none(), ..layer })
}

/// Locks the image's own file, and answers its format, which the lock depends on.
fn lock_own<H: Host>(
    host: &H,
    file: &mut H::File,
    path: &Path,
    options: &OpenOptions,
) -> Result<Option<Format>, Error> {
    locks::check_options(options)?;
    let format = match options.format {
        Some(format) => format,
        None => probe_file(file)?,
    };
    locks::lock_image(host, file, path, format, options)?;
    Ok(Some(format))
}

/// The format of `file`, from its first bytes, and its last where those say nothing.
///
/// # Errors
///
/// [`Error::Foreign`] for one that is recognised and not handled; [`Error::Io`].
pub fn probe_file<F: Store>(file: &F) -> Result<Format, Error> {
    let len = file.len().map_err(Error::io("find the image's length"))?;
    let mut bytes = [0; PROBE_BYTES];
    let bytes = &mut bytes[..len.min(PROBE_BYTES as u64) as usize];
    file.read_at(0, bytes).map_err(Error::io("read the first sector"))?;
    let format = match probe(bytes) {
        Probed::Known(foreign) => return Err(Error::Foreign(foreign)),
        Probed::Handled(Format::Raw) => Format::Raw,
        Probed::Handled(format) => return Ok(format),
    };
    let end = len - bytes.len() as u64;
    file.read_at(end, bytes).map_err(Error::io("read the last sector"))?;
    probe_end(bytes, len).map_or(Ok(format), |foreign| Err(Error::Foreign(foreign)))
}

/// The format of this name.
///
/// # Errors
///
/// [`Error::Unsupported`] for one that is known and not handled, in other words than for one that
/// nobody knows.
pub fn driver_named(name: &str) -> Result<Format, Error> {
    Format::from_name(name).ok_or_else(|| {
        Error::Unsupported(match Foreign::from_name(name) {
            Some(foreign) => format!("{} images are not supported", foreign.title()),
            None => format!("Unknown driver '{}'", Shown(Path::new(name))),
        })
    })
}

/// Makes a layer of an open file.
pub fn layer_in<F: Store>(file: F, path: &Path, options: &OpenOptions) -> Result<Layer<F>, Error> {
    let format = match options.format {
        Some(format) => format,
        None => probe_file(&file)?,
    };
    let meta = LayerMeta::open(&file, format, options)?;
    let probed = options.format.is_none();
    Ok(Layer { path: path.to_path_buf(), format, probed, file, more: Vec::new(), meta })
}

/// Opens the other files of a layer.
fn with_files<H: Host>(
    host: &H,
    mut layer: Layer<H::File>,
    options: &OpenOptions,
    role: Role,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Layer<H::File>, Error> {
    let names = layer.meta.files();
    layer.more = open_files_as(host, &layer.path, &names, options, role, seen)?;
    layer.complete(&OpenOptions { write: false, ..options.clone() })?;
    Ok(layer)
}

/// Opens the other files of the image at `path`, in the order of `names`, for writing if the image
/// is. `seen` are the identities of all files opened so far, the image's included; those of the
/// new ones are added.
///
/// # Errors
///
/// [`Error::Policy`] for a name that [`OpenOptions::files`] does not allow; [`Error::Limit`] for
/// more than [`FILES_MAX`]; [`Error::Invalid`] for a file that is open already; [`Error::Open`].
pub fn open_files<H: Host>(
    host: &H,
    path: &Path,
    names: &[&Path],
    options: &OpenOptions,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Vec<H::File>, Error> {
    open_files_as(host, path, names, options, Role::Part, seen)
}

/// The same, for an image that may be one that the top image is backed by.
fn open_files_as<H: Host>(
    host: &H,
    path: &Path,
    names: &[&Path],
    options: &OpenOptions,
    role: Role,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Vec<H::File>, Error> {
    let write = options.write && role == Role::Part;
    if names.len() > FILES_MAX.saturating_sub(seen.len()) {
        return Err(Error::Limit(format!("the image has more than {FILES_MAX} files")));
    }
    let folder = folder_of(path);
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let named = Named { what: "file", path: beside(path, name)?, folder: folder.clone() };
        let is_bare = named.path.file_name() == Some(name.as_os_str());
        if options.files == Policy::SameDirectory && !is_bare {
            return named.refused("its name is more than a name");
        }
        let real = allowed_path(host, &named, &options.files)?;
        let mut file = host.open(&real, write).map_err(Error::open(&named.path))?;
        let id = host.identity(&file).map_err(Error::open(&named.path))?;
        if seen.contains(&id) {
            let name = Shown(&named.path);
            return Err(Error::Invalid(format!("file '{name}' has two parts in the image")));
        }
        let lock = locks::lock_for(role, Format::Raw, options);
        locks::take(host, &mut file, &named.path, lock, options.locking)?;
        seen.push(id);
        files.push(file);
    }
    Ok(files)
}

/// A file that an image names.
struct Named {
    /// What it is to the image.
    what: &'static str,
    path: PathBuf,
    /// The folder of the image.
    folder: PathBuf,
}

impl Named {
    fn refused<T>(&self, why: &str) -> Result<T, Error> {
        let Named { what, path, .. } = self;
        Err(Error::Policy(format!("{what} '{}' is not opened: {why}", Shown(path))))
    }
}

/// A backing file to open.
struct Backing<'a> {
    named: Named,
    format: Option<Format>,
    /// As it is named by the caller; `None`: by an image.
    said: Option<&'a Name>,
}

impl Backing<'_> {
    fn said(name: &Name) -> Backing<'_> {
        let folder = folder_of(&name.path);
        let named = Named { what: "backing file", path: name.path.clone(), folder };
        Backing { named, format: name.format, said: Some(name) }
    }
}

fn backing_of<F>(
    layer: &Layer<F>,
    options: &OpenOptions,
) -> Result<Option<Backing<'static>>, Error> {
    let Some(name) = layer.backing_name() else { return Ok(None) };
    if options.backing != Policy::Any && name::protocol(name.as_os_str()).is_some() {
        return Err(Error::Policy(format!(
            "backing file name '{}' names a protocol; only plain paths are opened",
            Shown(name)
        )));
    }
    let Name { path, format: said, .. } = backing_name(&layer.path, name)?;
    let folder = folder_of(&layer.path);
    let named = Named { what: "backing file", path, folder };
    let recorded = layer.backing_format();
    if let (None, Some(name)) = (recorded, layer.backing_format_name()) {
        // Not to be guessed: somebody said what it is.
        driver_named(&name)?;
    }
    Ok(Some(Backing { named, format: recorded.or(said), said: None }))
}

/// Where the backing file `name` of the image at `overlay` is: relative to the image's folder; but
/// names that say more than a path, as `json:{...}`, relative to the current one.
///
/// # Errors
///
/// As [`Name::parse`]; [`Error::Unsupported`] for a relative path in an image that a server has. (A plain file with a colon in its name can be spelled `./nbd:...`.)
pub fn backing_name(overlay: &Path, name: &Path) -> Result<Name, Error> {
    let text = name.as_os_str();
    if name::protocol(text).is_some() {
        let named = Name::parse(text)?;
        if named.backing != name::Backing::AsImageSays {
            return Err(Error::Unsupported("a backing file's name has another in it".into()));
        }
        return Ok(named);
    }
    let bytes = text.as_bytes();
    if bytes.contains(&0) || bytes.is_empty() {
        return Err(Error::Invalid("the backing file's name is no path".into()));
    }
    Ok(Name::plain(beside(overlay, name)?, None))
}

/// The file `name` as the image at `image` means it: never an address. Export names are no folders.
fn beside(image: &Path, name: &Path) -> Result<PathBuf, Error> {
    if name::is_remote(image) && name.is_relative() {
        let what = "the image is on a server, and has no folder that the file";
        return Err(Error::Unsupported(format!("{what} '{}' could be in", Shown(name))));
    }
    Ok(name::as_local(folder_of(image).join(name)))
}

pub(crate) fn path_of(name: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(name))
}

/// The folder that `path` is in; the current one for a bare name.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::new(),
    }
}

fn open_backing<H: Host>(
    host: &H,
    backing: &Backing<'_>,
    depth: usize,
    options: &OpenOptions,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Layer<H::File>, Error> {
    let path = &backing.named.path;
    let options = &match backing.said {
        Some(name) => name.locking(options),
        None => options.clone(),
    };
    let is_said = backing.said.is_some();
    let policy = if is_said { &Policy::Any } else { &options.backing };
    let real = allowed_path(host, &backing.named, policy)?;
    if depth >= DEPTH_MAX {
        return Err(Error::Limit(format!("the backing chain has more than {DEPTH_MAX} images")));
    }
    if backing.format.is_none() && !is_said && !options.probe_backing {
        return Err(Error::Policy(format!(
            "the format of backing file '{}' is not recorded, and must not be guessed",
            Shown(path)
        )));
    }
    let mut file = host.open(&real, false).map_err(Error::open(path))?;
    let id = host.identity(&file).map_err(Error::open(path))?;
    if seen.contains(&id) {
        return Err(Error::BackingLoop(path.clone()));
    }
    seen.push(id);
    let format = match backing.format {
        Some(format) => format,
        None => probe_file(&file)?,
    };
    let lock = locks::lock_for(Role::Backing, format, options);
    locks::take(host, &mut file, path, lock, options.locking)?;
    let as_known = OpenOptions { format: Some(format), write: false, ..options.clone() };
    let layer = layer_in(file, path, &as_known)?;
    let layer = Layer { probed: backing.format.is_none(), ..layer };
    with_files(host, layer, options, Role::BackingPart, seen)
}

/// The path to open, if the policy allows it.
fn allowed_path<H: Host>(host: &H, named: &Named, policy: &Policy) -> Result<PathBuf, Error> {
    let path = &named.path;
    let resolve = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        host.resolve(path).map_err(Error::open(path))
    };
    match policy {
        Policy::Any => Ok(path.clone()),
        Policy::Refuse => named.refused("no such files are allowed here"),
        _ if name::is_remote(path) => named.refused("it is on a server"),
        Policy::SameDirectory => {
            let real = resolve(path)?;
            if real.parent() == Some(&*resolve(&named.folder)?) {
                return Ok(real);
            }
            named.refused("it is not in the image's own folder")
        }
        Policy::Directories(folders) => {
            let real = resolve(path)?;
            for folder in folders {
                if real.starts_with(resolve(folder)?) {
                    return Ok(real);
                }
            }
            named.refused("it is in none of the allowed folders")
        }
    }
}

fn identity<H: Host>(host: &H, layer: &Layer<H::File>) -> Result<(u64, u64), Error> {
    host.identity(&layer.file).map_err(Error::open(&layer.path))
}
