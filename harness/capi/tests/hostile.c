/*
 * Calls that no sane program makes: each is answered with an error, and none does harm.
 *
 *   hostile FOLDER
 *
 * with raw.img, 1 MiB; image.qcow2, 16 MiB; overlay.qcow2, backed by image.qcow2.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checks.h"
#include "cowbell.h"

static char error[256];

static struct cowbell_image *opened(const char *format, const char *path, uint32_t flags)
{
    struct cowbell_image_options options = {
        .size = sizeof options, .format = format, .flags = flags};
    struct cowbell_image *image = NULL;
    int answer = cowbell_image_open(path, &options, &image, error, sizeof error);
    if (answer != 0) {
        fprintf(stderr, "%s: %d: %s\n", path, answer, error);
        exit(1);
    }
    IS(error[0], 0);
    return image;
}

static struct cowbell_engine *made(uint32_t requests)
{
    struct cowbell_engine_options options = {.size = sizeof options, .requests = requests};
    struct cowbell_engine *engine = NULL;
    IS(cowbell_engine_create(&options, &engine), 0);
    return engine;
}

static cowbell_disk attached(struct cowbell_engine *engine, struct cowbell_image *image)
{
    cowbell_disk disk = 0;
    IS(cowbell_attach(engine, image, &disk), 0);
    IS(disk != 0, 1);
    return disk;
}

/* One turn; waits if there is nothing more to do. */
static void turn(struct cowbell_engine *engine)
{
    struct pollfd ready = {.fd = cowbell_fd(engine), .events = POLLIN};
    int again = cowbell_run(engine);
    IS(again == 0 || again == 1, 1);
    if (!again)
        poll(&ready, 1, 10);
}

/* How the request of this name ended. */
static int ended(struct cowbell_engine *engine, uint64_t user)
{
    struct cowbell_completion done;
    int count;
    while ((count = cowbell_poll(engine, &done, 1)) == 0)
        turn(engine);
    IS(count, 1);
    IS(done.user, user);
    return done.result;
}

static struct cowbell_event event_of(struct cowbell_engine *engine)
{
    struct cowbell_event event;
    int answer;
    while ((answer = cowbell_poll_event(engine, &event)) == 0)
        turn(engine);
    IS(answer, 1);
    return event;
}

static void about_the_library(void)
{
    IS(cowbell_abi_version(), COWBELL_ABI_VERSION);
    IS(strlen(cowbell_version()) >= 5, 1);
    IS(strcmp(cowbell_format(0), "raw"), 0);
    size_t formats = 0;
    while (cowbell_format(formats) != NULL)
        formats++;
    IS(formats, 5);
    IS(cowbell_format(SIZE_MAX) == NULL, 1);
    uint64_t now = cowbell_clock();
    IS(now > 0 && cowbell_clock() >= now, 1);
}

static void null_everywhere(void)
{
    struct iovec piece = {error, 1};
    struct cowbell_completion done;
    struct cowbell_event event;
    struct cowbell_disk_info info;
    struct cowbell_status status;
    cowbell_disk disk = 7;

    IS(cowbell_engine_create(NULL, NULL), -EINVAL);
    IS(cowbell_engine_destroy(NULL), 0);
    IS(cowbell_image_close(NULL), 0);
    IS(cowbell_fd(NULL), -EINVAL);
    IS(cowbell_next_deadline(NULL), -EINVAL);
    IS(cowbell_run(NULL), -EINVAL);
    IS(cowbell_poll(NULL, &done, 1), -EINVAL);
    IS(cowbell_poll_event(NULL, &event), -EINVAL);
    IS(cowbell_drain(NULL), -EINVAL);
    IS(cowbell_drained(NULL), -EINVAL);
    IS(cowbell_attach(NULL, NULL, &disk), -EINVAL);
    IS(disk, 0);
    IS(cowbell_disk_info(NULL, 1, &info, sizeof info), -EINVAL);
    IS(cowbell_close(NULL, 1), -EINVAL);
    IS(cowbell_read(NULL, 1, 0, &piece, 1, 0), -EINVAL);
    IS(cowbell_write(NULL, 1, 0, &piece, 1, 0, 0), -EINVAL);
    IS(cowbell_flush(NULL, 1, 0), -EINVAL);
    IS(cowbell_zero(NULL, 1, 0, 1, 0, 0), -EINVAL);
    IS(cowbell_discard(NULL, 1, 0, 1, 0), -EINVAL);
    IS(cowbell_truncate(NULL, 1, 0, 0), -EINVAL);
    IS(cowbell_status(NULL, 1, 0, 1, &status, 0), -EINVAL);
}

