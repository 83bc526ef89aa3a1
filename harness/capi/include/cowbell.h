/*
 * cowbell: disk images (raw, QED, qcow2, VMDK, VDI) in your event loop.
 *
 * THE LOOP. After any request, when the descriptor of cowbell_fd() is readable, and when
 * cowbell_next_deadline() has come: cowbell_run(), then cowbell_poll() and cowbell_poll_event() until
 * they have nothing more. A turn of the loop, in this order:
 *
 *   1. Wait for the descriptor, for everybody else's, and until the deadline; not at all if the last
 *      turn said that there is more to do.
 *   2. See to everybody else's events.
 *   3. Submit what there is. What is refused with -EAGAIN stays in your queue.
 *   4. cowbell_run(), cowbell_poll(), cowbell_poll_event().
 *   5. There is more to do if cowbell_run() answered 1, or if cowbell_poll() made room while something
 *      is still queued.
 *
 * examples/epoll.c is a whole program.
 *
 * WHAT WAITS. cowbell_image_open(), cowbell_image_open_given(), cowbell_image_close() and
 * cowbell_engine_destroy() may wait for a disk, and cowbell_attach() where it fails, since it closes the
 * files. Nothing else does, and nothing calls back.
 *
 * REQUESTS are cowbell_read() to cowbell_status(). Offsets and lengths are bytes, any will do. `user` is
 * nothing to the library and comes back in the completion: a number, or a pointer as (uintptr_t).
 *
 * ERRORS are negative error numbers of <errno.h>. A request answers twice. When it is submitted: 0, or
 * why it was not taken, and then nothing more is heard of it; -EAGAIN: as many are in flight as may
 * be, try again after cowbell_poll(); -EBADF: there is no such disk; -ESHUTDOWN: the disk is being
 * closed, or the engine drained; -EBUSY: it is paused; -EINVAL: a NULL, unknown flags, more than COWBELL_IOV_MAX pieces or
 * more than 2 GiB of memory. When it has ended: in its completion. A request about 0 bytes ends well.
 *
 * ORDER. There is none among requests in flight. A flush is for writes whose completion had been
 * polled when it was submitted.
 *
 * MEMORY. What you lend (buffers, the place of a status) is the engine's from a call that answered 0
 * until that request's completion has come from cowbell_poll(), or the engine has been destroyed: it
 * has to stay, readable and writable. Others, such as a guest, may change it meanwhile; what a write
 * takes of it then may be the old or the new. All else (lists of pieces, options, paths) is copied
 * during the call. What the library makes is given back with the function that says so.
 *
 * THREADS. An engine, and everything of it, is used by one thread at a time; with
 * COWBELL_BACKEND_IO_URING only by the one that made it (-EACCES). Engines know nothing of each other. An image
 * that no engine has may be opened and closed on any thread. After fork() the child uses none of it.
 * The library's own threads take no signals.
 *
 * DEFECTS of the library that show as a panic end nothing but the engine: the call, and all calls with
 * that engine after it, answer -ENOTRECOVERABLE. Its memory stays lent until cowbell_engine_destroy()
 * has answered 0. (What is known of the defect is on standard error.)
 *
 * NOT CHECKED: that pointers that are not NULL lead to what they should.
 */


#ifndef COWBELL_H
#define COWBELL_H

/* Made by cbindgen from harness/capi/src: change it there. */

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/**
 * The version of what this header declares. It changes when a program that was compiled with an
 * older header would go wrong. Compare it with cowbell_abi_version() if the library is not linked
 * statically.
 */
#define COWBELL_ABI_VERSION 1

/**
 * A feature: COWBELL_BACKEND_IO_URING is compiled in. (Whether the kernel has it,
 * cowbell_engine_create() tells.)
 */
#define COWBELL_FEATURE_IO_URING 1

/**
 * Linux native AIO for files opened with COWBELL_OPEN_DIRECT, threads for all others.
 */
#define COWBELL_BACKEND_NATIVE 0

/**
 * Linux io_uring for all files. Such an engine is used only by the thread that made it; others are
 * answered -EACCES.
 */
#define COWBELL_BACKEND_IO_URING 1

/**
 * Threads for all files.
 */
