/* report.c - why a launch ended: misuse of a primitive, a trap, or a deadlock, with what every
   blocked warp waits for.  Places in the kernel are found by addr2line, if there is one. */
#define _GNU_SOURCE
#include "runtime/host/machine.h"

#include <dlfcn.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_FRAMES = 6, MOST_LABELS = 64 };

extern char **environ;

/* ---- Names of addresses --------------------------------------------------- */

static struct label {
    uint64_t base, bytes;
    char name[32];
    void (*text)(void *, uint64_t, char *, size_t);
    void *user;
} labels[MOST_LABELS];

void report_label(uint64_t base, uint64_t bytes, const char *name,
                  void (*text)(void *, uint64_t, char *, size_t), void *user)
{
    for (int i = 0; i < MOST_LABELS; i++)
        if (labels[i].base == base)
            memset(&labels[i], 0, sizeof labels[i]);
    for (int i = 0; bytes && i < MOST_LABELS; i++)
        if (!labels[i].base) {
            labels[i] = (struct label) {.base = base, .bytes = bytes, .text = text, .user = user};
            snprintf(labels[i].name, sizeof labels[i].name, "%s", name);
            return;
        }
}

/* What P is: shared memory, a labelled buffer, or just a number. */
static void put_address(FILE *f, const struct lane *l, const void *p)
{
    const uint64_t at = (uint64_t) (uintptr_t) p;
    const char *shared = l->place.shared;
    char text[160] = "";

    if ((const char *) p >= shared && (const char *) p < shared + machine.smem) {
        fprintf(f, "shared memory + %zu", (size_t) ((const char *) p - shared));
        return;
    }
    for (int i = 0; i < MOST_LABELS; i++) {
        const struct label *label = &labels[i];
        if (!label->base || at < label->base || at >= label->base + label->bytes)
            continue;
        if (label->text)
            label->text(label->user, at - label->base, text, sizeof text);
        fprintf(f, "%s + %llu%s%s", label->name, (unsigned long long) (at - label->base), *text ? ": " : "",
                text);
        return;
    }
    fprintf(f, "%p", p);
}

/* ---- Places in the kernel ------------------------------------------------- */

/* Return addresses of the calls that L is in, the innermost first. */
static int frames_of(const struct lane *l, const void *pc[MOST_FRAMES])
{
    const char *low = l->fiber.stack, *high = low + l->fiber.stack_bytes - l->fiber.colour;
    const void *const *frame = l->frame;
    int n = 0;

    while (n < MOST_FRAMES && (const char *) frame > low && (const char *) (frame + 2) < high) {
        pc[n++] = frame[1];
        if (frame[0] <= (const void *) frame)
            break;
        frame = frame[0];
    }
    return n;
}

/* What addr2line says of N places in FILE: "function at file:line", inlined ones joined by " in ". */
static FILE *run_addr2line(const char *file, const uintptr_t *offsets, int n, pid_t *pid)
{
    char text[MOST_FRAMES][24], *argv[MOST_FRAMES + 5] = {"addr2line", "-Cfpsi", "-e", (char *) file};
    posix_spawn_file_actions_t actions;
    int fd[2], rc;

    for (int i = 0; i < n; i++) {
        snprintf(text[i], sizeof text[i], "0x%llx", (unsigned long long) offsets[i]);
        argv[4 + i] = text[i];
    }
    if (pipe(fd))
        return NULL;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fd[1], 1);
    posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", 1, 0);
    posix_spawn_file_actions_addclose(&actions, fd[0]);
    rc = posix_spawnp(pid, "addr2line", &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(fd[1]);
    if (rc) {
        close(fd[0]);
        return NULL;
    }
    return fdopen(fd[0], "r");
}