static void options_of_engines(void)
{
    struct {
        struct cowbell_engine_options known;
        char later[64];
    } grown = {.known = {.size = sizeof grown}};
    struct cowbell_engine *engine = (struct cowbell_engine *)&grown;
    struct cowbell_engine_options options = {.size = 0};

    IS(cowbell_engine_create(&options, &engine), -EINVAL);
    IS(engine == NULL, 1);
    options.size = sizeof options.size - 1;
    IS(cowbell_engine_create(&options, &engine), -EINVAL);
    options.size = SIZE_MAX;
    IS(cowbell_engine_create(&options, &engine), -E2BIG);
    options.size = sizeof options;
    options.backend = 99;
    IS(cowbell_engine_create(&options, &engine), -EINVAL);
    options.backend = 0;
    options.requests = UINT32_MAX;
    IS(cowbell_engine_create(&options, &engine), -EINVAL);
    options.requests = 0;
    options.depth = UINT32_MAX;
    IS(cowbell_engine_create(&options, &engine), -EINVAL);
    options.depth = 0;
    options.turn_us = UINT32_MAX;
    IS(cowbell_engine_create(&options, &engine), -EINVAL);
    IS(cowbell_engine_create((void *)((char *)&options + 1), &engine), -EINVAL);
    /* A program that was compiled with a later header: what it does not ask for does no harm. */
    IS(cowbell_engine_create(&grown.known, &engine), 0);
    IS(cowbell_engine_destroy(engine), 0);
    grown.later[40] = 1;
    IS(cowbell_engine_create(&grown.known, &engine), -E2BIG);
    IS(engine == NULL, 1);
    /* One that was compiled when there was nothing but the size. */
    options = (struct cowbell_engine_options){.size = sizeof options.size, .backend = 99};
    IS(cowbell_engine_create(&options, &engine), 0);
    IS(cowbell_engine_destroy(engine), 0);
    IS(cowbell_engine_create(NULL, &engine), 0);
    IS(cowbell_engine_destroy(engine), 0);
}

static void options_of_images(void)
{
    struct cowbell_image_options options = {.size = sizeof options, .format = "raw"};
    struct cowbell_image *image = (struct cowbell_image *)&options;
    char small[8];

    IS(cowbell_image_open(NULL, &options, &image, error, sizeof error), -EINVAL);
    IS(image == NULL, 1);
    IS(strlen(error) > 0, 1);
    IS(cowbell_image_open("raw.img", NULL, &image, error, sizeof error), -EINVAL);
    IS(cowbell_image_open("raw.img", &options, NULL, error, sizeof error), -EINVAL);
    IS(cowbell_image_open("no such file", &options, &image, error, sizeof error), -ENOENT);
    IS(strstr(error, "No such file") != NULL, 1);
    IS(cowbell_image_open("", &options, &image, NULL, 0), -ENOENT);
    IS(cowbell_image_open("/", &options, &image, NULL, 100) < 0, 1);
    memset(small, 'x', sizeof small);
    IS(cowbell_image_open("no such file", &options, &image, small, 5), -ENOENT);
    IS(strlen(small), 4);
    IS(small[5], 'x');
    IS(cowbell_image_open("no such file", &options, &image, small, 1), -ENOENT);
    IS(strlen(small), 0);
    small[0] = 'x';
    IS(cowbell_image_open("no such file", &options, &image, small, 0), -ENOENT);
    IS(small[0], 'x');
    options.format = NULL;
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    IS(strstr(error, "guess") != NULL, 1);
    options.format = "\xff\n";
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    IS(strchr(error, '\n') == NULL, 1);
    options.format = "qcow2";
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    IS(strcmp(error, "Image is not in qcow2 format"), 0);
    options.format = "raw";
    options.flags = 1u << 31;
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    options.flags = COWBELL_OPEN_WRITE | COWBELL_OPEN_SHARE;
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    options.flags = 0;
    options.files = 3;
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    options.files = 0;
    options.locking = 3;
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    options.locking = 0;
    options.reserved = 1;
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    options.reserved = 0;
    options.size = 0;
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EINVAL);
    options.size = sizeof options;
    IS(image == NULL, 1);

    /* A file that an image names is opened if that is allowed. */
    options.format = "qcow2";
    IS(cowbell_image_open("overlay.qcow2", &options, &image, error, sizeof error), -EPERM);
    options.files = COWBELL_FILES_SAME_FOLDER;
    IS(cowbell_image_open("overlay.qcow2", &options, &image, error, sizeof error), 0);
    IS(cowbell_image_close(image), 0);

    /* Two writers. */
    struct cowbell_image *first = opened("raw", "raw.img", COWBELL_OPEN_WRITE);
    options = (struct cowbell_image_options){.size = sizeof options, .format = "raw", .flags = 1};
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), -EAGAIN);
    IS(strstr(error, "lock") != NULL, 1);
    IS(cowbell_image_close(first), 0);
    IS(cowbell_image_open("raw.img", &options, &image, error, sizeof error), 0);
    IS(cowbell_image_close(image), 0);
}

