/*
 * What the tests in C count with.
 */
#ifndef CHECKS_H
#define CHECKS_H

#include <stdio.h>

/* The call answers what is wanted; if not, that is said, and counted. */
#define IS(call, wanted) is(#call, __LINE__, (long long)(call), (long long)(wanted))

static int failures, checks;

static void is(const char *call, int line, long long answer, long long wanted)
{
    checks++;
    if (answer == wanted)
        return;
    fprintf(stderr, "line %d: %s answered %lld, not %lld\n", line, call, answer, wanted);
    failures++;
}

#endif
