/*
 * A disk in the epoll loop of a program in C: the loop serves a timer that ticks, and the engine.
 *
 *   epoll FORMAT IMAGE [native | io_uring | threads] [direct]
 *
 * It fills the image with a pattern, 32 requests at a time, flushes, reads all of it back and looks at
 * every byte; then it makes the third quarter zeros, discards the last, and closes the disk. What was
 * on it is lost.
 *
 *   cargo rustc --release -p cowbell-capi --crate-type staticlib
 *   cc -I harness/capi/include harness/capi/examples/epoll.c target/release/libcowbell_capi.a \
 *       -lpthread -lm -ldl -o epoll
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "cowbell.h"

enum { BLOCK = 64 * 1024, DEPTH = 32, BATCH = 16, TICK_NS = 1000 * 1000 };

/* What is done next, when all of the step before has come back. */
enum step { WRITE, FLUSH, READ, ASK, ZERO, DISCARD, CLOSE };

/* One request: its place is its name. */
struct slot {
    unsigned char *memory; /* The engine's, from submission to completion. */
    uint64_t block;
    int is_busy;
};

static struct cowbell_engine *engine;
static cowbell_disk disk;
static struct cowbell_disk_info info;
static struct cowbell_status status;
static struct slot slots[DEPTH];

static void fail(const char *what, int result)
{
    fprintf(stderr, "%s: %s\n", what, strerror(-result));
    exit(1);
}

static void check(const char *what, int result)
{
    if (result < 0)
        fail(what, result);
}

/* What byte `at` of the disk shall be. */
static unsigned char pattern(uint64_t at)
{
    return (unsigned char)(at * 31 + at / 4099 + at / BLOCK + 1);
}

/* How long the block is: the disk may end in it. */
static size_t length_of(uint64_t block)
{
    uint64_t left = info.size - block * BLOCK;
    return left < BLOCK ? (size_t)left : BLOCK;
}

/* Submits a read or write of one block, whose memory is in three pieces. */
static int submit_block(enum step step, struct slot *slot)
{
    uint64_t start = slot->block * BLOCK;
    size_t length = length_of(slot->block), first = length / 3, second = length / 5;
    struct iovec pieces[3] = {
        {slot->memory, first},
        {slot->memory + first, second},
        {slot->memory + first + second, length - first - second},
    };
    uint64_t user = (uint64_t)(slot - slots);

    if (step == READ) {
        memset(slot->memory, 0, length);
        return cowbell_read(engine, disk, start, pieces, 3, user);
    }
    for (size_t i = 0; i < length; i++)
        slot->memory[i] = pattern(start + i);
    return cowbell_write(engine, disk, start, pieces, 3, 0, user);
}

/* Submits the only request of a step that has one. */
static int submit_one(enum step step, uint64_t user)
{
    uint64_t quarter = info.size / 4 / 512 * 512;

    switch (step) {
    case FLUSH:
        return cowbell_flush(engine, disk, user);
    case ASK:
        return cowbell_status(engine, disk, 0, info.size, &status, user);
    case ZERO:
        return cowbell_zero(engine, disk, 2 * quarter, quarter, COWBELL_ZERO_UNMAP, user);
    default:
        return cowbell_discard(engine, disk, 3 * quarter, info.size - 3 * quarter, user);
    }
}

static void verify(const struct slot *slot)
{
    uint64_t start = slot->block * BLOCK;

    for (size_t i = 0; i < length_of(slot->block); i++) {
        if (slot->memory[i] != pattern(start + i)) {
            fprintf(stderr, "byte %llu is wrong\n", (unsigned long long)(start + i));
            exit(1);
        }
    }
}

/* Opening waits for the disk: it comes before the loop, or on another thread. */
static struct cowbell_image *open_image(const char *format, const char *path, int direct)
{
    struct cowbell_image_options options = {
        .size = sizeof options,
        .format = format,
        .flags = COWBELL_OPEN_WRITE | (direct ? COWBELL_OPEN_DIRECT : 0),
    };
    struct cowbell_image *image;
    char error[512];

    if (cowbell_image_open(path, &options, &image, error, sizeof error) < 0) {
        fprintf(stderr, "%s: %s\n", path, error);
        exit(1);
    }
    return image;
}

/* Milliseconds for epoll_wait: not at all, until the engine wants to be run, or for ever. */
static int timeout(int more)
{
    int64_t deadline = cowbell_next_deadline(engine);
    int64_t now = (int64_t)cowbell_clock();

    if (more)
        return 0;
    if (deadline < 0)
        return -1;
    if (deadline <= now)
        return 0;
    return (int)((deadline - now) / 1000000 % 60000 + 1);
}