static void attaching(void)
{
    struct cowbell_engine *engine = made(0);
    cowbell_disk disk = 7;
    struct cowbell_disk_info info[2];

    IS(cowbell_attach(engine, NULL, &disk), -EINVAL);
    IS(disk, 0);
    /* The image is gone in any case: it can be opened for writing again. */
    IS(cowbell_attach(engine, opened("raw", "raw.img", COWBELL_OPEN_WRITE), NULL), -EINVAL);
    IS(cowbell_attach(NULL, opened("raw", "raw.img", COWBELL_OPEN_WRITE), &disk), -EINVAL);
    disk = attached(engine, opened("raw", "raw.img", COWBELL_OPEN_WRITE));
    IS(cowbell_disk_info(engine, disk, NULL, sizeof *info), -EINVAL);
    IS(cowbell_disk_info(engine, disk, info, SIZE_MAX), -EINVAL);
    IS(cowbell_disk_info(engine, 0, info, sizeof *info), -EBADF);
    IS(cowbell_disk_info(engine, UINT64_MAX, info, sizeof *info), -EBADF);
    memset(info, 0xee, sizeof info);
    IS(cowbell_disk_info(engine, disk, info, 8), 0);
    IS(info[0].size, 1 << 20);
    IS(info[0].layers, 0xeeeeeeee);
    IS(cowbell_disk_info(engine, disk, info, sizeof info), 0);
    IS(info[0].layers, 1);
    IS(info[0].flags & COWBELL_DISK_READ_ONLY, 0);
    IS(strcmp(info[0].format, "raw"), 0);
    IS(info[0].largest_request, 1ull << 31);
    IS(info[1].size, 0);
    IS(cowbell_engine_destroy(engine), 0);
}