/* "store_word (kernel.cu:512) < send_blocks (kernel.cu:700) < mlp ..." */
static void put_frames(FILE *f, const void *const *pc, int n)
{
    uintptr_t offsets[MOST_FRAMES];
    const char *file = NULL, *sep = "";
    char line[512], *at;
    int used = 0, status;
    pid_t pid;
    Dl_info info;
    FILE *in;

    for (int i = 0; i < n; i++)
        if (dladdr(pc[i], &info) && (!file || file == info.dli_fname)) {
            file = info.dli_fname;
            offsets[used++] = (uintptr_t) pc[i] - (uintptr_t) info.dli_fbase - 1;
        }
    in = used ? run_addr2line(file, offsets, used, &pid) : NULL;
    while (in && fgets(line, sizeof line, in)) {
        line[strcspn(line, "\n")] = 0;
        if (!(at = strstr(line, " at ")) || !strncmp(line, "??", 2) || strstr(line, "mkhost_"))
            continue;
        *at = 0;
        fprintf(f, "%s%s (%s)", sep, strncmp(line, " (inlined by) ", 14) ? line : line + 14, at + 4);
        sep = " < ";
    }
    if (in) {
        fclose(in);
        waitpid(pid, &status, 0);
    }
}

/* ---- Lanes that wait ------------------------------------------------------ */

static enum lane_state state_of(const struct lane *l)
{
    enum lane_state state = READY;

    while (state < GONE && !is_in(l, state))
        state++;
    return state;
}

static int same_wait(const struct lane *a, const struct lane *b)
{
    const void *pc_a[MOST_FRAMES], *pc_b[MOST_FRAMES];
    const int n = frames_of(a, pc_a);

    return state_of(a) == state_of(b) && a->doing == b->doing && n == frames_of(b, pc_b) &&
           !memcmp(pc_a, pc_b, (size_t) n * sizeof *pc_a);
}

static void put_barrier(FILE *f, const struct lane *l)
{
    const struct cta *c = l->warp->cta;
    const struct barrier *b = l->about;

    fprintf(f, ": %u of %u threads are there", b->arrived, b->threads);
    for (int i = 0; i < c->n_warps; i++) {
        const struct warp *w = &c->warps[i];
        int there = 0;
        for (int lane = 0; lane < w->n_lanes; lane++)
            there += is_in(&w->lanes[lane], WAITING) && w->lanes[lane].about == b;
        if (there < w->n_lanes)
            fprintf(f, ", %d of warp %d", there, i);
    }
}

/* "; WHAT: warp 0 lane 0, warp 2 lanes 0..31"; nothing when there is none. */
static void put_lanes(FILE *f, const char *what, const uint32_t *lanes)
{
    const char *sep = what;

    for (int i = 0; i < WARPS; i++) {
        const char *comma = "";
        int n = 0;
        for (int from = 0, to; from < LANES; from = to + 1) {
            to = from;
            if (!(lanes[i] >> from & 1))
                continue;
            while (to + 1 < LANES && lanes[i] >> (to + 1) & 1)
                to++;
            n += to - from + 1;
            if (!*comma)
                fprintf(f, "%s warp %d lane%s ", sep, i, lanes[i] & (lanes[i] - 1) ? "s" : "");
            fprintf(f, to > from ? "%s%d..%d" : "%s%d", comma, from, to);
            comma = " ";
        }
        sep = n ? "," : sep;
    }
}

/* "; WHAT 144 bytes by CTA 0, 16 by CTA 1"; nothing when there are none. */
static void put_pushes(FILE *f, const char *what, const struct cta *c, const uint32_t *from)
{
    const char *sep = what;

    for (unsigned rank = 0; rank < machine.cluster; rank++)
        if (from[rank]) {
            fprintf(f, "%s %u bytes by CTA %u", sep, from[rank],
                    (unsigned) c->index / machine.cluster * machine.cluster + rank);
            sep = ",";
        }
}

/* Who wrote last to the word or flag that L asks for. */
static void put_writer(FILE *f, const struct lane *l)
{
    const struct writer *w = find_writer(l->about);

    if (strcmp(l->doing, "a strong load") && strcmp(l->doing, "a flag"))
        return;
    if (w)
        fprintf(f, "; last written by CTA %d warp %d lane %d in step %llu", w->cta, w->warp, w->lane,
                (unsigned long long) w->step);
    else
        fputs("; not written in this launch", f);
}

