//! Opening images, which may wait: before they come to an engine, and on any thread.

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::sys::disk::{DiskFile, DiskOptions};
use cowbell_engine::sys::lock::Locking;
use cowbell_engine::units::Errno;
use cowbell_formats::{
    Chain, DiskHost, Error, Format, GivenFiles, Host, OpenOptions, Policy, open,
};

use crate::handle::{POISONED, answered, caught, code, copied, is_place};

/// An image that is open, and that no engine has yet: see cowbell_image_open().
#[derive(Debug)]
pub struct Image {
    pub(crate) chain: Chain<DiskFile>,
}

/// Open the image for writing too. Its backing files are only ever read.
pub const COWBELL_OPEN_WRITE: u32 = 1;
/// Read and write past the page cache (O_DIRECT). Opening fails where the file system cannot.
pub const COWBELL_OPEN_DIRECT: u32 = 2;
/// Without a format in the options: guess it from the file's first bytes. Whoever wrote a raw disk
/// decides what is guessed, so ask for this only with images that you trust. If raw is guessed,
/// writes that would make the disk look like another format fail with -EPERM.
pub const COWBELL_OPEN_PROBE: u32 = 4;
/// Guess the format of a backing file if the image does not say it. Otherwise such an image is
/// refused.
pub const COWBELL_OPEN_PROBE_BACKING: u32 = 8;
/// Read although others may write meanwhile. Not with COWBELL_OPEN_WRITE.
pub const COWBELL_OPEN_SHARE: u32 = 16;

/// Other files that an image names: an image with a backing file is refused; other files that hold
/// parts of the disk (VMDK extents, a qcow2 data file) are opened if they are in the image's folder.
pub const COWBELL_FILES_REFUSE: u32 = 0;
/// Any file that is in the folder of the image that names it.
pub const COWBELL_FILES_SAME_FOLDER: u32 = 1;
/// Any file that this process can open. Only for images that you trust: a guest that could write to
/// an image's header would read any file of yours.
pub const COWBELL_FILES_ANY: u32 = 2;

/// Files are locked as QEMU locks them, where the file system can.
pub const COWBELL_LOCKING_AUTO: u32 = 0;
/// Files are locked; one that cannot be is not opened.
pub const COWBELL_LOCKING_ON: u32 = 1;
/// Files are not locked: you answer for it that nobody else writes them.
pub const COWBELL_LOCKING_OFF: u32 = 2;

/// How to open an image. Set all of it to 0, then `size`, then what you want.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ImageOptions {
    /// sizeof(struct cowbell_image_options).
    pub size: usize,
    /// The image's format, one of cowbell_format(). NULL: only with COWBELL_OPEN_PROBE.
    pub format: *const c_char,
    /// Bits of COWBELL_OPEN_*.
    pub flags: u32,
    /// Which other files may be opened: COWBELL_FILES_*.
    pub files: u32,
    /// COWBELL_LOCKING_*.
    pub locking: u32,
    /// 0.
    pub reserved: u32,
}

impl Default for ImageOptions {
    fn default() -> ImageOptions {
        let format = std::ptr::null();
        ImageOptions { size: 0, format, flags: 0, files: 0, locking: 0, reserved: 0 }
    }
}

/// Opens an image, and the files that it is backed by. This waits for the disk: call it before your
/// loop, or on any other thread; give the image to the loop's thread then.
///
/// The image is put into `*image`; it goes to an engine with cowbell_attach(), or is closed with
/// cowbell_image_close(). `options` may not be NULL: somebody has to say the format.
///
/// Answers 0, or a negative error number. Then `*image` is NULL, and what is wrong is in words in
/// `error`, a buffer of `error_size` bytes: always with a 0 at its end, cut if it does not fit. The
/// text may have several lines. `error` may be NULL.
///
/// -EINVAL: arguments, or an image that is damaged or not of this format; -EOPNOTSUPP: a format or
/// feature that is not handled; -EPERM: `files` forbids what the image names; -EAGAIN: somebody else
/// has it locked; -EFBIG: too large, or too many backing files; others are those of open(2), read(2)
/// and fcntl(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_image_open(
    path: *const c_char,
    options: *const ImageOptions,
    image: *mut *mut Image,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    // SAFETY: strings and options are the caller's, and stay for the time of this call.
    let work = || unsafe { asked(path, options) }.and_then(|asked| asked.open());
    // SAFETY: as this function's contract.
    unsafe { put_opened(work, image, error, error_size) }
}

/// A file of an image that somebody has opened: see cowbell_image_open_given().
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GivenFile {
    /// The name by which the file will be asked for.
    pub name: *const c_char,
    /// Its descriptor: a regular file or a block device, open for reading, or for both.
    pub fd: c_int,
    /// 0.
    pub reserved: u32,
}

/// The most files that cowbell_image_open_given() takes.
pub const COWBELL_GIVEN_MAX: usize = 4096;