#define COWBELL_BACKEND_THREADS 2

/**
 * Open the image for writing too. Its backing files are only ever read.
 */
#define COWBELL_OPEN_WRITE 1

/**
 * Read and write past the page cache (O_DIRECT). Opening fails where the file system cannot.
 */
#define COWBELL_OPEN_DIRECT 2

/**
 * Without a format in the options: guess it from the file's first bytes. Whoever wrote a raw disk
 * decides what is guessed, so ask for this only with images that you trust. If raw is guessed,
 * writes that would make the disk look like another format fail with -EPERM.
 */
#define COWBELL_OPEN_PROBE 4

/**
 * Guess the format of a backing file if the image does not say it. Otherwise such an image is
 * refused.
 */
#define COWBELL_OPEN_PROBE_BACKING 8

/**
 * Read although others may write meanwhile. Not with COWBELL_OPEN_WRITE.
 */
#define COWBELL_OPEN_SHARE 16

/**
 * Other files that an image names: an image with a backing file is refused; other files that hold
 * parts of the disk (VMDK extents, a qcow2 data file) are opened if they are in the image's folder.
 */
#define COWBELL_FILES_REFUSE 0

/**
 * Any file that is in the folder of the image that names it.
 */
#define COWBELL_FILES_SAME_FOLDER 1

/**
 * Any file that this process can open. Only for images that you trust: a guest that could write to
 * an image's header would read any file of yours.
 */
#define COWBELL_FILES_ANY 2

/**
 * Files are locked as QEMU locks them, where the file system can.
 */
#define COWBELL_LOCKING_AUTO 0

/**
 * Files are locked; one that cannot be is not opened.
 */
#define COWBELL_LOCKING_ON 1

/**
 * Files are not locked: you answer for it that nobody else writes them.
 */
#define COWBELL_LOCKING_OFF 2

/**
 * The most files that cowbell_image_open_given() takes.
 */
#define COWBELL_GIVEN_MAX 4096

/**
 * The disk takes no writes: its image was opened without COWBELL_OPEN_WRITE.
 */
#define COWBELL_DISK_READ_ONLY 1

/**
 * The format was guessed.
 */
#define COWBELL_DISK_PROBED 2

/**
 * Some file should have been locked, and its file system has no locks: make sure that no other
 * program writes it.
 */
#define COWBELL_DISK_UNLOCKED 4

/**
 * Something is impossible in the image's tables: `what` in words, at byte `at` of the file of layer
 * `layer`. Requests that need what it says fail with -EIO, others go on. The image wants a check.
 * (`disk` is 0 if it is closed meanwhile.)
 */
#define COWBELL_EVENT_CORRUPT 1

/**
 * A disk that was to be closed is gone. `result` is 0: its image is clean and stable. Or it is a
 * negative error number: the first that kept it from that; -EIO also if it was found corrupt.
 * Completions of its requests may come even after this.
 */
#define COWBELL_EVENT_CLOSED 2

/**
 * A disk that was to be paused has nothing in flight any more: nothing is read from or written to its files
 * until cowbell_resume(). `result` is 0.
 */
#define COWBELL_EVENT_PAUSED 3

/**
 * The most pieces of memory of one request, as of readv(2).
 */
#define COWBELL_IOV_MAX 1024

/**
 * A write: end only when it is stable.
 */
#define COWBELL_WRITE_FUA 1

/**
 * A write: compress it, where the format can. It reads the same.
 */
#define COWBELL_WRITE_COMPRESSED 2

/**
 * A zeroing: its space may be given back.
 */
#define COWBELL_ZERO_UNMAP 1

/**
 * A zeroing: end only when it is stable.
 */
#define COWBELL_ZERO_FUA 2

/**
 * Bytes that somebody wrote, or may have.
 */
#define COWBELL_STATUS_DATA 1

/**
 * The same, compressed.
 */
#define COWBELL_STATUS_COMPRESSED 2

/**
 * A layer says that these are zeros.
 */
#define COWBELL_STATUS_ZERO 3

/**
 * No layer says anything: zeros.
 */
#define COWBELL_STATUS_UNALLOCATED 4

/**
 * An engine: see cowbell_engine_create().
 */
struct cowbell_engine;

