/*
 * Images whose files somebody else has opened: nothing is looked for in the file system.
 *
 *   given FOLDER
 *
 * with a/disk.qcow2, 1 MiB, backed by ../base.img, raw, full of 7. They are moved to moved.qcow2 and moved.img.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checks.h"
#include "cowbell.h"

static char error[256];

static int opened(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0) {
        perror(path);
        exit(1);
    }
    return fd;
}

/* Opens a/disk.qcow2 of these files. */
static int given(const struct cowbell_given_file *files, size_t count, uint32_t flags,
                 struct cowbell_image **image)
{
    struct cowbell_image_options options = {.size = sizeof options, .format = "qcow2",
        .flags = flags, .files = COWBELL_FILES_ANY};
    *image = (struct cowbell_image *)&options;
    int answer = cowbell_image_open_given("a/disk.qcow2", files, count, &options, image, error,
                                          sizeof error);
    IS(*image == NULL, answer != 0);
    IS(error[0] == 0, answer == 0);
    if (answer == 0 && cowbell_image_close(*image) != 0)
        exit(1);
    return answer;
}

static void what_is_no_file(int disk, int base)
{
    struct cowbell_image *image;
    struct cowbell_given_file files[3] = {
        {.name = "a/disk.qcow2", .fd = disk}, {.name = "base.img", .fd = base}};
    static struct cowbell_given_file many[COWBELL_GIVEN_MAX + 1];
    const int no_descriptors[] = {-1, -2, 1 << 30, 1023, INT32_MIN, INT32_MAX, AT_FDCWD};
    int fds[2];

    IS(given(files, 2, 0, &image), 0);
    for (size_t i = 0; i < sizeof no_descriptors / sizeof *no_descriptors; i++) {
        files[1].fd = no_descriptors[i];
        IS(given(files, 2, 0, &image), -EBADF);
        IS(strncmp(error, "base.img: ", 10), 0);
    }
    /* What is no file of a disk. */
    IS(pipe(fds), 0);
    files[1].fd = fds[0];
    IS(given(files, 2, 0, &image), -EINVAL);
    files[1].fd = opened("/", O_RDONLY);
    IS(given(files, 2, 0, &image), -EINVAL);
    close(files[1].fd);
    files[1].fd = opened("/dev/null", O_RDWR);
    IS(given(files, 2, 0, &image), -EINVAL);
    close(files[1].fd);
    files[1].fd = opened("moved.img", O_WRONLY);
    IS(given(files, 2, 0, &image), -EINVAL);
    close(files[1].fd);
    files[1].fd = opened("moved.img", O_PATH);
    IS(given(files, 2, 0, &image), -EINVAL);
    close(files[1].fd);
    close(fds[0]);
    close(fds[1]);
    files[1].fd = base;

    /* Counts and names that cannot be. */
    IS(given(NULL, 0, 0, &image), -ENOENT);
    IS(given(NULL, 1, 0, &image), -EINVAL);
    IS(given((void *)((char *)files + 1), 2, 0, &image), -EINVAL);
    IS(given(many, COWBELL_GIVEN_MAX + 1, 0, &image), -EINVAL);
    IS(given(many, SIZE_MAX, 0, &image), -EINVAL);
    IS(given(many, 1, 0, &image), -EINVAL);
    IS(given(files, 1, 0, &image), -ENOENT);
    IS(given(files + 1, 1, 0, &image), -ENOENT);
    files[2] = (struct cowbell_given_file){.name = "./base.img", .fd = base};
    IS(given(files, 3, 0, &image), -EINVAL);
    files[2].name = "";
    IS(given(files, 3, 0, &image), -EINVAL);
    files[2].name = NULL;
    IS(given(files, 3, 0, &image), -EINVAL);
    files[2].name = "a/more";
    files[2].reserved = 1;
    IS(given(files, 3, 0, &image), -EINVAL);
    files[2].reserved = 0;
    IS(given(files, 3, 0, &image), 0);
    struct cowbell_image_options options = {.size = sizeof options, .format = "qcow2"};
    IS(cowbell_image_open_given(NULL, files, 2, &options, &image, error, sizeof error), -EINVAL);
    IS(cowbell_image_open_given("a/disk.qcow2", files, 2, NULL, &image, NULL, 0), -EINVAL);
    IS(cowbell_image_open_given("a/disk.qcow2", files, 2, &options, NULL, NULL, 0), -EINVAL);
    IS(cowbell_image_open_given("a/disk.qcow2", files, 2, &options, &image, error, 5), -EPERM);
    IS(strlen(error), 4);
    /* Given is not written: the descriptor reads only. */
    IS(given(files, 2, COWBELL_OPEN_WRITE, &image), -EACCES);
    int appends = opened("moved.qcow2", O_RDWR | O_APPEND);
    files[0].fd = appends;
    IS(given(files, 2, COWBELL_OPEN_WRITE, &image), -EINVAL);
    IS(given(files, 2, 0, &image), 0);
    close(appends);
    /* All of them are ours still. */
    IS(fcntl(disk, F_GETFD) >= 0, 1);
    IS(fcntl(base, F_GETFD) >= 0, 1);
}

