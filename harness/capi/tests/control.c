/*
 * Disks that are paused, and that may do so much a second and no more, beside another one.
 *
 *   control FOLDER
 *
 * with disk.qcow2, backed by base.qcow2; other.img, raw; 16 MiB each.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "checks.h"
#include "cowbell.h"

#define LEN (64 << 10)

static struct cowbell_engine *engine;
static char memory[LEN];

static cowbell_disk disk_of(const char *format, const char *path)
{
    struct cowbell_image_options options = {.size = sizeof options, .format = format,
        .flags = COWBELL_OPEN_WRITE, .files = COWBELL_FILES_SAME_FOLDER};
    struct cowbell_image *image = NULL;
    cowbell_disk disk = 0;
    IS(cowbell_image_open(path, &options, &image, NULL, 0), 0);
    IS(cowbell_attach(engine, image, &disk), 0);
    return disk;
}

static void turn(void)
{
    struct pollfd ready = {.fd = cowbell_fd(engine), .events = POLLIN};
    int again = cowbell_run(engine);
    IS(again == 0 || again == 1, 1);
    if (!again)
        poll(&ready, 1, 5);
}

static int put(cowbell_disk disk, uint64_t offset)
{
    struct iovec piece = {.iov_base = memory, .iov_len = LEN};
    return cowbell_write(engine, disk, offset, &piece, 1, 0, offset);
}

/* So many requests end well. */
static void end(int count)
{
    struct cowbell_completion done;
    while (count > 0) {
        int found = cowbell_poll(engine, &done, 1);
        IS(found == 0 || found == 1, 1);
        if (found == 0) {
            turn();
            continue;
        }
        IS(done.result >= 0, 1);
        count--;
    }
}

static void is_paused(cowbell_disk disk)
{
    struct cowbell_event event;
    while (cowbell_poll_event(engine, &event) == 0)
        turn();
    IS(event.kind, COWBELL_EVENT_PAUSED);
    IS(event.disk == disk, 1);
    IS(event.result, 0);
    IS(cowbell_poll_event(engine, &event), 0);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void pausing(cowbell_disk disk, cowbell_disk other)
{
    IS(put(disk, 0), 0);
    IS(put(disk, 1 << 20), 0);
    IS(cowbell_pause(engine, disk), 0);
    IS(cowbell_pause(engine, disk), -EBUSY);
    IS(put(disk, 2 << 20), -EBUSY);
    IS(cowbell_flush(engine, disk, 1), -EBUSY);
    end(2);
    is_paused(disk);
    /* The other one is not. */
    IS(put(other, 0), 0);
    end(1);
    IS(put(disk, 2 << 20), -EBUSY);
    IS(cowbell_resume(engine, disk), 0);
    IS(cowbell_resume(engine, disk), 0);
    IS(put(disk, 2 << 20), 0);
    end(1);
    /* At once, with nothing in flight; and a paused disk closes. */
    IS(cowbell_pause(engine, disk), 0);
    is_paused(disk);
    IS(cowbell_resume(engine, disk), 0);
    IS(cowbell_pause(engine, disk + 1), -EBADF);
    IS(cowbell_resume(engine, 0), -EBADF);
    IS(cowbell_pause(NULL, disk), -EINVAL);
    IS(cowbell_resume(NULL, disk), -EINVAL);
}

/* How long eight writes take. */
static double eight(cowbell_disk disk)
{
    double began = now();
    for (int i = 0; i < 8; i++)
        IS(put(disk, (uint64_t)i << 20), 0);
    end(8);
    return now() - began;
}

static void rates(cowbell_disk disk, cowbell_disk other)
{
    /* 512 KiB, of which 102 KiB and one request go at once. */
    IS(cowbell_set_rate(engine, disk, 1 << 20, 0), 0);
    IS(eight(disk) >= 0.25, 1);
    /* 8 requests, of which 2 and one go at once. */
    IS(cowbell_set_rate(engine, disk, 0, 20), 0);
    IS(eight(disk) >= 0.2, 1);
    /* The other one does not wait for it. */
    IS(cowbell_set_rate(engine, disk, 1, 0), 0);
    IS(put(disk, 0), 0);
    IS(put(disk, 0), 0);
    end(1);
    eight(other);
    /* What waits goes when it may. */
    IS(cowbell_set_rate(engine, disk, 0, 0), 0);
    end(1);
    eight(disk);
    IS(cowbell_set_rate(engine, disk + 1, 1, 1), -EBADF);
    IS(cowbell_set_rate(NULL, disk, 1, 1), -EINVAL);
}

int main(int argc, char **argv)
{
    struct cowbell_engine_options options = {.size = sizeof options, .requests = 32};
    struct cowbell_event event;
    if (argc != 2 || chdir(argv[1]) < 0)
        return 2;
    IS(cowbell_engine_create(&options, &engine), 0);
    cowbell_disk disk = disk_of("qcow2", "disk.qcow2"), other = disk_of("raw", "other.img");
    pausing(disk, other);
    rates(disk, other);
    IS(cowbell_pause(engine, disk), 0);
    is_paused(disk);
    IS(cowbell_close(engine, disk), 0);
    IS(cowbell_pause(engine, disk), -ESHUTDOWN);
    IS(cowbell_resume(engine, disk), -ESHUTDOWN);
    while (cowbell_poll_event(engine, &event) == 0)
        turn();
    IS(event.kind, COWBELL_EVENT_CLOSED);
    IS(event.result, 0);
    IS(cowbell_pause(engine, disk), -EBADF);
    IS(cowbell_set_rate(engine, disk, 0, 0), -EBADF);
    IS(cowbell_engine_destroy(engine), 0);
    printf("%d checks, %d failures\n", checks, failures);
    return failures > 0;
}