/// The same as cowbell_image_open() for a program that may open no files itself: all that there are
/// are these `count` ones. Nothing is looked for in the file system.
///
/// `name` is the image's, and one of theirs. The names of others are asked for as the images' headers have
/// them, in the folder of the image that names them: "disk", whose header names "base.img", is given as
/// "disk" and "base.img", "a/disk" as "a/disk" and "a/base.img". "." and ".." are understood, links there are none.
/// `files` in the options means the same as ever; COWBELL_FILES_ANY leads to no more than what is given.
///
/// Descriptors are duplicated: they stay yours whatever the answer is, and may be closed then. What belongs to an
/// open file is shared by both: COWBELL_OPEN_DIRECT sets O_DIRECT for it, O_NONBLOCK is taken away, O_NOATIME may be set.
/// With COWBELL_OPEN_WRITE the image has to be open for both, and not for appending. Its locks
/// end when the image or disk is closed, whatever descriptors of yours there are.
///
/// As cowbell_image_open(), and: -EBADF: a descriptor that is none; -EINVAL: one that cannot be used, no name, a
/// name that is there twice, more than COWBELL_GIVEN_MAX; -EACCES: one that is to be written, and is not open for that; -ENOENT:
/// a file that was not given.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_image_open_given(
    name: *const c_char,
    files: *const GivenFile,
    count: usize,
    options: *const ImageOptions,
    image: *mut *mut Image,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let work = || {
        // SAFETY: strings and options are the caller's, and stay for the time of this call.
        let asked = unsafe { asked(name, options) }?;
        // SAFETY: so are the files.
        let files = unsafe { given(files, count, &asked) }?;
        asked.open_on(&files)
    };
    // SAFETY: as this function's contract.
    unsafe { put_opened(work, image, error, error_size) }
}

/// Puts what `work` opens into `*image`, or what is wrong into `error`.
///
/// # Safety
///
/// As for `cowbell_image_open`.
unsafe fn put_opened(
    work: impl FnOnce() -> Result<Image, Failure>,
    image: *mut *mut Image,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let opened = caught(|| {
        is_place(image).map_err(|errno| (errno, "no place for the image".to_owned()))?;
        // SAFETY: the caller lends the place.
        unsafe { image.write(std::ptr::null_mut()) };
        work()
    });
    let (answer, text) = match opened {
        Some(Ok(opened)) => {
            // SAFETY: the place was looked at.
            unsafe { image.write(Box::into_raw(Box::new(opened))) };
            (0, String::new())
        }
        Some(Err((errno, text))) => (code(errno), text),
        None => (code(POISONED), "a defect of cowbell: it panicked".to_owned()),
    };
    // SAFETY: the caller lends a buffer of that size.
    unsafe { put_text(&text, error, error_size) };
    answer
}

/// Closes an image that was given to no engine. May wait for the file system. NULL is no mistake.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_image_close(image: *mut Image) -> c_int {
    answered(|| {
        // SAFETY: as this function's contract.
        drop(unsafe { taken(image) });
        Ok(0)
    })
}

/// The image back from its handle. `None`: it is NULL.
///
/// # Safety
///
/// It is NULL, or was made by `cowbell_image_open` or `cowbell_image_open_given`, and neither closed nor attached.
pub(crate) unsafe fn taken(image: *mut Image) -> Option<Box<Image>> {
    // SAFETY: it came out of a box.
    (!image.is_null()).then(|| unsafe { Box::from_raw(image) })
}

type Failure = (Errno, String);

/// What is to be opened, and how.
struct Asked<'c> {
    path: &'c Path,
    options: OpenOptions,
    direct: bool,
}

impl Asked<'_> {
    fn open(&self) -> Result<Image, Failure> {
        self.open_on(&DiskHost { direct: self.direct })
    }

    fn open_on(&self, host: &impl Host<File = DiskFile>) -> Result<Image, Failure> {
        let chain = open(host, self.path, &self.options);
        let chain = chain.map_err(|why: Error| (why.errno(), why.to_string()))?;
        Ok(Image { chain })
    }
}

fn invalid(why: &str) -> Failure {
    (Errno::INVALID, why.to_owned())
}

/// # Safety
///
/// `path` is NULL or a string that lives as long as the answer, `options` NULL or options, their format NULL
/// or a string.
unsafe fn asked<'c>(
    path: *const c_char,
    options: *const ImageOptions,
) -> Result<Asked<'c>, Failure> {
    if path.is_null() {
        return Err(invalid("no path"));
    }
    if is_place(options).is_err() {
        return Err(invalid("no options"));
    }
    // SAFETY: options begin with their size, and have that many bytes. Any bytes are options: numbers,
    // and a pointer whose being a string is the caller's word.
    let options = unsafe {
        let size = (&raw const (*options).size).read();
        copied(options, size)
    };
    let options = options.map_err(|errno| (errno, "options of a newer version".to_owned()))?;
    // SAFETY: it is a string.
    let path = unsafe { CStr::from_ptr(path) };
    // SAFETY: so is this.
    let format = (!options.format.is_null()).then(|| unsafe { CStr::from_ptr(options.format) });
    let format = match format {
        None if options.flags & COWBELL_OPEN_PROBE == 0 => {
            return Err(invalid("no format is given, and it must not be guessed"));
        }
        None => None,
        Some(name) => {
            let known = name.to_str().ok().and_then(Format::from_name);
            let unknown = || format!("there is no format '{}'", name.to_bytes().escape_ascii());
            Some(known.ok_or_else(|| (Errno::INVALID, unknown()))?)
        }
    };
    let direct = options.flags & COWBELL_OPEN_DIRECT != 0;
    let options = open_options(&options, format).ok_or_else(|| invalid("unknown options"))?;
    Ok(Asked { path: Path::new(OsStr::from_bytes(path.to_bytes())), options, direct })
}