/* 1: L asks for an mbarrier. */
static int put_mbarrier(FILE *f, const struct lane *l)
{
    const struct cta *c = l->warp->cta;
    uint32_t missing[WARPS];

    for (int i = 0; i < c->n_mbarriers; i++) {
        const struct mbarrier *b = &c->mbarriers[i];
        if (b->word != l->about)
            continue;
        fprintf(f, ", an mbarrier in phase %u: %u of %u arrivals and %lld bytes are missing", b->phase,
                b->pending, b->expected, (long long) b->bytes);
        for (int w = 0; w < WARPS; w++)
            missing[w] = b->before[w] & ~b->arrived[w];
        put_lanes(f, "; arrived:", b->arrived);
        put_lanes(f, "; not yet, but in the phase before:", missing);
        put_pushes(f, "; pushed:", c, b->from);
        put_pushes(f, "; in the phase before:", c, b->from_before);
        return 1;
    }
    return 0;
}

static void put_wait(FILE *f, const struct lane *l, int lanes)
{
    const void *pc[MOST_FRAMES];
    const int n = frames_of(l, pc);

    fprintf(f, "  CTA %d warp %d, %d lane%s from %d: ", l->warp->cta->index, l->warp->index, lanes,
            lanes == 1 ? "" : "s", (int) (l - l->warp->lanes));
    if (is_in(l, MEETING)) {
        fprintf(f, "waits for its warp at %s", l->warp->meeting);
    } else {
        fprintf(f, "%s %s", is_in(l, WAITING) ? "waits at" : "asks for", l->doing);
        if (is_in(l, WAITING)) {
            if (l->about == l->warp)
                wgmma_explain(f, l);
            else if (machine.cluster > 1 && l->about == cluster_barrier(l->warp->cta))
                cluster_explain(f, l);
            else
                put_barrier(f, l);
        } else if (l->about) {
            fputs(", ", f);
            put_address(f, l, l->about);
            if (!put_mbarrier(f, l))
                put_writer(f, l);
        }
    }
    fputs(n ? "\n      " : "", f);
    put_frames(f, pc, n);
    fputc('\n', f);
}

char *report_waiting(void)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);

    if (!f)
        return NULL;
    for (int i = 0; i < machine.n_warps; i++) {
        const struct warp *w = machine.warps[i];
        for (int first = 0, lane; first < w->n_lanes; first = lane) {
            for (lane = first + 1; lane < w->n_lanes && same_wait(&w->lanes[first], &w->lanes[lane]);)
                lane++;
            if (!is_in(&w->lanes[first], GONE))
                put_wait(f, &w->lanes[first], lane - first);
        }
    }
    fclose(f);
    return text;
}

/* ---- The end -------------------------------------------------------------- */

static void set_report(const char *format, va_list args)
{
    const struct lane *l = machine.now;
    char *waiting;
    size_t size;
    FILE *f;

    if (machine.failed)
        return;
    machine.failed = 1;
    f = open_memstream(&machine.report, &size);
    if (!f)
        return;
    vfprintf(f, format, args);
    fprintf(f, " (%s, seed %llu, step %llu)\n", machine.name, (unsigned long long) machine.seed,
            (unsigned long long) machine.steps);
    if (l->warp && strcmp(format, "deadlock") && strcmp(format, "no word changes any more"))
        put_wait(f, l, 1);
    /* The kernel's own watchdog writes a few words before it ends. */
    waiting = (machine.stalls && machine.changes - machine.stalled_at < 64) || !l->warp ? report_waiting() : NULL;
    if (waiting && *waiting)
        fprintf(f, "  nothing went on any more:\n%s", waiting);
    free(waiting);
    fclose(f);
}

void fail_launch(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    set_report(format, args);
    va_end(args);
}

void misuse(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    set_report(format, args);
    va_end(args);
    if (machine.now == &machine.host)
        longjmp(machine.escape, 1);
    for (;;)
        switch_to(&machine.host);
}
