/* fuzz.h - a small stand-alone driver for functions of libFuzzer's form, so that `make check`
   can run a bounded and repeatable number of mutated inputs with any compiler.

       #include "tests/fuzz/fuzz.h"
       int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) { ... return 0; }
       static const char *const words[] = {"\"vocab_size\"", "1e999", NULL};
       static const struct fuzz_seed seeds[] = {{"{}", 2}, {NULL, 0}};
       FUZZ_MAIN(seeds, words, "toy/toy-qwen3/config.json", NULL)

   FUZZ_MAIN's files are looked for in $srcdir (the tests folder), ".", and "tests".  Program
   arguments:  [-n ITERATIONS] [-s SEED] [-i ITERATION] [FILE...]
   -n  how many inputs; default $FUZZ_ITERATIONS or 20000.    -s  default $FUZZ_SEED or 1.
   -i  run only that one iteration, to see a failure again.   FILE  more seeds.
   The seeds themselves are run first, unchanged.  A crash, an abort, a sanitizer's report
   or 20 seconds in one input print the seed and the iteration and end with a failure.
   Built with -DFUZZ_LIBFUZZER, there is no main here: libFuzzer brings its own. */
#ifndef FUZZ_H
#define FUZZ_H
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct fuzz_seed {
    const void *data;
    size_t size;
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#ifdef FUZZ_LIBFUZZER
#define FUZZ_MAIN(seeds, words, ...) const void *const fuzz_unused[] = {(seeds), (words)};
#else
#define FUZZ_MAIN(seeds, words, ...)                            \
    int main(int argc, char **argv)                             \
    {                                                           \
        static const char *const files[] = {__VA_ARGS__};       \
        return fuzz_main(argc, argv, (seeds), (words), files);  \
    }

enum { FUZZ_MAX_SEEDS = 64, FUZZ_HANG_S = 20 };
static struct fuzz_seed fuzz_seeds[FUZZ_MAX_SEEDS];
static int fuzz_n_seeds;
static unsigned long long fuzz_seed_number;
static long fuzz_iteration;             /* -1 - s while seed s runs unchanged */
static char fuzz_where[160];            /* said when a run dies; written before each input */

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static void fuzz_say(void)
{
    if (write(2, fuzz_where, strlen(fuzz_where)) < 0)
        _exit(3);
}

static void fuzz_died(int sig)
{
    fuzz_say();
    signal(sig, SIG_DFL);
    raise(sig);
}

/* splitmix64: one step of STATE. */
static uint64_t fuzz_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static size_t fuzz_below(uint64_t *state, size_t n)
{
    return n ? fuzz_random(state) % n : 0;
}

/* Replace CUT bytes at AT of BUF (*LEN of CAP) by the N bytes of WITH. */
static void fuzz_splice(uint8_t *buf, size_t *len, size_t cap, size_t at, size_t cut,
                        const void *with, size_t n)
{
    if (cut > *len - at)
        cut = *len - at;
    if (*len - cut + n > cap)
        return;
    memmove(buf + at + n, buf + at + cut, *len - at - cut);
    memcpy(buf + at, with, n);
    *len = *len - cut + n;
}

/* One random change of BUF. */
static void fuzz_mutate(uint8_t *buf, size_t *len, size_t cap, const char *const *words,
                        uint64_t *state)
{
    static const char *const numbers[] = {"0", "-1", "1.5", "2147483648", "4294967296",
        "9223372036854775808", "18446744073709551616", "1e999", "-0", "null", "true", "\"\"",
        "[]", "{}", "\\u0000", "\xff\xfe", "\xed\xa0\x80"};
    size_t at = fuzz_below(state, *len + 1), n_words = 0;
    size_t span = 1 + fuzz_below(state, fuzz_below(state, 4) ? 8 : *len + 1);
    const char *word;
    uint8_t byte = (uint8_t)fuzz_random(state);
    const struct fuzz_seed *other = &fuzz_seeds[fuzz_below(state, fuzz_n_seeds)];
    size_t from = fuzz_below(state, other->size);

    while (words && words[n_words])
        n_words++;
    switch (fuzz_below(state, 8)) {
    case 0:                                     /* flip a bit */
        if (at < *len)
            buf[at] ^= 1u << (byte & 7);
        break;
    case 1:                                     /* another byte */
        fuzz_splice(buf, len, cap, at, 1, &byte, 1);
        break;
    case 2:                                     /* one byte more */
        fuzz_splice(buf, len, cap, at, 0, &byte, 1);
        break;
    case 3:                                     /* cut out */
        fuzz_splice(buf, len, cap, at, span, "", 0);
        break;
    case 4:                                     /* cut off the end */
        if (fuzz_below(state, 4) == 0)
            *len = at;
        break;
    case 5:                                     /* a word, over a token or between */
        word = n_words && byte & 1 ? words[fuzz_below(state, n_words)]
                                   : numbers[fuzz_below(state, sizeof(numbers) / sizeof(*numbers))];
        fuzz_splice(buf, len, cap, at, byte & 2 ? span : 0, word, strlen(word));
        break;
    case 6:                                     /* a piece of another seed */
        if (span > other->size - from)
            span = other->size - from;
        fuzz_splice(buf, len, cap, at, byte & 1 ? span : 0,
                    other->size ? (const uint8_t *)other->data + from : (const uint8_t *)"", span);
        break;
    case 7:                                     /* another digit where a digit is */
        while (at < *len && (buf[at] < '0' || buf[at] > '9'))
            at++;
        if (at < *len)
            buf[at] = '0' + byte % 10;
        break;
    }
}

/* Run one input from a block of exactly its size, so that a sanitizer sees every overrun. */
static void fuzz_one(const void *data, size_t size, long iteration)
{
    uint8_t *copy = malloc(size ? size : 1);

    if (!copy)
        abort();
    if (size)
        memcpy(copy, data, size);
    fuzz_iteration = iteration;
    snprintf(fuzz_where, sizeof(fuzz_where), "fuzz: died at -s %llu -i %ld (%zu bytes)\n",
             fuzz_seed_number, iteration, size);
    alarm(FUZZ_HANG_S);
    LLVMFuzzerTestOneInput(copy, size);
    alarm(0);
    free(copy);
}

static void fuzz_iterate(long iteration, const char *const *words)
{
    uint64_t state = fuzz_seed_number * 0x2545f4914f6cdd1du + (uint64_t)iteration;
    const struct fuzz_seed *seed = &fuzz_seeds[fuzz_below(&state, fuzz_n_seeds)];
    size_t len = seed->size, cap = len + 4096;
    uint8_t *buf = malloc(cap);
    int changes = 1 + (int)fuzz_below(&state, 1 + fuzz_below(&state, 6));

    if (!buf)
        abort();
    if (len)
        memcpy(buf, seed->data, len);
    for (int c = 0; c < changes; c++)
        fuzz_mutate(buf, &len, cap, words, &state);
    fuzz_one(buf, len, iteration);
    free(buf);
}

/* Add the file PATH to the seeds; -1 if it cannot be read. */
static int fuzz_add_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    uint8_t *data = NULL;
    size_t size = 0, cap = 0, got = 1;

    if (!f)
        return -1;
    while (got) {
        if (size == cap) {
            cap = cap ? 2 * cap : 4096;
            data = realloc(data, cap);
            if (!data)
                abort();
        }
        got = fread(data + size, 1, cap - size, f);
        size += got;
    }
    fclose(f);
    if (fuzz_n_seeds < FUZZ_MAX_SEEDS)
        fuzz_seeds[fuzz_n_seeds++] = (struct fuzz_seed){data, size};
    else
        free(data);
    return 0;
}