/// The files that were given, on descriptors of our own.
///
/// # Safety
///
/// `files` is NULL, or `count` of them can be read there, with names that are NULL or strings.
unsafe fn given(
    files: *const GivenFile,
    count: usize,
    asked: &Asked<'_>,
) -> Result<GivenFiles, Failure> {
    if count > COWBELL_GIVEN_MAX {
        return Err(invalid("more files than may be given"));
    }
    if count > 0 && is_place(files).is_err() {
        return Err(invalid("no files"));
    }
    let mut host = GivenFiles::new();
    for at in 0..count {
        // SAFETY: the caller has so many there.
        let GivenFile { name, fd, reserved } = unsafe { files.add(at).read() };
        if name.is_null() || reserved != 0 {
            return Err(invalid("a file without a name, or of a newer version"));
        }
        // SAFETY: it is a string.
        let name = unsafe { CStr::from_ptr(name) };
        let named = |why: String| format!("{}: {why}", name.to_bytes().escape_ascii());
        let file = duplicate(fd).and_then(|fd| taken_file(fd, asked));
        let file = file.map_err(|why| (Errno::from_io(&why), named(why.to_string())))?;
        let name = Path::new(OsStr::from_bytes(name.to_bytes()));
        if name.as_os_str().is_empty() || host.has(name) {
            return Err((Errno::INVALID, named("no name, or one that is there twice".into())));
        }
        host.give(name, file);
    }
    Ok(host)
}

/// Another descriptor of the same open file.
fn duplicate(fd: c_int) -> io::Result<OwnedFd> {
    // SAFETY: it takes numbers, and says so if the first is no descriptor.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Which file is written, the image says: it takes for writing what can be.
fn taken_file(fd: OwnedFd, asked: &Asked<'_>) -> io::Result<DiskFile> {
    // SAFETY: it takes numbers, and the descriptor is open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    let can_write = flags >= 0 && flags & libc::O_ACCMODE == libc::O_RDWR;
    let write = asked.options.write && can_write;
    DiskFile::from_fd(fd, &DiskOptions { write, direct: asked.direct, ..DiskOptions::default() })
}

fn open_options(asked: &ImageOptions, format: Option<Format>) -> Option<OpenOptions> {
    const KNOWN: u32 = COWBELL_OPEN_WRITE
        | COWBELL_OPEN_DIRECT
        | COWBELL_OPEN_PROBE
        | COWBELL_OPEN_PROBE_BACKING
        | COWBELL_OPEN_SHARE;
    let has = |flag| asked.flags & flag != 0;
    if asked.size < size_of::<usize>() || asked.flags & !KNOWN != 0 || asked.reserved != 0 {
        return None;
    }
    let (backing, files) = match asked.files {
        COWBELL_FILES_REFUSE => (Policy::Refuse, Policy::SameDirectory),
        COWBELL_FILES_SAME_FOLDER => (Policy::SameDirectory, Policy::SameDirectory),
        COWBELL_FILES_ANY => (Policy::Any, Policy::Any),
        _ => return None,
    };
    let locking = match asked.locking {
        COWBELL_LOCKING_AUTO => Locking::Auto,
        COWBELL_LOCKING_ON => Locking::On,
        COWBELL_LOCKING_OFF => Locking::Off,
        _ => return None,
    };
    Some(OpenOptions {
        format,
        write: has(COWBELL_OPEN_WRITE),
        backing,
        files,
        probe_backing: has(COWBELL_OPEN_PROBE_BACKING),
        locking,
        force_share: has(COWBELL_OPEN_SHARE),
        ..OpenOptions::default()
    })
}

/// Puts `text` into a buffer of C's, cut where a character begins.
///
/// # Safety
///
/// `buffer` is NULL, or `size` bytes there can be written.
unsafe fn put_text(text: &str, buffer: *mut c_char, size: usize) {
    if buffer.is_null() || size == 0 {
        return;
    }
    let mut len = text.len().min(size - 1);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    // SAFETY: with the 0 it fits the buffer, which overlaps nothing of ours.
    unsafe {
        text.as_ptr().cast::<c_char>().copy_to_nonoverlapping(buffer, len);
        buffer.add(len).write(0);
    }
}
