//! What C cannot bring about: panics inside the library, and agreement with the engine's own types.

use std::ffi::{CStr, CString, c_int};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowbell_engine::Limits;
use cowbell_engine::backend::{Backend, FileInfo, Harvest, Submission};
use cowbell_engine::status::{Status as Answer, StatusKind};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_engine::units::{FileId, HostOffset, Time};
use cowbell_formats::{CreateOptions, DiskHost, Format, create};
use libc::iovec;

use crate::backend::Chosen;
use crate::*;

/// A pool that panics when it is told to.
struct Panics {
    pool: Option<Pool>,
    when_asked: Arc<AtomicBool>,
    when_dropped: bool,
}

impl Panics {
    fn pool(&self) -> &Pool {
        assert!(!self.when_asked.load(Ordering::Relaxed), "induced");
        self.pool.as_ref().expect("it is dropped last")
    }
    fn pool_mut(&mut self) -> &mut Pool {
        self.pool();
        self.pool.as_mut().expect("it is dropped last")
    }
}

impl Backend for Panics {
    type File = DiskFile;
    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        self.pool_mut().attach(id, file)
    }
    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        self.pool_mut().detach(id)
    }
    fn submit(&mut self, submission: &mut Submission<'_>) {
        self.pool_mut().submit(submission);
    }
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.pool_mut().harvest(harvest);
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.pool().event_fd()
    }
    fn clock(&self) -> Time {
        clock()
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        // What the threads have is waited for all the same.
        drop(self.pool.take());
        assert!(!self.when_dropped, "induced");
    }
}

/// An engine that panics when that is set.
fn fragile(when_dropped: bool) -> (*mut Engine, Arc<AtomicBool>) {
    let when_asked = Arc::new(AtomicBool::new(false));
    let pool = Some(Pool::new(PoolOptions::default()).expect("a pool"));
    let backend = Panics { pool, when_asked: Arc::clone(&when_asked), when_dropped };
    let engine = Engine::new(Chosen::movable(backend), Limits::default());
    (Box::into_raw(Box::new(engine)), when_asked)
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn image(folder: &Path, name: &str, format: Format, backing: Option<&str>) -> CString {
    let path = folder.join(name);
    let mut options = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
    if let Some(backing) = backing {
        options.backing_file = Some(backing.into());
        options.backing_format = Some(format);
    }
    create(&DiskHost::default(), &path, format, &options).expect("it is made");
    CString::new(path.to_str().expect("a plain name")).expect("no 0 in it")
}

fn opened(path: &CStr, format: &CStr) -> Result<*mut Image, c_int> {
    let options = ImageOptions {
        size: size_of::<ImageOptions>(),
        format: format.as_ptr(),
        flags: COWBELL_OPEN_WRITE,
        files: COWBELL_FILES_SAME_FOLDER,
        ..ImageOptions::default()
    };
    let mut image = null_mut();
    // SAFETY: all of it lives for the time of the call.
    match unsafe {
        cowbell_image_open(path.as_ptr(), &raw const options, &raw mut image, null_mut(), 0)
    } {
        0 => Ok(image),
        error => Err(error),
    }
}

fn attached(engine: *mut Engine, image: *mut Image) -> Result<Disk, c_int> {
    let mut disk = 7;
    // SAFETY: the tests hand in what they have made, once.
    match unsafe { cowbell_attach(engine, image, &raw mut disk) } {
        0 => Ok(disk),
        error => {
            assert_eq!(disk, 0);
            Err(error)
        }
    }
}

const POISONED: c_int = -libc::ENOTRECOVERABLE;

#[test]
fn a_panic_stays_inside_and_poisons_the_engine() {
    let folder = folder();
    let path = image(folder.path(), "disk", Format::Raw, None);
    let (engine, panics) = fragile(false);
    let disk = attached(engine, opened(&path, c"raw").expect("it opens")).expect("it attaches");
    let mut byte = [1_u8];
    let piece = iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let list = &raw const piece;
    // SAFETY: the engine lives until it is destroyed at the end; the memory outlives it.
    unsafe {
        assert_eq!(cowbell_write(engine, disk, 0, list, 1, 0, 0), 0);
        panics.store(true, Ordering::Relaxed);
        assert_eq!(cowbell_run(engine), POISONED, "a panic in the backend");
        // It would work again, if anybody dared.
        panics.store(false, Ordering::Relaxed);
        let mut info = std::mem::zeroed::<DiskInfo>();
        let mut event = std::mem::zeroed::<Event>();
        let mut completion = std::mem::zeroed::<Completion>();
        let mut status = Status::default();
        let answers = [
            cowbell_run(engine),
            cowbell_fd(engine),
            cowbell_next_deadline(engine) as c_int,
            cowbell_poll(engine, &raw mut completion, 1),
            cowbell_poll_event(engine, &raw mut event),
            cowbell_drain(engine),
            cowbell_drained(engine),
            cowbell_disk_info(engine, disk, &raw mut info, size_of::<DiskInfo>()),
            cowbell_close(engine, disk),
            cowbell_read(engine, disk, 0, list, 1, 0),
            cowbell_write(engine, disk, 0, list, 1, 0, 0),
            cowbell_flush(engine, disk, 0),
            cowbell_zero(engine, disk, 0, 1, 0, 0),
            cowbell_discard(engine, disk, 0, 1, 0),
            cowbell_truncate(engine, disk, 512, 0),
            cowbell_status(engine, disk, 0, 1, &raw mut status, 0),
        ];
        assert_eq!(answers, [POISONED; 16]);
        // An image that it is given is closed, as ever.
        let other = image(folder.path(), "other", Format::Raw, None);
        let refused = attached(engine, opened(&other, c"raw").expect("it opens"));
        assert_eq!(refused, Err(POISONED));
        let again = opened(&other, c"raw").expect("nobody has it locked");
        assert_eq!(cowbell_image_close(again), 0);
        // Others do not hear of it.
        let mut healthy = null_mut();
        assert_eq!(cowbell_engine_create(null(), &raw mut healthy), 0);
        assert_eq!(cowbell_run(healthy), 0);
        assert_eq!(cowbell_engine_destroy(healthy), 0);
        assert_eq!(cowbell_engine_destroy(engine), 0);
    }
    assert!(opened(&path, c"raw").is_ok_and(|image| {
        // SAFETY: it was opened just now.
        unsafe { cowbell_image_close(image) == 0 }
    }));
}

#[test]
fn a_panic_at_the_very_end_stays_inside_too() {
    let (engine, _) = fragile(true);
    // SAFETY: it was made just now.
    assert_eq!(unsafe { cowbell_engine_destroy(engine) }, POISONED);
}

#[test]
fn a_panic_with_a_panic_in_it_stays_inside() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("induced, of what was panicked with");
        }
    }
    let answer: c_int = handle::answered(|| std::panic::panic_any(Bomb));
    assert_eq!(answer, POISONED);
}