int main(int argc, char **argv)
{
    struct cowbell_engine_options options = {.size = sizeof options, .requests = DEPTH};
    const char *backend = argc > 3 ? argv[3] : "native";
    int direct = argc > 4 && strcmp(argv[4], "direct") == 0;

    if (argc < 3) {
        fprintf(stderr, "epoll FORMAT IMAGE [native | io_uring | threads] [direct]\n");
        return 2;
    }
    if (strcmp(backend, "io_uring") == 0)
        options.backend = COWBELL_BACKEND_IO_URING;
    else if (strcmp(backend, "threads") == 0)
        options.backend = COWBELL_BACKEND_THREADS;
    check(backend, cowbell_engine_create(&options, &engine));
    check("attach", cowbell_attach(engine, open_image(argv[1], argv[2], direct), &disk));
    check("info", cowbell_disk_info(engine, disk, &info, sizeof info));

    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct itimerspec tick = {{0, TICK_NS}, {0, TICK_NS}};
    int loop = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event on_timer = {.events = EPOLLIN, .data.u32 = 1};
    struct epoll_event on_disk = {.events = EPOLLIN, .data.u32 = 2};
    if (timer < 0 || loop < 0 || timerfd_settime(timer, 0, &tick, NULL) < 0 ||
        epoll_ctl(loop, EPOLL_CTL_ADD, timer, &on_timer) < 0 ||
        epoll_ctl(loop, EPOLL_CTL_ADD, cowbell_fd(engine), &on_disk) < 0)
        fail("setting up", -errno);
    for (int i = 0; i < DEPTH; i++)
        if ((slots[i].memory = malloc(BLOCK)) == NULL)
            fail("memory", -ENOMEM);

    uint64_t blocks = (info.size + BLOCK - 1) / BLOCK, next = 0, requests = 0, ticks = 0;
    enum step step = WRITE;
    int in_flight = 0, more = 1, is_closed = 0;
    while (!is_closed) {
        /* 1. Wait. */
        struct epoll_event ready[4];
        int count = epoll_wait(loop, ready, 4, timeout(more));
        if (count < 0 && errno != EINTR)
            fail("epoll_wait", -errno);

        /* 2. Everybody else's events. The engine's own needs nothing done here. */
        for (int i = 0; i < count; i++) {
            uint64_t passed;
            if (ready[i].data.u32 == 1 && read(timer, &passed, sizeof passed) == sizeof passed)
                ticks += passed;
        }

        /* 3. Submit what there is. What is refused stays where it was. */
        uint64_t last = step == WRITE || step == READ ? blocks : 1;
        for (int i = 0; i < DEPTH && next < last && step != CLOSE; i++) {
            if (slots[i].is_busy)
                continue;
            slots[i].block = next;
            int result = last == 1 && step != WRITE && step != READ
                             ? submit_one(step, (uint64_t)i)
                             : submit_block(step, &slots[i]);
            if (result == -EAGAIN)
                break;
            check("submit", result);
            slots[i].is_busy = 1;
            next++;
            in_flight++;
        }

        /* 4. Run, then hear what has ended. */
        more = cowbell_run(engine);
        check("run", more);
        struct cowbell_completion done[BATCH];
        int ended;
        do {
            ended = cowbell_poll(engine, done, BATCH);
            check("poll", ended);
            for (int i = 0; i < ended; i++) {
                struct slot *slot = &slots[done[i].user];
                check("a request", done[i].result);
                slot->is_busy = 0;
                if (step == READ)
                    verify(slot);
                in_flight--;
                requests++;
            }
            /* There is room again: go round at once if something is still to be submitted. */
            more |= ended > 0;
        } while (ended == BATCH);
        struct cowbell_event event;
        int is_event;
        while ((is_event = cowbell_poll_event(engine, &event)) == 1) {
            if (event.kind == COWBELL_EVENT_CORRUPT)
                fprintf(stderr, "corrupt: %s\n", event.what);
            if (event.kind == COWBELL_EVENT_CLOSED) {
                check("closing", event.result);
                is_closed = 1;
            }
        }
        check("events", is_event);

        /* The next step begins when all of this one has ended. */
        if (step != CLOSE && next == last && in_flight == 0) {
            step++;
            next = 0;
            more = 1;
            if (step == CLOSE)
                check("close", cowbell_close(engine, disk));
        }
    }
    check("destroy", cowbell_engine_destroy(engine));
    for (int i = 0; i < DEPTH; i++)
        free(slots[i].memory);
    close(loop);
    close(timer);
    printf("%s: %llu bytes in %llu requests, read back as they were written; "
           "byte 0 is %s; %s\n",
           info.format, (unsigned long long)info.size, (unsigned long long)requests,
           status.kind == COWBELL_STATUS_DATA ? "data" : "not data",
           ticks > 0 ? "the timer ticked meanwhile" : "it took less than a tick");
    return 0;
}