/**
 * An image that is open, and that no engine has yet: see cowbell_image_open().
 */
struct cowbell_image;

/**
 * How an engine is made. Set all of it to 0, then `size`, then what you want: 0 is the default.
 */
struct cowbell_engine_options {
    /**
     * sizeof(struct cowbell_engine_options).
     */
    size_t size;
    /**
     * COWBELL_BACKEND_*.
     */
    uint32_t backend;
    /**
     * The most requests at a time, of all disks; one more is refused with -EAGAIN. At most 16384;
     * 256 by default.
     */
    uint32_t requests;
    /**
     * The most operations that the kernel has at a time, or the most threads of
     * COWBELL_BACKEND_THREADS. At most 4096; 128 by default, 16 threads.
     */
    uint32_t depth;
    /**
     * How long one cowbell_run() may hold its caller, about, in microseconds. At most a second;
     * 500 by default.
     */
    uint32_t turn_us;
};

/**
 * A request that has ended.
 */
struct cowbell_completion {
    /**
     * What it was submitted with.
     */
    uint64_t user;
    /**
     * 0, or a negative error number. -EINVAL: the range does not fit the disk; -EROFS, -EPERM and
     * -EOPNOTSUPP: the image does not take it; others as the kernel said. After an error any part of
     * the range may have been read or written.
     */
    int32_t result;
    /**
     * 0.
     */
    uint32_t reserved;
};

/**
 * How to open an image. Set all of it to 0, then `size`, then what you want.
 */
struct cowbell_image_options {
    /**
     * sizeof(struct cowbell_image_options).
     */
    size_t size;
    /**
     * The image's format, one of cowbell_format(). NULL: only with COWBELL_OPEN_PROBE.
     */
    const char *format;
    /**
     * Bits of COWBELL_OPEN_*.
     */
    uint32_t flags;
    /**
     * Which other files may be opened: COWBELL_FILES_*.
     */
    uint32_t files;
    /**
     * COWBELL_LOCKING_*.
     */
    uint32_t locking;
    /**
     * 0.
     */
    uint32_t reserved;
};

/**
 * A file of an image that somebody has opened: see cowbell_image_open_given().
 */
struct cowbell_given_file {
    /**
     * The name by which the file will be asked for.
     */
    const char *name;
    /**
     * Its descriptor: a regular file or a block device, open for reading, or for both.
     */
    int fd;
    /**
     * 0.
     */
    uint32_t reserved;
};

/**
 * A disk of an engine. 0 is none, and no number is given twice: that of a closed disk, or of another
 * engine's, answers -EBADF for ever.
 */
typedef uint64_t cowbell_disk;

/**
 * What a disk is. (Whether its image takes zeros, discards and other sizes is not told beforehand:
 * such requests end with -EOPNOTSUPP if it does not.)
 */
struct cowbell_disk_info {
    /**
     * Bytes. cowbell_truncate() changes it.
     */
    uint64_t size;
    /**
     * The most bytes of one read or write. Other requests may be about the whole disk.
     */
    uint64_t largest_request;
    /**
     * Any byte offset and length will do; multiples of this many bytes (a power of two) take no
     * detour through another buffer.
     */
    uint32_t request_align;
    /**
     * Any memory will do; the same for addresses and for lengths of its pieces.
     */
    uint32_t memory_align;
    /**
     * Bits of COWBELL_DISK_*.
     */
    uint32_t flags;
    /**
     * Image files, one upon the other: 1 if there is no backing file.
     */
    uint32_t layers;
    /**
     * The format's name, one of cowbell_format(). Lives for ever.
     */
    const char *format;
};

/**
 * Something that happened to a disk, beside the ends of requests.
 */
struct cowbell_event {
    /**
     * COWBELL_EVENT_*. There may be others in a later version: ignore what you do not know.
     */
    uint32_t kind;
    /**
     * See the kind.
     */
    int32_t result;
    /**
     * Which disk.
     */
    cowbell_disk disk;
    /**
     * See the kind.
     */
    uint64_t at;
    /**
     * See the kind: 0 is the image itself, 1 its backing file.
     */
    uint32_t layer;
    /**
     * 0.
     */
    uint32_t reserved;
    /**
     * See the kind: a string, cut if it does not fit.
     */
    char what[96];
};