static void requests(void)
{
    static char memory[1 << 16];
    static struct iovec many[100000];
    struct cowbell_engine *engine = made(0);
    cowbell_disk disk = attached(engine, opened("qcow2", "image.qcow2", COWBELL_OPEN_WRITE));
    struct cowbell_status status;
    struct iovec piece = {memory, 512};
    const uint64_t size = 16 << 20;
    const uint64_t ends[] = {size, size - 511, UINT64_MAX, UINT64_MAX - 511, 1ull << 63};

    /* Beyond the end: said when the request ends. */
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        IS(cowbell_read(engine, disk, ends[i], &piece, 1, 1), 0);
        IS(ended(engine, 1), -EINVAL);
        IS(cowbell_write(engine, disk, ends[i], &piece, 1, COWBELL_WRITE_FUA, 2), 0);
        IS(ended(engine, 2), -EINVAL);
        IS(cowbell_zero(engine, disk, ends[i], 512, COWBELL_ZERO_FUA, 3), 0);
        IS(ended(engine, 3), -EINVAL);
        IS(cowbell_discard(engine, disk, ends[i], 512, 4), 0);
        IS(ended(engine, 4), -EINVAL);
        IS(cowbell_status(engine, disk, ends[i], 512, &status, 5), 0);
        IS(ended(engine, 5), -EINVAL);
        IS(status.kind, 0);
        /* (How a truncation to a size that is none fails is the format's to say.) */
        if (ends[i] != size) {
            IS(cowbell_truncate(engine, disk, ends[i], 6), 0);
            IS(ended(engine, 6) < 0, 1);
        }
    }
    IS(cowbell_zero(engine, disk, 0, UINT64_MAX, 0, 7), 0);
    IS(ended(engine, 7), -EINVAL);
    IS(cowbell_discard(engine, disk, 512, UINT64_MAX - 511, 8), 0);
    IS(ended(engine, 8), -EINVAL);

    /* Nothing at all is no mistake. */
    IS(cowbell_read(engine, disk, 0, NULL, 0, 9), 0);
    IS(ended(engine, 9), 0);
    IS(cowbell_write(engine, disk, size, &piece, 0, 0, 10), 0);
    IS(ended(engine, 10), 0);
    IS(cowbell_zero(engine, disk, 0, 0, 0, 11), 0);
    IS(ended(engine, 11), 0);
    IS(cowbell_status(engine, disk, 0, 0, &status, 11), 0);
    IS(ended(engine, 11), 0);
    IS(status.kind, 0);
    struct iovec nothing[2] = {{NULL, 0}, {memory, 0}};
    IS(cowbell_read(engine, disk, 0, nothing, 2, 12), 0);
    IS(ended(engine, 12), 0);

    /* Lists that cannot be. */
    struct iovec overflows[] = {{memory, SIZE_MAX / 2 + 1}, {memory, SIZE_MAX / 2 + 1}};
    struct iovec two_gib[] = {{memory, 1u << 31}, {memory, 1}};
    struct iovec wraps = {(void *)(UINTPTR_MAX - 10), 512};
    struct iovec no_memory = {NULL, 512};
    for (size_t i = 0; i < sizeof many / sizeof *many; i++)
        many[i] = (struct iovec){memory + i % 128 * 512, 1};
    IS(cowbell_read(engine, disk, 0, NULL, 1, 0), -EINVAL);
    IS(cowbell_read(engine, disk, 0, overflows, 1, 0), -EINVAL);
    IS(cowbell_read(engine, disk, 0, overflows, 2, 0), -EINVAL);
    IS(cowbell_read(engine, disk, 0, two_gib, 2, 0), -EINVAL);
    IS(cowbell_write(engine, disk, 0, &wraps, 1, 0, 0), -EINVAL);
    IS(cowbell_write(engine, disk, 0, &no_memory, 1, 0, 0), -EINVAL);
    IS(cowbell_read(engine, disk, 0, (void *)((char *)&piece + 1), 1, 0), -EINVAL);
    IS(cowbell_write(engine, disk, 0, many, 100000, 0, 0), -EINVAL);
    IS(cowbell_read(engine, disk, 0, many, SIZE_MAX, 0), -EINVAL);
    IS(cowbell_write(engine, disk, 0, many, COWBELL_IOV_MAX, 0, 13), 0);
    IS(ended(engine, 13), 0);

    /* Bits that mean nothing. */
    IS(cowbell_write(engine, disk, 0, &piece, 1, 4, 0), -EINVAL);
    IS(cowbell_zero(engine, disk, 0, 512, 4, 0), -EINVAL);
    IS(cowbell_status(engine, disk, 0, 512, NULL, 0), -EINVAL);
    IS(cowbell_status(engine, disk, 0, 512, (void *)((char *)&status + 1), 0), -EINVAL);

    /* Answers without a place. */
    IS(cowbell_poll(engine, NULL, 1), -EINVAL);
    IS(cowbell_poll(engine, NULL, 0), 0);
    IS(cowbell_poll_event(engine, NULL), -EINVAL);

    /* What there is, in spite of all this. */
    IS(cowbell_status(engine, disk, 0, size, &status, UINT64_MAX), 0);
    IS(ended(engine, UINT64_MAX), 0);
    IS(status.kind, COWBELL_STATUS_DATA);
    IS(status.len, 65536);
    IS(status.layer, 0);
    IS(status.has_host, 1);
    IS(status.host % 65536, 0);
    IS(cowbell_truncate(engine, disk, size + 4096, 14), 0);
    IS(ended(engine, 14), 0);
    struct cowbell_disk_info info;
    IS(cowbell_disk_info(engine, disk, &info, sizeof info), 0);
    IS(info.size, size + 4096);
    IS(cowbell_drain(engine), 0);
    IS(cowbell_drained(engine), 0);
    IS(cowbell_flush(engine, disk, 15), -ESHUTDOWN);
    while (cowbell_drained(engine) == 0)
        turn(engine);
    IS(cowbell_drained(engine), 1);
    IS(cowbell_engine_destroy(engine), 0);
}

