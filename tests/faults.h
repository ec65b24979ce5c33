/* faults.h - faults to be planted in emitted kernels. */
#ifndef FAULTS_H
#define FAULTS_H
#include "runtime/cxx.h"

static const struct fault {
    int world; /* of mkstorm: where it shows */
    int race;  /* only ThreadSanitizer sees it for sure */
    const char *text;
    struct rt_plant plant;
} faults[] = {
    {0, 0, "the producer does not wait for its last copies", {"no-drain", {{"    drain();\n", "", 1}}}},
};
enum { FAULTS = sizeof faults / sizeof *faults };
#endif