/**
 * What is at an offset of a disk: the answer to cowbell_status().
 */
struct cowbell_status {
    /**
     * COWBELL_STATUS_*; 0: there is no answer (yet).
     */
    uint8_t kind;
    /**
     * The layer that says so: 0 is the image itself, 1 its backing file.
     */
    uint8_t layer;
    /**
     * 1: `host` says where the bytes are.
     */
    uint8_t has_host;
    /**
     * 0.
     */
    uint8_t reserved;
    /**
     * Which file: other numbers are other files of this engine.
     */
    uint32_t file;
    /**
     * For how many bytes: 1 to as many as were asked about. What follows may be of the same kind.
     */
    uint64_t len;
    /**
     * At which byte of the file they are, one after the other.
     */
    uint64_t host;
    /**
     * 0.
     */
    uint64_t reserved2;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The COWBELL_ABI_VERSION that the library was compiled with.
 */
uint32_t cowbell_abi_version(void);

/**
 * The library's version, such as "0.1.0".
 */
const char *cowbell_version(void);

/**
 * What was compiled in: bits of COWBELL_FEATURE_*.
 */
uint64_t cowbell_features(void);

/**
 * The name of the format with this number, counted from 0, as cowbell_image_options takes it; NULL
 * if there are no more.
 */
const char *cowbell_format(size_t number);

/**
 * The time now, in nanoseconds: CLOCK_MONOTONIC, as cowbell_next_deadline() counts.
 */
uint64_t cowbell_clock(void);

/**
 * Makes an engine, and puts it into `*engine` (NULL after an error). `options` may be NULL. All its
 * memory is taken here, tables of images apart.
 *
 * -EOPNOTSUPP: no io_uring was compiled in; -ENOSYS, -EPERM: the kernel has none, or forbids it;
 * -EAGAIN: the machine's native AIO is used up (fs.aio-max-nr).
 */
int cowbell_engine_create(const struct cowbell_engine_options *options,
                          struct cowbell_engine **engine);

/**
 * Ends an engine. Afterwards all memory that was lent to it is the caller's again. It waits for the
 * operations in flight and for files to be closed, and begins nothing more: requests that had not
 * ended are left as a crash would leave them, and their completions are lost. So drain it before,
 * with cowbell_drain(). NULL is no mistake.
 *
 * Answers 0; -EACCES: it is another thread's, and still there; -ENOTRECOVERABLE: something panicked
 * in the end, and the memory that was lent is not to be used again.
 */
int cowbell_engine_destroy(struct cowbell_engine *engine);

/**
 * A descriptor that is readable when cowbell_run() has something to collect, until it has: add it to
 * your epoll, by levels or by edges, and never read it. It is the same one for as long as the engine
 * lives, and the engine's: do not close it.
 */
int cowbell_fd(struct cowbell_engine *engine);

/**
 * When cowbell_run() must be called although the descriptor is not readable: nanoseconds, as
 * cowbell_clock() counts. -1: never. Other negative numbers are errors. May change in every
 * cowbell_run(). Being late leaves images marked as in use for longer, no more.
 */
int64_t cowbell_next_deadline(struct cowbell_engine *engine);

/**
 * Collects what has come back, goes on with requests, and hands their operations to the kernel. It
 * never waits. To call it without need is harmless.
 *
 * Answers 0; 1: call it again before you wait, for nothing will wake you for what is left; or a
 * negative error number.
 */
int cowbell_run(struct cowbell_engine *engine);

/**
 * Puts requests that have ended into `completions`, oldest first, `max` at most, and answers how many
 * (or a negative error number). Their memory is yours again. If it is `max`, there may be more.
 */
int cowbell_poll(struct cowbell_engine *engine,
                 struct cowbell_completion *completions,
                 size_t max);

/**
 * Begins to end everything: no more requests are taken (-ESHUTDOWN), those in flight run to their
 * end, every image is left clean and stable. Go on as ever, with cowbell_run() and cowbell_poll(),
 * until cowbell_drained() does not answer 0; call cowbell_run() before you wait.
 */
int cowbell_drain(struct cowbell_engine *engine);

/**
 * Since cowbell_drain(): 0, not yet; 1, everything has ended and every image is clean and stable;
 * or a negative error number, the first that kept an image from that, -EIO also if an image was found
 * corrupt. There may be completions to poll. The next request opens the engine again.
 */
int cowbell_drained(struct cowbell_engine *engine);

/**
 * Opens an image, and the files that it is backed by. This waits for the disk: call it before your
 * loop, or on any other thread; give the image to the loop's thread then.
 *
 * The image is put into `*image`; it goes to an engine with cowbell_attach(), or is closed with
 * cowbell_image_close(). `options` may not be NULL: somebody has to say the format.
 *
 * Answers 0, or a negative error number. Then `*image` is NULL, and what is wrong is in words in
 * `error`, a buffer of `error_size` bytes: always with a 0 at its end, cut if it does not fit. The
 * text may have several lines. `error` may be NULL.
 *
 * -EINVAL: arguments, or an image that is damaged or not of this format; -EOPNOTSUPP: a format or
 * feature that is not handled; -EPERM: `files` forbids what the image names; -EAGAIN: somebody else
 * has it locked; -EFBIG: too large, or too many backing files; others are those of open(2), read(2)
 * and fcntl(2).
 */
int cowbell_image_open(const char *path,
                       const struct cowbell_image_options *options,
                       struct cowbell_image **image,
                       char *error,
                       size_t error_size);

/**
 * The same as cowbell_image_open() for a program that may open no files itself: all that there are
 * are these `count` ones. Nothing is looked for in the file system.
 *
 * `name` is the image's, and one of theirs. The names of others are asked for as the images' headers have
 * them, in the folder of the image that names them: "disk", whose header names "base.img", is given as
 * "disk" and "base.img", "a/disk" as "a/disk" and "a/base.img". "." and ".." are understood, links there are none.
 * `files` in the options means the same as ever; COWBELL_FILES_ANY leads to no more than what is given.
 *
 * Descriptors are duplicated: they stay yours whatever the answer is, and may be closed then. What belongs to an
 * open file is shared by both: COWBELL_OPEN_DIRECT sets O_DIRECT for it, O_NONBLOCK is taken away, O_NOATIME may be set.
 * With COWBELL_OPEN_WRITE the image has to be open for both, and not for appending. Its locks
 * end when the image or disk is closed, whatever descriptors of yours there are.
 *
 * As cowbell_image_open(), and: -EBADF: a descriptor that is none; -EINVAL: one that cannot be used, no name, a
 * name that is there twice, more than COWBELL_GIVEN_MAX; -EACCES: one that is to be written, and is not open for that; -ENOENT:
 * a file that was not given.
 */
int cowbell_image_open_given(const char *name,
                             const struct cowbell_given_file *files,
                             size_t count,
                             const struct cowbell_image_options *options,
                             struct cowbell_image **image,
                             char *error,
                             size_t error_size);

/**
 * Closes an image that was given to no engine. May wait for the file system. NULL is no mistake.
 */
int cowbell_image_close(struct cowbell_image *image);

/**
 * Gives an image to an engine: its disk is put into `*disk`, and takes requests from now on. Other
 * disks go on meanwhile. It waits for nobody, but asks the kernel what the files are.
 *
 * The image is the engine's whatever the answer is, and must not be used again. `*disk` is 0 after
 * an error.
 */
int cowbell_attach(struct cowbell_engine *engine, struct cowbell_image *image, cowbell_disk *disk);

/**
 * Says what a disk is. `size` is sizeof(struct cowbell_disk_info): so many bytes are written, 0 in
 * what this version of the library does not know.
 */
int cowbell_disk_info(struct cowbell_engine *engine,
                      cowbell_disk disk,
                      struct cowbell_disk_info *info,
                      size_t size);

/**
 * Begins to close a disk while others go on. It takes no more requests (-ESHUTDOWN), those in flight
 * run to their end, the image is left clean and stable. Go on as ever until cowbell_poll_event()
 * says COWBELL_EVENT_CLOSED; call cowbell_run() before you wait. From then on the files are not locked
 * any more; a thread of the library's closes them, so that your loop does not wait for that.
 *
 * -EBADF: there is no such disk; -EALREADY: it is being closed.
 */
int cowbell_close(struct cowbell_engine *engine,
                  cowbell_disk disk);

/**
 * Pauses a disk while others go on: it takes no requests (-EBUSY), and begins no work of its own; so do its
 * backing files. Those in flight run to their end: go on as ever until cowbell_poll_event() says
 * COWBELL_EVENT_PAUSED. The files hold then what a crash would leave: flush before, to have all in them that
 * was written.
 *
 * -EBADF: there is no such disk; -ESHUTDOWN: it is being closed; -EBUSY: it is paused.
 */
int cowbell_pause(struct cowbell_engine *engine,
                  cowbell_disk disk);

/**
 * Ends a pause, whether COWBELL_EVENT_PAUSED has come or not: the disk takes requests again. Call cowbell_run()
 * before you wait. Without a pause it changes nothing, and answers 0.
 *
 * -EBADF: there is no such disk; -ESHUTDOWN: it is being closed.
 */
int cowbell_resume(struct cowbell_engine *engine,
                   cowbell_disk disk);

/**
 * How much a disk may do from now on: so many bytes and so many requests a second; 0: as many as it can, which is what
 * a disk begins with. Reads and writes count by their bytes, and with zeros and discards as requests; flushes and
 * questions go at once. What is over waits in the engine, in its order, and takes places of it: heed
 * cowbell_next_deadline(). What a tenth of a second allows may go at once after a pause as long.
 *
 * -EBADF: there is no such disk.
 */
int cowbell_set_rate(struct cowbell_engine *engine,
                     cowbell_disk disk,
                     uint64_t bytes,
                     uint64_t requests);

/**
 * What happened to disks, oldest first. Answers 1, and the event in `*event`; 0: nothing more; or a
 * negative error number. Ask after each cowbell_run(), until it answers 0.
 */
int cowbell_poll_event(struct cowbell_engine *engine, struct cowbell_event *event);

/**
 * Reads at `offset` into `count` pieces of memory, one after the other.
 */
int cowbell_read(struct cowbell_engine *engine,
                 cowbell_disk disk,
                 uint64_t offset,
                 const struct iovec *iov,
                 size_t count,
                 uint64_t user);

/**
 * Writes `count` pieces of memory, one after the other, at `offset`. `flags` are bits of
 * COWBELL_WRITE_*. What the memory holds is taken at any time until
 * the request has come back.
 */
int cowbell_write(struct cowbell_engine *engine,
                  cowbell_disk disk,
                  uint64_t offset,
                  const struct iovec *iov,
                  size_t count,
                  uint32_t flags,
                  uint64_t user);

/**
 * Makes every write that had ended before this call stable.
 */
int cowbell_flush(struct cowbell_engine *engine, cowbell_disk disk, uint64_t user);

/**
 * Makes `len` bytes at `offset` read as zeros. `flags` are bits of COWBELL_ZERO_*.
 */
int cowbell_zero(struct cowbell_engine *engine,
                 cowbell_disk disk,
                 uint64_t offset,
                 uint64_t len,
                 uint32_t flags,
                 uint64_t user);

/**
 * The contents of `len` bytes at `offset` are no longer needed. Whole clusters read as zeros
 * afterwards where the format can say so; in a raw image the bytes become zeros or stay.
 */
int cowbell_discard(struct cowbell_engine *engine,
                    cowbell_disk disk,
                    uint64_t offset,
                    uint64_t len,
                    uint64_t user);

/**
 * Sets the disk's size, a multiple of 512 bytes; what it gains reads as zeros. Not every format can
 * shrink, and some disks cannot change. Requests in flight beyond a smaller size may fail, or undo
 * it: wait for them first.
 */
int cowbell_truncate(struct cowbell_engine *engine,
                     cowbell_disk disk,
                     uint64_t size,
                     uint64_t user);

/**
 * Asks what is at `offset`, and for how many of the `len` bytes from there. The answer is in
 * `*answer` when the request has come back; until then it is the engine's.
 */
int cowbell_status(struct cowbell_engine *engine,
                   cowbell_disk disk,
                   uint64_t offset,
                   uint64_t len,
                   struct cowbell_status *answer,
                   uint64_t user);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* COWBELL_H */