static void finish(struct cowbell_engine *engine, uint64_t user)
{
    if (failures > 0)
        exit(1); /* It may never end. */
    struct pollfd ready = {.fd = cowbell_fd(engine), .events = POLLIN};
    struct cowbell_completion done;
    while (cowbell_poll(engine, &done, 1) == 0) {
        if (cowbell_run(engine) == 0)
            poll(&ready, 1, 10);
    }
    IS(done.user, user);
    IS(done.result, 0);
}

static void a_disk(void)
{
    struct cowbell_given_file files[] = {
        {.name = "a/disk.qcow2", .fd = opened("moved.qcow2", O_RDWR)},
        {.name = "base.img", .fd = opened("moved.img", O_RDONLY)}};
    struct cowbell_image_options options = {.size = sizeof options, .format = "qcow2",
        .flags = COWBELL_OPEN_WRITE, .files = COWBELL_FILES_ANY};
    struct cowbell_image_options plain = {.size = sizeof plain, .format = "raw",
        .flags = COWBELL_OPEN_WRITE};
    struct cowbell_image *image = NULL, *other = NULL;
    struct cowbell_engine *engine = NULL;
    struct cowbell_event event;
    static char memory[8192];
    struct iovec piece = {memory, 4096};
    cowbell_disk disk;

    IS(cowbell_image_open_given("a/disk.qcow2", files, 2, &options, &image, error, sizeof error), 0);
    /* It is locked as any, until it is closed, whatever descriptors there are. */
    IS(cowbell_image_open("moved.qcow2", &plain, &other, error, sizeof error), -EAGAIN);
    IS(cowbell_image_close(image), 0);
    IS(cowbell_image_open("moved.qcow2", &plain, &other, error, sizeof error), 0);
    IS(cowbell_image_close(other), 0);
    IS(cowbell_image_open_given("a/disk.qcow2", files, 2, &options, &image, error, sizeof error), 0);
    close(files[0].fd);
    close(files[1].fd);
    IS(cowbell_engine_create(NULL, &engine), 0);
    IS(cowbell_attach(engine, image, &disk), 0);
    memset(memory, 9, sizeof memory);
    IS(cowbell_write(engine, disk, 0, &piece, 1, 0, 1), 0);
    finish(engine, 1);
    piece.iov_len = sizeof memory;
    memset(memory, 0, sizeof memory);
    IS(cowbell_read(engine, disk, 0, &piece, 1, 2), 0);
    finish(engine, 2);
    IS(memory[0], 9);
    IS(memory[4095], 9);
    IS(memory[4096], 7);
    IS(memory[8191], 7);
    IS(cowbell_close(engine, disk), 0);
    while (cowbell_poll_event(engine, &event) == 0) {
        struct pollfd ready = {.fd = cowbell_fd(engine), .events = POLLIN};
        if (cowbell_run(engine) == 0)
            poll(&ready, 1, 10);
    }
    IS(event.kind, COWBELL_EVENT_CLOSED);
    IS(event.result, 0);
    IS(cowbell_engine_destroy(engine), 0);
}

int main(int argc, char **argv)
{
    if (argc != 2 || chdir(argv[1]) < 0)
        return 2;
    int disk = opened("a/disk.qcow2", O_RDONLY), base = opened("base.img", O_RDONLY);
    IS(rename("a/disk.qcow2", "moved.qcow2"), 0);
    IS(rename("base.img", "moved.img"), 0);
    what_is_no_file(disk, base);
    close(disk);
    close(base);
    a_disk();
    printf("%d checks, %d failures\n", checks, failures);
    return failures > 0;
}