#[test]
fn steady_requests_allocate_nothing() {
    const PIECES: usize = 40;
    let folder = folder();
    let path = image(folder.path(), "disk", Format::Raw, None);
    let mut bytes = vec![0_u8; PIECES * 512];
    let pieces: Vec<iovec> = bytes
        .chunks_mut(512)
        .map(|piece| iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: 512 })
        .collect();
    // SAFETY: the engine is made, and lives until it is destroyed; the memory outlives it.
    unsafe {
        let mut engine = null_mut();
        assert_eq!(cowbell_engine_create(null(), &raw mut engine), 0);
        let disk = attached(engine, opened(&path, c"raw").expect("it opens")).expect("attached");
        let round = || {
            let (mut begun, mut ended) = (0, 0);
            while ended < 32 {
                while begun < 32 {
                    let (list, count) = (pieces.as_ptr(), PIECES - begun % 8);
                    assert_eq!(cowbell_read(engine, disk, begun as u64 * 512, list, count, 0), 0);
                    begun += 1;
                }
                assert!(cowbell_run(engine) >= 0);
                let mut done = [Completion { user: 0, result: 0, reserved: 0 }; 8];
                let count = cowbell_poll(engine, done.as_mut_ptr(), done.len());
                assert!(count >= 0 && done[..count as usize].iter().all(|done| done.result == 0));
                ended += count;
            }
        };
        (0..50).for_each(|_| round());
        let counted = allocation_counter::measure(|| (0..200).for_each(|_| round()));
        assert_eq!(counted.count_total, 0, "{counted:?}");
        assert_eq!(cowbell_engine_destroy(engine), 0);
    }
}

/// The next event of a disk.
fn event(engine: *mut Engine) -> Event {
    let until = clock().plus_ms(20_000);
    loop {
        // SAFETY: the engine lives; any bytes are an event.
        unsafe {
            let mut event = std::mem::zeroed::<Event>();
            match cowbell_poll_event(engine, &raw mut event) {
                0 => assert!(cowbell_run(engine) >= 0),
                1 => return event,
                error => panic!("{error}"),
            }
        }
        assert!(clock().since(until) == 0, "nothing happens");
    }
}