static void disks_that_are_gone(void)
{
    char memory[4096];
    struct iovec piece = {memory, sizeof memory};
    struct cowbell_engine *engine = made(4), *other = made(4);
    struct cowbell_disk_info info;
    struct cowbell_status status;
    cowbell_disk disk = attached(engine, opened("raw", "raw.img", 0));
    cowbell_disk of_other = attached(other, opened("raw", "raw.img", 0));
    cowbell_disk none[] = {0, UINT64_MAX, disk + 1, disk + (1 << 16), of_other, 0};

    /* As many as there may be. */
    for (uint64_t i = 0; i < 4; i++)
        IS(cowbell_read(engine, disk, 0, &piece, 1, i), 0);
    IS(cowbell_read(engine, disk, 0, &piece, 1, 4), -EAGAIN);
    IS(cowbell_flush(engine, disk, 4), -EAGAIN);
    struct cowbell_completion done[8];
    int count = 0, more;
    while (count < 4) {
        turn(engine);
        more = cowbell_poll(engine, done + count, 8 - (size_t)count);
        IS(more >= 0, 1);
        count += more;
    }
    IS(count, 4);

    /* It was opened for reading only. */
    IS(cowbell_disk_info(engine, disk, &info, sizeof info), 0);
    IS(info.flags & COWBELL_DISK_READ_ONLY, COWBELL_DISK_READ_ONLY);
    IS(cowbell_write(engine, disk, 0, &piece, 1, 0, 20), 0);
    IS(ended(engine, 20), -EROFS);

    /* It is being closed, and is closed. */
    IS(cowbell_close(engine, disk), 0);
    IS(cowbell_close(engine, disk), -EALREADY);
    IS(cowbell_read(engine, disk, 0, &piece, 1, 21), -ESHUTDOWN);
    struct cowbell_event event = event_of(engine);
    IS(event.kind, COWBELL_EVENT_CLOSED);
    IS(event.disk, disk);
    IS(event.result, 0);
    /* Its place is another's, its number is not. */
    cowbell_disk next = attached(engine, opened("raw", "raw.img", COWBELL_OPEN_WRITE));
    IS(next != disk, 1);
    none[5] = disk;
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        IS(cowbell_read(engine, none[i], 0, &piece, 1, 0), -EBADF);
        IS(cowbell_write(engine, none[i], 0, &piece, 1, 0, 0), -EBADF);
        IS(cowbell_flush(engine, none[i], 0), -EBADF);
        IS(cowbell_zero(engine, none[i], 0, 1, 0, 0), -EBADF);
        IS(cowbell_discard(engine, none[i], 0, 1, 0), -EBADF);
        IS(cowbell_truncate(engine, none[i], 0, 0), -EBADF);
        IS(cowbell_status(engine, none[i], 0, 1, &status, 0), -EBADF);
        IS(cowbell_close(engine, none[i]), -EBADF);
        IS(cowbell_disk_info(engine, none[i], &info, sizeof info), -EBADF);
    }
    IS(cowbell_poll(engine, done, 8), 0);

    /* An engine that ends at work has given the memory back. */
    memset(memory, 'a', sizeof memory);
    for (uint64_t i = 0; i < 4; i++)
        IS(cowbell_write(engine, next, i * 4096, &piece, 1, 0, i), 0);
    IS(cowbell_run(engine) >= 0, 1);
    IS(cowbell_engine_destroy(engine), 0);
    IS(cowbell_engine_destroy(other), 0);
}

static void *on_another_thread(void *engine)
{
    IS(cowbell_run(engine), -EACCES);
    IS(cowbell_next_deadline(engine), -EACCES);
    IS(cowbell_engine_destroy(engine), -EACCES);
    return NULL;
}

static void threads(void)
{
    struct cowbell_engine_options options = {
        .size = sizeof options, .backend = COWBELL_BACKEND_IO_URING};
    struct cowbell_engine *engine = NULL;
    pthread_t thread;
    int answer = cowbell_engine_create(&options, &engine);

    if (!(cowbell_features() & COWBELL_FEATURE_IO_URING))
        IS(answer, -EOPNOTSUPP);
    if (answer < 0) {
        printf("SKIPPED: no io_uring here: %s\n", strerror(-answer));
        return;
    }
    pthread_create(&thread, NULL, on_another_thread, engine);
    pthread_join(thread, NULL);
    IS(cowbell_run(engine), 0);
    IS(cowbell_engine_destroy(engine), 0);
}

int main(int argc, char **argv)
{
    if (argc != 2 || chdir(argv[1]) < 0)
        return 2;
    about_the_library();
    null_everywhere();
    options_of_engines();
    options_of_images();
    attaching();
    requests();
    disks_that_are_gone();
    threads();
    printf("%d checks, %d failures\n", checks, failures);
    return failures > 0;
}