static void fuzz_find_file(const char *name)
{
    const char *srcdir = getenv("srcdir");
    const char *const places[] = {srcdir ? srcdir : ".", ".", "tests"};
    char path[4096];

    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof(path), "%s/%s", places[i], name);
        if (fuzz_add_file(path) == 0)
            return;
    }
    fprintf(stderr, "fuzz: no seed file %s in $srcdir, . or tests\n", name);
    exit(1);
}

static long fuzz_env(const char *name, long absent)
{
    const char *text = getenv(name);

    return text && *text ? strtol(text, NULL, 10) : absent;
}

__attribute__((unused))
static int fuzz_main(int argc, char **argv, const struct fuzz_seed *seeds,
                     const char *const *words, const char *const *files)
{
    long n = fuzz_env("FUZZ_ITERATIONS", 20000), only = -1;
    int c;

    fuzz_seed_number = (unsigned long long)fuzz_env("FUZZ_SEED", 1);
    while ((c = getopt(argc, argv, "n:s:i:")) != -1) {
        if (c == 'n')
            n = strtol(optarg, NULL, 10);
        else if (c == 's')
            fuzz_seed_number = strtoull(optarg, NULL, 10);
        else if (c == 'i')
            only = strtol(optarg, NULL, 10);
        else
            return 2;
    }
    for (; seeds && seeds->data && fuzz_n_seeds < FUZZ_MAX_SEEDS; seeds++)
        fuzz_seeds[fuzz_n_seeds++] = *seeds;
    for (; files && *files; files++)
        fuzz_find_file(*files);
    for (; optind < argc; optind++) {
        if (fuzz_add_file(argv[optind])) {
            perror(argv[optind]);
            return 1;
        }
    }
    if (!fuzz_n_seeds) {
        fprintf(stderr, "fuzz: no seeds\n");
        return 1;
    }
    signal(SIGSEGV, fuzz_died);
    signal(SIGBUS, fuzz_died);
    signal(SIGFPE, fuzz_died);
    signal(SIGABRT, fuzz_died);
    signal(SIGALRM, fuzz_died);
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(fuzz_say);
    printf("fuzz: seed %llu, %d seed inputs, %ld iterations\n", fuzz_seed_number, fuzz_n_seeds,
           only < 0 ? n : 1);
    fflush(stdout);
    for (int s = 0; only < 0 && s < fuzz_n_seeds; s++)
        fuzz_one(fuzz_seeds[s].data, fuzz_seeds[s].size, -1 - s);
    for (long i = only < 0 ? 0 : only; i < (only < 0 ? n : only + 1); i++)
        fuzz_iterate(i, words);
    printf("fuzz: done\n");
    return 0;
}
#endif
#endif