#[test]
fn a_closed_disk_can_be_opened_at_once() {
    let folder = folder();
    let path = image(folder.path(), "disk", Format::Qcow2, None);
    // SAFETY: the engine is made, and lives until it is destroyed.
    unsafe {
        let mut engine = null_mut();
        assert_eq!(cowbell_engine_create(null(), &raw mut engine), 0);
        let mut disks = Vec::new();
        for _ in 0..20 {
            let image = opened(&path, c"qcow2").expect("nobody has it locked");
            let disk = attached(engine, image).expect("it attaches");
            assert_eq!(opened(&path, c"qcow2"), Err(-libc::EAGAIN), "it has two writers");
            assert!(!disks.contains(&disk));
            disks.push(disk);
            assert_eq!(cowbell_close(engine, disk), 0);
            let event = event(engine);
            let found = (event.kind, event.disk, event.result);
            assert_eq!(found, (COWBELL_EVENT_CLOSED, disk, 0));
        }
        assert_eq!(cowbell_engine_destroy(engine), 0);
    }
}

/// Makes the first entry of a qcow2 image's L1 table one that leads nowhere.
fn corrupt(path: &CStr) {
    let path = path.to_str().expect("a plain name");
    let mut file = std::fs::File::options().read(true).write(true).open(path).expect("it opens");
    let mut l1 = [0; 8];
    file.seek(SeekFrom::Start(40)).expect("it seeks");
    file.read_exact(&mut l1).expect("it reads");
    file.seek(SeekFrom::Start(u64::from_be_bytes(l1))).expect("it seeks");
    file.write_all(&0x8000_0000_0000_0200_u64.to_be_bytes()).expect("it writes");
}

#[test]
fn corruption_is_told_of_its_disk_and_layer() {
    let folder = folder();
    let base = image(folder.path(), "base", Format::Qcow2, None);
    let top = image(folder.path(), "top", Format::Qcow2, Some("base"));
    corrupt(&base);
    let mut byte = [0_u8];
    let piece = iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: the engine is made, and lives until it is destroyed; the memory outlives it.
    unsafe {
        let mut engine = null_mut();
        assert_eq!(cowbell_engine_create(null(), &raw mut engine), 0);
        let above = attached(engine, opened(&top, c"qcow2").expect("it opens")).expect("attached");
        assert_eq!(cowbell_read(engine, above, 0, &raw const piece, 1, 5), 0);
        let told = event(engine);
        assert_eq!((told.kind, told.disk, told.layer), (COWBELL_EVENT_CORRUPT, above, 1));
        let what = CStr::from_ptr(told.what.as_ptr()).to_str().expect("plain text");
        assert!(!what.is_empty(), "{told:?}");
        let mut completion = Completion { user: 0, result: 0, reserved: 0 };
        while cowbell_poll(engine, &raw mut completion, 1) == 0 {
            assert!(cowbell_run(engine) >= 0);
        }
        assert_eq!((completion.user, completion.result), (5, -libc::EIO));
        assert_eq!(cowbell_close(engine, above), 0);
        let told = event(engine);
        let found = (told.kind, told.disk, told.result);
        assert_eq!(found, (COWBELL_EVENT_CLOSED, above, -libc::EIO));
        assert_eq!(cowbell_engine_destroy(engine), 0);
    }
}

#[test]
fn names_and_numbers_are_the_engines() {
    for (number, format) in Format::ALL.into_iter().enumerate() {
        // SAFETY: it is a constant string.
        let name = unsafe { CStr::from_ptr(cowbell_format(number)) };
        assert_eq!(name.to_str(), Ok(format.name()));
    }
    let kinds = [
        (StatusKind::Data, COWBELL_STATUS_DATA),
        (StatusKind::Compressed, COWBELL_STATUS_COMPRESSED),
        (StatusKind::Zero, COWBELL_STATUS_ZERO),
        (StatusKind::Unallocated, COWBELL_STATUS_UNALLOCATED),
    ];
    for (kind, number) in kinds {
        let host = Some((FileId(0x1234_5678), HostOffset(u64::MAX - 3)));
        for host in [host, None] {
            let answer = Answer { kind, len: 1 << 40, depth: 7, host }.to_bytes();
            // SAFETY: any bytes are a status.
            let found: Status = unsafe { std::mem::transmute(answer) };
            let (file, at) = host.map_or((0, 0), |(file, at)| (file.0, at.0));
            let wanted = Status {
                kind: number,
                layer: 7,
                has_host: host.is_some().into(),
                reserved: 0,
                file,
                len: 1 << 40,
                host: at,
                reserved2: 0,
            };
            assert_eq!(found, wanted);
        }
    }
}
