/* check.h - assertions of the C tests: a failure says where and what, and the test goes on;
   `return check_done();` ends main with 1 if anything failed or nothing was checked. */
#ifndef CHECK_H
#define CHECK_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_count, check_failed;

#define CHECK(cond) CHECKF(cond, "%s", #cond)
#define CHECKF(cond, ...)                                                   \
    do {                                                                    \
        check_count++;                                                      \
        if (!(cond)) {                                                      \
            check_failed++;                                                 \
            fprintf(stderr, "%s:%d: failed: ", __FILE__, __LINE__);         \
            fprintf(stderr, __VA_ARGS__);                                   \
            fputc('\n', stderr);                                            \
        }                                                                   \
    } while (0)
#define CHECK_STR(got, want)                                                \
    do {                                                                    \
        const char *g_ = (got), *w_ = (want);                               \
        CHECKF(g_ && w_ && !strcmp(g_, w_), "got  \"%s\"\n    want \"%s\"", \
               g_ ? g_ : "(null)", w_ ? w_ : "(null)");                     \
    } while (0)
/* Leave the test as skipped; Automake reads exit code 77. */
#define SKIP(...)                                                           \
    do {                                                                    \
        printf("SKIP: ");                                                   \
        printf(__VA_ARGS__);                                                \
        putchar('\n');                                                      \
        exit(77);                                                           \
    } while (0)

static inline int check_done(void)
{
    printf("%d checks, %d failed\n", check_count, check_failed);
    return check_failed || !check_count;
}
#endif
