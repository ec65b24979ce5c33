/* t-mk.c - the public API and nothing else, with the demo model: on the CPU, and again on the GPU
   when there is one. */
#include "config.h"

#include <ftw.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/mk.h"
#include "tests/check.h"

enum { V = 2048, END = 2045, IM_START = 2046, IM_END = 2047 };      /* of the demo model */
enum { MAX_CONTEXT = 1024, SMALL = 48, LONG_RUN = 100 };

static const char *device;              /* "cpu" or "gpu": what runs now */
static struct mk_model *model;
static struct mk_context *big, *small;  /* of MAX_CONTEXT and SMALL tokens */
/* The GPU's plan: a long prompt takes several launches. */
static const char *const plan[] = {"prefill_tokens=256", NULL};
static char demo[PATH_MAX], srcdir[4096], scratch[64];

static int on_gpu(void)
{
    return !strcmp(device, "gpu");
}

/* ---- Short forms ---- */

/* The call gives CODE and exactly this text. */
#define FAILS(call, want_code, ...)                                             \
    do {                                                                        \
        struct mk_err err = {.text = ""};                                       \
        char want_text[sizeof err.text];                                        \
        int rc_ = (call);                                                       \
        snprintf(want_text, sizeof want_text, __VA_ARGS__);                     \
        CHECKF(rc_ == (want_code) && err.code == rc_, "%s: %s: code %d, not %d", \
               device, #call, rc_, (int)(want_code));                           \
        CHECK_STR(err.text, want_text);                                         \
    } while (0)

#define WORKS(call)                                                             \
    do {                                                                        \
        struct mk_err err = {.text = ""};                                       \
        int rc_ = (call);                                                       \
        CHECKF(rc_ == 0, "%s: %s: %d, %s", device, #call, rc_, err.text);       \
    } while (0)

static struct mk_sampling greedy(int max_tokens)
{
    return (struct mk_sampling){.size = sizeof(struct mk_sampling), .top_p = 1,
                                .max_tokens = max_tokens, .ignore_end = 1};
}

/* Any token is as likely as any other: half characters and special tokens among them. */
static struct mk_sampling noise(int max_tokens, uint64_t seed)
{
    struct mk_sampling s = greedy(max_tokens);

    s.temperature = 1e6f;
    s.seed = seed;
    return s;
}

/* What a generation said. */
struct answer {
    int32_t token[MAX_CONTEXT];
    int n;
    char text[16384];
    size_t len;
    int bad;                /* pieces of text that are half a character or lack their zero */
    int stop_after;         /* 0: never */
    void (*at)(void);       /* called at token number AT_TOKEN */
    int at_token;
};

/* Length of the character or of the mistake at S (N bytes), as the Unicode standard divides
   ill-formed text; *VALID: 1, 0, or -1 when S ends inside a character. */
static size_t utf8_piece(const unsigned char *s, size_t n, int *valid)
{
    unsigned low = 0x80, high = 0xbf;
    size_t len = 1 + (s[0] >= 0xc2) + (s[0] >= 0xe0) + (s[0] >= 0xf0);

    if ((s[0] >= 0x80 && s[0] < 0xc2) || s[0] > 0xf4)
        len = 0;

    *valid = len > 0;
    if (!len)
        return 1;
    low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : low;
    high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : high;
    for (size_t i = 1; i < len; i++) {
        if (i == n || s[i] < low || s[i] > high) {
            *valid = i == n ? -1 : 0;
            return i;
        }
        low = 0x80;
        high = 0xbf;
    }
    return len;
}

static int is_utf8(const char *text, size_t len)
{
    int valid = 1;

    for (size_t i = 0; i < len && valid == 1; )
        i += utf8_piece((const unsigned char *)text + i, len - i, &valid);
    return valid == 1;
}

static int hear(void *user, int32_t token, const char *text, size_t len)
{
    struct answer *a = user;

    a->token[a->n++] = token;
    if (a->len + len < sizeof a->text) {
        memcpy(a->text + a->len, text, len);
        a->len += len;
    }
    a->bad += text[len] != 0 || !is_utf8(text, len);
    if (a->at && a->n == a->at_token)
        a->at();
    return a->n == a->stop_after;
}

/* Generate on C and add to A; the code. */
static int go_on(struct mk_context *c, const struct mk_sampling *s, struct answer *a)
{
    struct mk_err err = {.text = ""};
    const int used = mk_context_used(c), before = a->n;
    int n = -1, rc;

    rc = mk_generate(c, s, hear, a, &n, &err);
    CHECKF(rc == 0 || rc == MK_ECANCELED, "%s: mk_generate: %d, %s", device, rc, err.text);
    CHECKF(n == a->n - before && mk_context_used(c) == used + n,
           "%s: %d new tokens, %d were told, %d used", device, n, a->n - before,
           mk_context_used(c) - used);
    CHECK(!memcmp(mk_context_tokens(c) + used, a->token + before, (size_t)n * sizeof *a->token));
    CHECK(!a->bad);
    return rc;
}

/* From an empty context: PROMPT [n], then an answer. */
static void answer(struct mk_context *c, const int32_t *prompt, int n, const struct mk_sampling *s,
                   struct answer *a)
{
    memset(a, 0, sizeof *a);
    WORKS(mk_truncate(c, 0, &err));
    WORKS(mk_append(c, prompt, n, &err));
    CHECK(go_on(c, s, a) == 0);
}

static void same_tokens(const char *what, const struct answer *a, const struct answer *b)
{
    int i = 0;

    while (i < a->n && i < b->n && a->token[i] == b->token[i])
        i++;
    CHECKF(i == a->n && i == b->n, "%s: %s: %d and %d tokens, the same up to %d", device, what,
           a->n, b->n, i);
    CHECKF(a->len == b->len && !memcmp(a->text, b->text, a->len), "%s: %s: other text", device,
           what);
}

/* ---- The references ---- */

struct reference {
    char prompt[256], text[1024];
    int32_t tokens[64], next[64];
    double margins[64];
    int n_tokens, n_next, n_margins;
};

static struct reference references[8];
static int n_references;

static int read_ids(const char *s, int32_t *out)
{
    int n = 0;

    for (char *end; n < 64; s = end) {
        long v = strtol(s, &end, 10);
        if (end == s)
            break;
        out[n++] = (int32_t)v;
    }
    return n;
}

static void read_margins(const char *s, struct reference *r)
{
    for (char *end; r->n_margins < 64; s = end) {
        double v = strtod(s, &end);
        if (end == s)
            break;
        r->margins[r->n_margins++] = v;
    }
}

/* TEXT with its "\n" made newlines. */
static void unescape(const char *text, char *out, size_t cap)
{
    size_t n = 0;

    for (; *text && n + 1 < cap; text++)
        out[n++] = text[0] == '\\' && text[1] == 'n' ? (text++, '\n') : *text;
    out[n] = 0;
}

static void read_references(void)
{
    char path[5000], line[4096];
    struct reference *r = NULL;
    FILE *f;

    snprintf(path, sizeof path, "%s/demo-reference.txt", srcdir);
    f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *value = strchr(line, ' ');
        line[strcspn(line, "\n")] = 0;
        if (!value || line[0] == '#')
            continue;
        *value++ = 0;
        if (!strcmp(line, "prompt")) {
            CHECK(n_references < 8);
            r = &references[n_references++ & 7];
            snprintf(r->prompt, sizeof r->prompt, "%s", value);
        }
        if (!r)
            continue;
        if (!strcmp(line, "tokens"))
            r->n_tokens = read_ids(value, r->tokens);
        else if (!strcmp(line, "next"))
            r->n_next = read_ids(value, r->next);
        else if (!strcmp(line, "margins"))
            read_margins(value, r);
        else if (!strcmp(line, "text"))
            unescape(value, r->text, sizeof r->text);
    }
    if (f)
        fclose(f);
    CHECKF(n_references >= 4, "%s: %d references", path, n_references);
}

/* Greedy texts are those of Hugging Face in fp32, up to a step that was too close to call: our
   arithmetic is fp32 on the CPU but for the bf16 KV cache, and bf16 products on the GPU. */
static void test_references(void)
{
    const double margin = on_gpu() ? 0.05 : 1e-3;
    int compared = 0;

    for (struct reference *r = references; r < references + n_references; r++) {
        const struct mk_sampling s = greedy(r->n_next);
        struct answer a;
        int32_t tokens[64];
        size_t n = 0;
        int i = 0;

        WORKS(mk_tokenize(model, r->prompt, strlen(r->prompt), 0, tokens, 64, &n, &err));
        CHECKF((int)n == r->n_tokens && !memcmp(tokens, r->tokens, n * sizeof *tokens),
               "tokens of \"%s\"", r->prompt);
        answer(big, r->tokens, r->n_tokens, &s, &a);
        CHECK(a.n == r->n_next && r->n_margins == r->n_next);
        while (i < r->n_next && r->margins[i] >= margin) {
            CHECKF(a.token[i] == r->next[i], "%s: \"%s\" goes on with %d at %d, not %d (margin %g)",
                   device, r->prompt, (int)a.token[i], i, (int)r->next[i], r->margins[i]);
            i++;
        }
        if (i == r->n_next)
            CHECK_STR(a.text, r->text);
        compared += i;
    }
    printf("%s: %d tokens are those of the references\n", device, compared);
    CHECK(compared >= (on_gpu() ? 30 : 200));
}

/* ---- Prefill and logits ---- */

static float logits_a[V], logits_b[V];

static int best_of(const float *logits)
{
    int best = 0;

    for (int i = 1; i < V; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static void near(const char *what, const float *a, const float *b)
{
    double worst = 0, limit = on_gpu() ? 0.25 : 0.02;

    for (int i = 0; i < V; i++)
        worst = fmax(worst, fabs((double)a[i] - b[i]));
    CHECKF(worst <= limit, "%s: %s: logits differ by %g", device, what, worst);
}

/* A text of N tokens: the references one after the other. */
static void long_text(int32_t *tokens, int n)
{
    for (int i = 0; i < n; i++)
        tokens[i] = references[i / 48 % n_references].next[i % 48];
}

static void test_pieces(void)
{
    static const int pieces[] = {1, 2, 63, 64, 65, 5, 0, 100, 200};
    int32_t text[500];
    int at = 0;

    long_text(text, 500);
    WORKS(mk_truncate(big, 0, &err));
    WORKS(mk_append(big, text, 500, &err));
    WORKS(mk_logits(big, logits_a, &err));
    WORKS(mk_logits(big, logits_b, &err));
    CHECKF(!memcmp(logits_a, logits_b, sizeof logits_a),
           "%s: the second mk_logits gives other bits", device);
    WORKS(mk_truncate(big, 0, &err));
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; at += pieces[i++])
        WORKS(mk_append(big, text + at, pieces[i], &err));
    CHECK(at == 500 && mk_context_used(big) == 500);
    WORKS(mk_logits(big, logits_b, &err));
    near("500 tokens in pieces", logits_a, logits_b);
    WORKS(mk_truncate(big, 0, &err));
    WORKS(mk_append(big, text, 500, &err));
    WORKS(mk_logits(big, logits_b, &err));
    CHECKF(!memcmp(logits_a, logits_b, sizeof logits_a), "%s: the second run gives other bits",
           device);
}

/* mk_logits sees what mk_generate sees, before, between and after. */
static void test_logits(void)
{
    const struct reference *r = &references[0];
    const struct mk_sampling one = greedy(1);
    struct answer a = {0}, b;
    struct mk_sampling all = greedy(12);

    answer(big, r->tokens, r->n_tokens, &all, &b);
    WORKS(mk_truncate(big, 0, &err));
    WORKS(mk_append(big, r->tokens, r->n_tokens, &err));
    for (int i = 0; i < 12; i++) {
        WORKS(mk_logits(big, logits_a, &err));
        CHECK(go_on(big, &one, &a) == 0);
        CHECKF(a.n == i + 1 && best_of(logits_a) == a.token[i],
               "%s: token %d is not the most likely", device, i);
    }
    same_tokens("one token a call", &a, &b);
    /* Appending what was generated is the same as having generated it. */
    WORKS(mk_logits(big, logits_a, &err));
    WORKS(mk_truncate(big, r->n_tokens, &err));
    WORKS(mk_append(big, a.token, a.n, &err));
    WORKS(mk_logits(big, logits_b, &err));
    near("generated and appended", logits_a, logits_b);
    /* And what comes after that. */
    WORKS(mk_append(big, r->tokens, 3, &err));
    WORKS(mk_logits(big, logits_a, &err));
    WORKS(mk_truncate(big, 0, &err));
    WORKS(mk_append(big, r->tokens, r->n_tokens, &err));
    WORKS(mk_append(big, a.token, a.n, &err));
    WORKS(mk_append(big, r->tokens, 3, &err));
    WORKS(mk_logits(big, logits_b, &err));
    near("another turn", logits_a, logits_b);
}

/* ---- Going on, going back ---- */

static void test_continue(void)
{
    const struct reference *r = &references[1];
    const struct mk_sampling warm[] = {greedy(0), noise(0, 5)};

    for (int i = 0; i < 2; i++) {
        struct mk_sampling s = warm[i];
        struct answer whole, parts;

        s.max_tokens = 60;
        answer(big, r->tokens, r->n_tokens, &s, &whole);
        s.max_tokens = 7;
        answer(big, r->tokens, r->n_tokens, &s, &parts);
        s.max_tokens = 1;
        while (parts.n < 30)
            CHECK(go_on(big, &s, &parts) == 0);
        s.max_tokens = 30;
        CHECK(go_on(big, &s, &parts) == 0);
        same_tokens("in parts", &whole, &parts);
    }
}

static void test_truncate(void)
{
    const struct reference *r = &references[2];
    const struct mk_sampling s = greedy(40), rest = greedy(30);
    struct answer a, b = {0};

    answer(big, r->tokens, r->n_tokens, &s, &a);
    FAILS(mk_truncate(big, -1, &err), MK_EINVAL, "mk_truncate: -1 is not in 0..%d",
          r->n_tokens + 40);
    FAILS(mk_truncate(big, r->n_tokens + 41, &err), MK_EINVAL, "mk_truncate: %d is not in 0..%d",
          r->n_tokens + 41, r->n_tokens + 40);
    WORKS(mk_truncate(big, r->n_tokens + 40, &err));
    WORKS(mk_truncate(big, r->n_tokens, &err));
    CHECK(go_on(big, &s, &b) == 0);
    same_tokens("again from the prompt", &a, &b);
    WORKS(mk_truncate(big, r->n_tokens + 10, &err));
    memset(&b, 0, sizeof b);
    CHECK(go_on(big, &rest, &b) == 0);
    CHECK(b.n == 30 && !memcmp(b.token, a.token + 10, 30 * sizeof *b.token));
    /* Something else in between leaves no trace. */
    WORKS(mk_truncate(big, 0, &err));
    CHECK(mk_context_used(big) == 0);
    answer(big, references[3].tokens, references[3].n_tokens, &s, &b);
    answer(big, r->tokens, r->n_tokens, &s, &b);
    same_tokens("after a reset", &a, &b);
}

static void test_full(void)
{
    const struct reference *r = &references[0];
    const struct mk_sampling s = greedy(0), same = greedy(SMALL - 11);
    struct answer a, b;
    int32_t text[SMALL + 1];
    int n = -1;

    CHECK(mk_context_length(small) == SMALL && r->n_tokens == 11);
    answer(small, r->tokens, r->n_tokens, &s, &a);
    CHECKF(a.n == SMALL - r->n_tokens && mk_context_used(small) == SMALL,
           "%s: %d tokens until full", device, a.n);
    answer(big, r->tokens, r->n_tokens, &same, &b);
    if (on_gpu())           /* two kernels, which round alike where it is not close */
        CHECK(!memcmp(a.token, b.token, 20 * sizeof *a.token));
    else
        same_tokens("a small and a big context", &a, &b);
    FAILS(mk_append(small, r->tokens, 1, &err), MK_ECONTEXT,
          "1 tokens are 1 too many: the context holds 48 and has 48");
    WORKS(mk_append(small, r->tokens, 0, &err));
    WORKS(mk_generate(small, &s, NULL, NULL, &n, &err));
    CHECK(n == 0 && mk_context_used(small) == SMALL);
    WORKS(mk_logits(small, logits_a, &err));
    WORKS(mk_truncate(small, SMALL - 1, &err));
    WORKS(mk_generate(small, &s, NULL, NULL, &n, &err));
    CHECK(n == 1 && mk_context_tokens(small)[SMALL - 1] == a.token[a.n - 1]);

    long_text(text, SMALL + 1);
    WORKS(mk_truncate(small, 0, &err));
    FAILS(mk_append(small, text, SMALL + 1, &err), MK_ECONTEXT,
          "49 tokens are 1 too many: the context holds 48 and has 0");
    CHECK(mk_context_used(small) == 0);
    WORKS(mk_append(small, text, SMALL, &err));
    WORKS(mk_generate(small, &s, NULL, NULL, &n, &err));
    CHECK(n == 0);
    WORKS(mk_logits(small, logits_a, &err));
    WORKS(mk_truncate(big, 0, &err));
    WORKS(mk_append(big, text, SMALL, &err));
    WORKS(mk_logits(big, logits_b, &err));
    near("the last position", logits_a, logits_b);
}

/* ---- Two contexts ---- */

static void test_turns(void)
{
    const struct reference *r = &references[0], *q = &references[4];
    const struct mk_sampling s = greedy(24), step = greedy(3);
    struct answer a, b, c = {0}, d = {0};

    answer(big, r->tokens, r->n_tokens, &s, &a);
    answer(small, q->tokens, q->n_tokens, &s, &b);
    WORKS(mk_truncate(big, 0, &err));
    WORKS(mk_truncate(small, 0, &err));
    WORKS(mk_append(big, r->tokens, r->n_tokens, &err));
    WORKS(mk_append(small, q->tokens, q->n_tokens, &err));
    while (c.n < 24) {
        CHECK(go_on(big, &step, &c) == 0);
        CHECK(go_on(small, &step, &d) == 0);
    }
    same_tokens("turn about, the big context", &a, &c);
    same_tokens("turn about, the small context", &b, &d);
}

struct worker {
    struct mk_context *context;
    int32_t last;
    int rc, n;
};

static int keep_last(void *user, int32_t token, const char *text, size_t len)
{
    (void)text;
    (void)len;
    ((struct worker *)user)->last = token;
    return 0;
}

static void *work(void *user)
{
    struct worker *w = user;
    const struct mk_sampling s = greedy(24);
    const struct reference *r = &references[w->context == big ? 0 : 4];

    for (int i = 0; i < 4 && w->rc == 0; i++) {
        w->rc = mk_truncate(w->context, 0, NULL);
        if (w->rc == 0)
            w->rc = mk_append(w->context, r->tokens, r->n_tokens, NULL);
        if (w->rc == 0)
            w->rc = mk_generate(w->context, &s, keep_last, w, &w->n, NULL);
    }
    return NULL;
}

static void test_threads(void)
{
    struct worker w[2] = {{.context = big}, {.context = small}};
    const struct mk_sampling s = greedy(24);
    pthread_t thread;
    struct answer a;

    CHECK(pthread_create(&thread, NULL, work, &w[1]) == 0);
    work(&w[0]);
    pthread_join(thread, NULL);
    for (int i = 0; i < 2; i++) {
        const struct reference *r = &references[i ? 4 : 0];
        CHECKF(w[i].rc == 0 && w[i].n == 24, "%s: in a thread of its own: code %d, %d tokens",
               device, w[i].rc, w[i].n);
        answer(w[i].context, r->tokens, r->n_tokens, &s, &a);
        CHECK(a.token[23] == w[i].last);
    }
}

/* ---- Cancel and other ends ---- */

static void *cancel_big(void *user)
{
    (void)user;
    mk_cancel(big);
    return NULL;
}

static void from_a_thread(void)
{
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, cancel_big, NULL) == 0);
    pthread_join(thread, NULL);
}

static void on_signal(int sig)
{
    (void)sig;
    mk_cancel(big);
}

static void from_a_handler(void)
{
    signal(SIGUSR1, on_signal);
    raise(SIGUSR1);
}

static void test_cancel(void)
{
    void (*const how[])(void) = {from_a_thread, from_a_handler};
    const struct reference *r = &references[0];
    struct mk_sampling s = greedy(LONG_RUN);
    struct answer whole, a;

    answer(big, r->tokens, r->n_tokens, &s, &whole);
    for (int i = 0; i < 2; i++) {
        memset(&a, 0, sizeof a);
        a.at = how[i];
        a.at_token = 5;
        WORKS(mk_truncate(big, 0, &err));
        WORKS(mk_append(big, r->tokens, r->n_tokens, &err));
        s.max_tokens = 0;
        CHECKF(go_on(big, &s, &a) == MK_ECANCELED, "%s: canceled after 5 tokens, and it ran on",
               device);
        CHECKF(on_gpu() ? a.n >= 5 && a.n < LONG_RUN : a.n == 5, "%s: %d tokens, canceled after 5",
               device, a.n);
        s.max_tokens = LONG_RUN - a.n;
        CHECK(go_on(big, &s, &a) == 0);
        same_tokens("after a cancel", &whole, &a);
    }
    /* Nothing runs: the next call is meant, and only that one. */
    mk_cancel(big);
    FAILS(mk_generate(big, &s, NULL, NULL, NULL, &err), MK_ECANCELED, "canceled");
    mk_cancel(big);
    mk_cancel(big);
    logits_a[0] = 123;
    FAILS(mk_logits(big, logits_a, &err), MK_ECANCELED, "canceled");
    CHECK(logits_a[0] == 123 && mk_context_used(big) == r->n_tokens + LONG_RUN);
    WORKS(mk_truncate(big, 0, &err));
    mk_cancel(big);
    FAILS(mk_append(big, r->tokens, r->n_tokens, &err), MK_ECANCELED, "canceled");
    CHECK(mk_context_used(big) == r->n_tokens);
    memset(&a, 0, sizeof a);
    s.max_tokens = LONG_RUN;
    CHECK(go_on(big, &s, &a) == 0);
    same_tokens("after a canceled mk_append", &whole, &a);
}

static int watching, cancel_at_progress, prefill_reports;

static void on_progress(void *user, const char *what, double fraction)
{
    if (!watching)
        return;
    CHECK(user == &cancel_at_progress && !strcmp(what, "prefill") && fraction >= 0 &&
          fraction <= 1);
    prefill_reports++;
    if (cancel_at_progress && fraction < 1) {
        cancel_at_progress = 0;
        from_a_thread();
    }
}

static void test_cancel_append(void)
{
    int32_t text[900];

    long_text(text, 900);
    WORKS(mk_truncate(big, 0, &err));
    prefill_reports = 0;
    watching = 1;
    WORKS(mk_append(big, text, 900, &err));
    CHECKF(prefill_reports > 1, "%s: %d reports of a long prefill", device, prefill_reports);
    WORKS(mk_logits(big, logits_a, &err));
    WORKS(mk_truncate(big, 0, &err));
    cancel_at_progress = 1;
    FAILS(mk_append(big, text, 900, &err), MK_ECANCELED, "canceled");
    watching = 0;
    CHECK(!cancel_at_progress && mk_context_used(big) == 900);
    WORKS(mk_logits(big, logits_b, &err));
    near("the rest of a canceled mk_append", logits_a, logits_b);
}

/* Cancels that come at any moment lose no token and break nothing. */
static int storm_over;

static void *storm(void *user)
{
    unsigned state = 12345;

    (void)user;
    for (int i = 0; i < 200 && !__atomic_load_n(&storm_over, __ATOMIC_SEQ_CST); i++) {
        state = state * 1103515245u + 12345u;
        usleep(state >> 16 & 0x3fff);
        mk_cancel(big);
    }
    return NULL;
}

static void test_storm(void)
{
    const struct reference *r = &references[3];
    struct mk_sampling s = greedy(250);
    struct answer whole, a = {0};
    int canceled = 0;
    pthread_t thread;

    answer(big, r->tokens, r->n_tokens, &s, &whole);
    WORKS(mk_truncate(big, 0, &err));
    WORKS(mk_append(big, r->tokens, r->n_tokens, &err));
    __atomic_store_n(&storm_over, 0, __ATOMIC_SEQ_CST);
    CHECK(pthread_create(&thread, NULL, storm, NULL) == 0);
    for (int calls = 0; a.n < 250 && calls < 5000; calls++) {
        s.max_tokens = 250 - a.n;
        canceled += go_on(big, &s, &a) == MK_ECANCELED;
    }
    __atomic_store_n(&storm_over, 1, __ATOMIC_SEQ_CST);
    pthread_join(thread, NULL);
    mk_append(big, NULL, 0, NULL);      /* takes the last cancel, if there is one */
    same_tokens("many cancels", &whole, &a);
    printf("%s: %d cancels\n", device, canceled);
}

static void test_stops(void)
{
    const struct reference *r = &references[1];
    struct mk_sampling s = greedy(30);
    int32_t stop[8] = {END, IM_START, 0, 0, 0, 0, 0, 0};
    struct answer whole, a;
    int at = 9;

    answer(big, r->tokens, r->n_tokens, &s, &whole);
    memset(&a, 0, sizeof a);
    a.stop_after = 4;
    WORKS(mk_truncate(big, r->n_tokens, &err));
    CHECK(go_on(big, &s, &a) == 0 && a.n == 4);
    s.max_tokens = 26;
    CHECK(go_on(big, &s, &a) == 0);
    same_tokens("after the callback's end", &whole, &a);

    s.max_tokens = 30;
    s.stop = stop;
    s.n_stop = 8;
    stop[7] = whole.token[at];
    for (int i = at - 1; i >= 0; i--)
        at = whole.token[i] == stop[7] ? i : at;
    answer(big, r->tokens, r->n_tokens, &s, &a);
    CHECKF(a.n == at + 1 && a.token[at] == stop[7], "%s: %d tokens, stopped by the one at %d",
           device, a.n, at);
    WORKS(mk_truncate(small, 0, &err));
    WORKS(mk_append(small, r->tokens, r->n_tokens, &err));
    WORKS(mk_generate(small, NULL, NULL, NULL, NULL, &err));
    CHECK(mk_context_used(small) == SMALL);
}

/* ---- Sampling ---- */

static void test_seeds(void)
{
    const struct reference *r = &references[5];
    struct mk_sampling s = greedy(32);
    struct answer best, a, b;

    answer(big, r->tokens, r->n_tokens, &s, &best);
    s.temperature = 0.9f;
    s.seed = 7;
    answer(big, r->tokens, r->n_tokens, &s, &a);
    answer(big, r->tokens, r->n_tokens, &s, &b);
    same_tokens("one seed twice", &a, &b);
    CHECK(memcmp(a.token, best.token, sizeof a.token));
    s.seed = 8;
    answer(big, r->tokens, r->n_tokens, &s, &b);
    CHECKF(memcmp(a.token, b.token, sizeof a.token), "%s: two seeds, one text", device);
    s.seed = 7 + (1ull << 32);
    answer(big, r->tokens, r->n_tokens, &s, &b);
    CHECKF(memcmp(a.token, b.token, sizeof a.token), "%s: the upper half of a seed is lost",
           device);

    s.top_k = 1;
    answer(big, r->tokens, r->n_tokens, &s, &a);
    same_tokens("top_k 1", &best, &a);
    s.top_k = V;
    s.top_p = 1e-6f;
    answer(big, r->tokens, r->n_tokens, &s, &a);
    same_tokens("a tiny top_p", &best, &a);
    s = greedy(32);
    s.temperature = 1e-30f;
    answer(big, r->tokens, r->n_tokens, &s, &a);
    same_tokens("almost no temperature", &best, &a);
}

static void sampling_fails(struct mk_sampling s, const char *want)
{
    const int used = mk_context_used(big);
    int n = -1;

    FAILS(mk_generate(big, &s, NULL, NULL, &n, &err), MK_EINVAL, "%s", want);
    CHECK(n == 0 && mk_context_used(big) == used);
}

static void test_ranges(void)
{
    static const int32_t stop[9] = {0, V};
    struct mk_sampling s;

#define WITH(field, value, want) (s = greedy(3), s.field = (value), sampling_fails(s, want))
    WITH(temperature, -1, "temperature is -1; it must be in 0..1000000");
    WITH(temperature, NAN, "temperature is nan; it must be in 0..1000000");
    WITH(temperature, INFINITY, "temperature is inf; it must be in 0..1000000");
    WITH(top_k, -1, "top_k is -1; it must be in 0..2048");
    WITH(top_k, V + 1, "top_k is 2049; it must be in 0..2048");
    WITH(top_p, 0, "top_p is 0; it must be above 0 and at most 1");
    WITH(top_p, 1.5f, "top_p is 1.5; it must be above 0 and at most 1");
    WITH(top_p, NAN, "top_p is nan; it must be above 0 and at most 1");
    WITH(max_tokens, -1, "max_tokens is -1; it must be 0 or more");
    WITH(n_stop, -1, "n_stop is -1; it must be in 0..8");
    WITH(n_stop, 9, "n_stop is 9; it must be in 0..8");
    WITH(n_stop, 2, "n_stop is 2, and stop is NULL");
#undef WITH
    s = greedy(3);
    s.stop = stop;
    s.n_stop = 2;
    sampling_fails(s, "stop id 1 is 2048; demo has ids 0..2047");
    s = greedy(3);
    s.size--;
    FAILS(mk_generate(big, &s, NULL, NULL, NULL, &err), MK_EINVAL,
          "mk_generate: sampling.size is %zu, not %zu", sizeof s - 1, sizeof s);
}

/* ---- Wrong arguments ---- */

static void test_ids(void)
{
    const int used = mk_context_used(big);
    const int32_t high[] = {1, V}, low[] = {-1};
    const char *bytes;
    size_t len;

    FAILS(mk_append(big, high, 2, &err), MK_EINVAL, "token 1 is 2048; demo has ids 0..2047");
    FAILS(mk_append(big, low, 1, &err), MK_EINVAL, "token 0 is -1; demo has ids 0..2047");
    FAILS(mk_append(big, high, -1, &err), MK_EINVAL, "mk_append: -1 tokens");
    FAILS(mk_append(big, NULL, 1, &err), MK_EINVAL, "mk_append: 1 tokens");
    CHECK(mk_context_used(big) == used);
    FAILS(mk_token_bytes(model, V, &bytes, &len, &err), MK_EINVAL,
          "token 2048 is not in 0 to 2047");
    FAILS(mk_token_bytes(model, -1, &bytes, &len, &err), MK_EINVAL, "token -1 is not in 0 to 2047");
    CHECK(mk_token_is_end(model, END) == 1);
    CHECK(!mk_token_is_end(model, IM_END) && !mk_token_is_end(model, -1) &&
          !mk_token_is_end(NULL, END));
}

static void test_null(void)
{
    struct mk_context *c = big;
    const char *bytes;
    int32_t token = 1;
    size_t n;

    mk_close(NULL);
    mk_context_free(NULL);
    mk_cancel(NULL);
    CHECK(mk_context_length(NULL) == 0 && mk_context_used(NULL) == 0 && !mk_context_tokens(NULL));
    FAILS(mk_context_make(NULL, 0, &c, &err), MK_EINVAL, "mk_context_make: no model");
    CHECK(!c);
    FAILS(mk_context_make(model, 0, NULL, &err), MK_EINVAL, "mk_context_make: out is NULL");
    c = big;
    FAILS(mk_context_make(model, MAX_CONTEXT + 1, &c, &err), MK_EINVAL,
          "context is 1025; demo takes 1..1024 tokens");
    CHECK(!c);
    FAILS(mk_context_make(model, -1, &c, &err), MK_EINVAL,
          "context is -1; demo takes 1..1024 tokens");
    FAILS(mk_append(NULL, &token, 1, &err), MK_EINVAL, "mk_append: no context");
    FAILS(mk_truncate(NULL, 0, &err), MK_EINVAL, "mk_truncate: no context");
    FAILS(mk_logits(NULL, logits_a, &err), MK_EINVAL, "mk_logits: no context");
    FAILS(mk_logits(big, NULL, &err), MK_EINVAL, "mk_logits: no place for the logits");
    FAILS(mk_generate(NULL, NULL, NULL, NULL, NULL, &err), MK_EINVAL, "mk_generate: no context");
    FAILS(mk_tokenize(NULL, "a", 1, 0, &token, 1, &n, &err), MK_EINVAL, "no model");
    FAILS(mk_tokenize(model, NULL, 1, 0, &token, 1, &n, &err), MK_EINVAL,
          "mk_tokenize: bad arguments");
    FAILS(mk_tokenize(model, "a", 1, 0, NULL, 1, &n, &err), MK_EINVAL,
          "mk_tokenize: bad arguments");
    FAILS(mk_tokenize(model, "a", 1, 0, &token, 1, NULL, &err), MK_EINVAL,
          "mk_tokenize: bad arguments");
    FAILS(mk_tokenize(model, "a", 1, 64, &token, 1, &n, &err), MK_EINVAL,
          "mk_tokenize: bad arguments");
    FAILS(mk_chat_tokens(model, NULL, NULL, 1, &token, 1, &n, &err), MK_EINVAL,
          "mk_chat_tokens: bad arguments");
    FAILS(mk_token_bytes(model, 1, NULL, &n, &err), MK_EINVAL, "mk_token_bytes: bad arguments");
    FAILS(mk_token_bytes(model, 1, &bytes, NULL, &err), MK_EINVAL, "mk_token_bytes: bad arguments");
    /* The caller need not want to know. */
    CHECK(mk_append(big, &token, -1, NULL) == MK_EINVAL &&
          mk_open(NULL, NULL, &(struct mk_model *){0}, NULL) == MK_EINVAL);
}

static void test_empty(void)
{
    int n = -1;

    WORKS(mk_truncate(big, 0, &err));
    FAILS(mk_generate(big, NULL, NULL, NULL, &n, &err), MK_EINVAL,
          "mk_generate: the context is empty");
    CHECK(n == 0);
    FAILS(mk_logits(big, logits_a, &err), MK_EINVAL, "mk_logits: the context is empty");
    WORKS(mk_append(big, NULL, 0, &err));
}

/* ---- Text ---- */

/* The bytes of A's tokens as whole text, special tokens left out; a half character at the end is
   not said, and what is no UTF-8 is U+FFFD. */
static size_t whole_text(const struct answer *a, char *out)
{
    static unsigned char raw[16384];
    size_t n = 0, len = 0;
    const char *bytes;
    size_t n_bytes;

    for (int i = 0; i < a->n; i++) {
        WORKS(mk_token_bytes(model, a->token[i], &bytes, &n_bytes, &err));
        if (a->token[i] >= END || n + n_bytes > sizeof raw)
            continue;
        memcpy(raw + n, bytes, n_bytes);
        n += n_bytes;
    }
    for (size_t i = 0; i < n; ) {
        int valid;
        const size_t piece = utf8_piece(raw + i, n - i, &valid);
        if (valid < 0)
            break;
        memcpy(out + len, valid ? (const char *)raw + i : "\xef\xbf\xbd", valid ? piece : 3);
        len += valid ? piece : 3;
        i += piece;
    }
    return len;
}

static void test_streaming(void)
{
    static char text[3 * 16384];
    int mistakes = 0, specials = 0;
    struct answer a;

    for (uint64_t seed = 12; seed <= 13; seed++) {
        const struct mk_sampling s = noise(250, seed);
        size_t len;

        answer(big, references[0].tokens, 4, &s, &a);
        len = whole_text(&a, text);
        CHECKF(len == a.len && !memcmp(text, a.text, len),
               "%s: seed %d: %zu bytes were told, the tokens have %zu", device, (int)seed, a.len,
               len);
        for (size_t i = 0; i < len; i++)
            mistakes += (unsigned char)text[i] == 0xef;
        for (int i = 0; i < a.n; i++)
            specials += a.token[i] >= END;
    }
    CHECKF(mistakes > 10 && specials > 0, "%d mistakes, %d special tokens", mistakes, specials);
}

static void test_tokenize(void)
{
    int32_t tokens[64] = {0}, few[2] = {0};
    size_t n = 0;

    WORKS(mk_tokenize(model, "", 0, 0, NULL, 0, &n, &err));
    CHECK(n == 0);
    WORKS(mk_tokenize(model, "a<|im_end|>b", 12, MK_SPECIAL, tokens, 64, &n, &err));
    CHECK(n == 3 && tokens[1] == IM_END);
    WORKS(mk_tokenize(model, "a<|im_end|>b", 12, 0, tokens, 64, &n, &err));
    CHECK(n > 3);
    for (size_t i = 0; i < n; i++)
        CHECK(tokens[i] < END);
    WORKS(mk_tokenize(model, "a<|im_end|>b", 12, 0, few, 1, &n, &err));
    CHECK(n > 3 && few[0] == tokens[0] && few[1] == 0);
    FAILS(mk_tokenize(model, "ab\xffz", 4, 0, tokens, 64, &n, &err), MK_EFORMAT,
          "the text is not UTF-8 at byte 2");
    FAILS(mk_tokenize(model, "ab\xe2\x82", 4, 0, tokens, 64, &n, &err), MK_EFORMAT,
          "the text is not UTF-8 at byte 2");
    WORKS(mk_tokenize(model, "a\0b", 3, 0, tokens, 64, &n, &err));
    CHECK(n == 3);
}

/* One chat turn is these bytes. */
static void turn_is(const char *system, const char *user, int first, const char *want, int specials)
{
    int32_t tokens[128];
    struct answer a = {0};
    size_t n = 0, again = 0;
    const char *bytes;
    size_t len;

    WORKS(mk_chat_tokens(model, system, user, first, tokens, 128, &n, &err));
    WORKS(mk_chat_tokens(model, system, user, first, NULL, 0, &again, &err));
    CHECK(n == again && n <= 128);
    for (size_t i = 0; i < n; i++) {
        WORKS(mk_token_bytes(model, tokens[i], &bytes, &len, &err));
        memcpy(a.text + a.len, bytes, len);
        a.len += len;
        specials -= tokens[i] >= END;
    }
    CHECK_STR(a.text, want);
    CHECKF(specials == 0, "\"%s\": %d special tokens too few", want, specials);
}

static void test_chat(void)
{
    int32_t token;
    size_t n;

    turn_is(NULL, "Hello", 1, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 3);
    turn_is(NULL, "Hello", 0, "\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 3);
    turn_is("Be brief.", "Hello", 1, "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 5);
    /* What a person writes makes no special tokens. */
    turn_is(NULL, "<|im_end|>", 1,
            "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n", 3);
    FAILS(mk_chat_tokens(model, NULL, "a\xff", 1, &token, 1, &n, &err), MK_EFORMAT,
          "the message is not UTF-8 at byte 1");
    FAILS(mk_chat_tokens(model, "\xff", "a", 1, &token, 1, &n, &err), MK_EFORMAT,
          "the system text is not UTF-8 at byte 0");
}

/* ---- Facts ---- */

static void test_info(void)
{
    struct mk_info info = {.size = sizeof info};
    int a, b, c;

    WORKS(mk_model_info(model, &info, &err));
    CHECK_STR(info.name, "demo");
    CHECK(on_gpu() ? strlen(info.device) > 3 : !strcmp(info.device, "cpu"));
    CHECK(info.vocab == V && info.max_context == MAX_CONTEXT && info.has_tokenizer == 1 &&
          info.has_chat == 1);
    CHECKF(info.weight_bytes == 10493952, "%lld bytes of weights", (long long)info.weight_bytes);
    info.size++;
    FAILS(mk_model_info(model, &info, &err), MK_EINVAL, "mk_model_info: info.size is %zu, not %zu",
          sizeof info + 1, sizeof info);
    FAILS(mk_model_info(NULL, &info, &err), MK_EINVAL, "mk_model_info: no model");
    FAILS(mk_model_info(model, NULL, &err), MK_EINVAL, "mk_model_info: no info");
    CHECK(sscanf(mk_version(), "%d.%d.%d", &a, &b, &c) == 3);
}

static void test_stats(void)
{
    const struct reference *r = &references[0];
    const struct mk_sampling s = greedy(20);
    struct mk_stats stats = {.size = sizeof stats};
    struct answer a;

    answer(big, r->tokens, r->n_tokens, &s, &a);
    WORKS(mk_context_stats(big, &stats, &err));
    CHECK(stats.size == sizeof stats && stats.load_s > 0);
    CHECK(on_gpu() ? stats.kernel_from >= 1 && stats.kernel_from <= 3 && stats.kernel_s > 0
                   : stats.kernel_from == 0);
    CHECKF(stats.prefill_tokens == r->n_tokens - 1 && stats.prefill_s > 0, "%d tokens prefilled",
           stats.prefill_tokens);
    CHECK(stats.decode_tokens == 19 && stats.decode_s > 0);
    CHECKF(stats.first_token_s >= stats.prefill_s && stats.first_token_s < 60,
           "first token after %g s, prefill %g s", stats.first_token_s, stats.prefill_s);
    /* Of what was generated only the last token is not computed yet. */
    WORKS(mk_append(big, NULL, 0, &err));
    WORKS(mk_context_stats(big, &stats, &err));
    CHECKF(stats.prefill_tokens == 0, "%d tokens computed twice", stats.prefill_tokens);
    WORKS(mk_append(big, r->tokens, 3, &err));
    WORKS(mk_context_stats(big, &stats, &err));
    CHECKF(stats.prefill_tokens == 3, "%d tokens prefilled, not 3", stats.prefill_tokens);
    stats.size = 8;
    FAILS(mk_context_stats(big, &stats, &err), MK_EINVAL,
          "mk_context_stats: stats.size is 8, not %zu", sizeof stats);
    FAILS(mk_context_stats(NULL, &stats, &err), MK_EINVAL, "mk_context_stats: no context");
    FAILS(mk_context_stats(big, NULL, &err), MK_EINVAL, "mk_context_stats: no stats");
}

/* ---- Opening ---- */

static char *read_file(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    char *text = malloc(1 << 20);

    *size = f && text ? fread(text, 1, (1 << 20) - 1, f) : 0;
    if (text)
        text[*size] = 0;
    if (f)
        fclose(f);
    return text;
}

static void write_file(const char *dir, const char *name, const char *data, size_t size)
{
    char path[4096];
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, size, f) == size);
    if (f)
        fclose(f);
}

static void link_file(const char *dir, const char *name)
{
    char from[5000], to[5000];

    snprintf(from, sizeof from, "%s/%s", demo, name);
    snprintf(to, sizeof to, "%s/%s", dir, name);
    CHECK(symlink(from, to) == 0);
}

static void open_fails(const char *dir, int code, const char *want)
{
    const struct mk_options options = {.size = sizeof options, .device = "cpu"};
    struct mk_model *m = model;

    FAILS(mk_open(dir, &options, &m, &err), code, "%s%s", dir, want);
    CHECK(!m);
}

static void test_open_arguments(void)
{
    struct mk_options options = {.size = sizeof options, .device = "tpu"};
    struct mk_model *m = model;

    FAILS(mk_open(demo, &options, &m, &err), MK_EINVAL,
          "device is \"tpu\"; it must be auto, gpu, cpu, host or host:sm_XX");
    CHECK(!m);
    options = (struct mk_options){.size = 4};
    FAILS(mk_open(demo, &options, &m, &err), MK_EINVAL, "mk_open: options.size is 4, not %zu",
          sizeof options);
    options = (struct mk_options){.size = sizeof options, .threads = -1};
    FAILS(mk_open(demo, &options, &m, &err), MK_EINVAL, "mk_open: options.threads is -1");
    FAILS(mk_open(demo, NULL, NULL, &err), MK_EINVAL, "mk_open: out is NULL");
    FAILS(mk_open(NULL, NULL, &m, &err), MK_EINVAL, "mk_open: no model folder");
    FAILS(mk_open("", NULL, &m, &err), MK_EINVAL, "mk_open: no model folder");
}

/* A plan that cannot be: seen when the kernel is made. */
static void test_bad_plan(void)
{
    static const char *const set[] = {"no_such_key=1", NULL};
    const struct mk_options options = {.size = sizeof options, .device = "gpu", .set = set};
    struct mk_context *c = big;
    struct mk_model *m = NULL;
    struct mk_err err = {.text = ""};

    WORKS(mk_open(demo, &options, &m, &err));
    CHECKF(mk_context_make(m, 0, &c, &err) == MK_EINVAL && strstr(err.text, "no_such_key") && !c,
           "a plan key that is not known: %s", err.text);
    mk_close(m);
}

/* A folder gets its files one by one, each first wrong, then right. */
static void test_open(void)
{
    char dir[128], path[5000], *config, *tokenizer;
    size_t n_config, n_tokenizer;
    struct mk_info info = {.size = sizeof info};
    struct mk_options options = {.size = sizeof options, .device = "cpu"};
    struct mk_model *m = NULL;
    int32_t token;
    size_t n;

    snprintf(dir, sizeof dir, "%s/model", scratch);
    snprintf(path, sizeof path, "%s/config.json", demo);
    config = read_file(path, &n_config);
    snprintf(path, sizeof path, "%s/tokenizer.json", demo);
    tokenizer = read_file(path, &n_tokenizer);

    open_fails(dir, MK_ENOENT, ": no such folder");
    write_file(scratch, "model", "x", 1);
    open_fails(dir, MK_ENOENT, ": not a folder");
    CHECK(unlink(dir) == 0 && mkdir(dir, 0700) == 0);
    open_fails(dir, MK_ENOENT, "/config.json: cannot open: No such file or directory");
    write_file(dir, "config.json", "{", 1);
    open_fails(dir, MK_EFORMAT, "/config.json: line 1, column 2: the JSON ends too early");
    write_file(dir, "config.json", "[]", 2);
    open_fails(dir, MK_EFORMAT, "/config.json: expected an object { ... }");
    write_file(dir, "config.json", config, n_config);
    open_fails(dir, MK_ENOENT, ": has neither model.safetensors nor model.safetensors.index.json");
    write_file(dir, "model.safetensors", "", 0);
    open_fails(dir, MK_EFORMAT, "/model.safetensors: 0 bytes are too few for a safetensors file");
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    CHECK(unlink(path) == 0);
    link_file(dir, "model.safetensors");
    write_file(dir, "tokenizer.json", tokenizer, 1000);
    open_fails(dir, MK_EFORMAT, "/tokenizer.json: line 45, column 31: the JSON ends too early");

    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    CHECK(unlink(path) == 0);
    WORKS(mk_open(dir, &options, &m, &err));
    WORKS(mk_model_info(m, &info, &err));
    CHECK(info.has_tokenizer == 0 && info.has_chat == 0);
    FAILS(mk_tokenize(m, "a", 1, 0, &token, 1, &n, &err), MK_EINVAL, "model has no tokenizer.json");
    FAILS(mk_chat_tokens(m, NULL, "a", 1, &token, 1, &n, &err), MK_EINVAL,
          "model has no tokenizer.json");
    mk_close(m);
    write_file(dir, "tokenizer.json", tokenizer, n_tokenizer);
    WORKS(mk_open(dir, &options, &m, &err));
    mk_close(m);
    free(config);
    free(tokenizer);
}

/* The folder scratch/WHAT-DEVICE/demo with the demo model's weights, and two files as they are
   given here (NULL: the demo model's). */
static void demo_copy(const char *what, const char *config, const char *tokenizer, char dir[256])
{
    snprintf(dir, 256, "%s/%s-%s", scratch, what, device);
    CHECK(mkdir(dir, 0700) == 0);
    snprintf(dir, 256, "%s/%s-%s/demo", scratch, what, device);
    CHECK(mkdir(dir, 0700) == 0);
    link_file(dir, "model.safetensors");
    if (config)
        write_file(dir, "config.json", config, strlen(config));
    else
        link_file(dir, "config.json");
    if (tokenizer)
        write_file(dir, "tokenizer.json", tokenizer, strlen(tokenizer));
    else
        link_file(dir, "tokenizer.json");
}

static char *read_demo(const char *name)
{
    char path[5000];
    size_t size;

    snprintf(path, sizeof path, "%s/%s", demo, name);
    return read_file(path, &size);
}

static void open_context(const char *dir, struct mk_model **m, struct mk_context **c)
{
    const struct mk_options options = {.size = sizeof options, .device = device, .set = plan};

    *m = NULL;
    *c = NULL;
    WORKS(mk_open(dir, &options, m, &err));
    WORKS(mk_context_make(*m, 0, c, &err));
}

/* A model whose end token comes soon: the fifth of the reference. */
static void test_end_token(void)
{
    static const char key[] = "\"eos_token_id\": 2045";
    const struct reference *r = &references[0];
    char dir[256], edited[4096] = "", *config = read_demo("config.json"), *at = strstr(config, key);
    struct mk_sampling s = greedy(12);
    struct mk_context *c;
    struct mk_model *m;
    struct answer a;

    CHECK(at != NULL);
    if (at)
        snprintf(edited, sizeof edited, "%.*s\"eos_token_id\": [7, %d]%s", (int)(at - config),
                 config, (int)r->next[4], at + strlen(key));
    demo_copy("end", edited, NULL, dir);
    free(config);
    open_context(dir, &m, &c);
    CHECK(mk_token_is_end(m, r->next[4]) && mk_token_is_end(m, 7) && !mk_token_is_end(m, END));
    if (c) {
        s.ignore_end = 0;
        answer(c, r->tokens, r->n_tokens, &s, &a);
        CHECKF(a.n == 5 && a.token[4] == r->next[4], "%s: %d tokens up to the end token", device,
               a.n);
        s.ignore_end = 1;
        answer(c, r->tokens, r->n_tokens, &s, &a);
        CHECKF(a.n == 12, "%s: %d tokens with ignore_end", device, a.n);
    }
    mk_context_free(c);
    mk_close(m);
}

/* In the vocabulary TEXT, ids A and B change places. */
static void swap_ids(char *text, int a, int b)
{
    char from[2][16], to[2][16], *at[2];
    const int id[2] = {a, b};

    for (int i = 0; i < 2; i++) {
        snprintf(from[i], sizeof from[i], "\": %d,", id[i]);
        at[i] = strstr(text, from[i]);
        CHECK(at[i] != NULL);
        snprintf(to[i], sizeof to[i], "\":%*d,", (int)strlen(from[i]) - 3, id[!i]);
        CHECK(strlen(to[i]) == strlen(from[i]));
    }
    for (int i = 0; at[0] && at[1] && i < 2; i++)
        memcpy(at[i], to[i], strlen(to[i]));
}

/* Two bytes of a character, then back to before them or on with TOKENS [n]: what comes next is no
   third byte. */
static void half_lost(struct mk_context *c, const struct reference *r, const int32_t *tokens, int n)
{
    const struct mk_sampling two = greedy(2), three = greedy(3);
    struct answer a, b = {0};

    answer(c, r->tokens, r->n_tokens, &two, &a);
    CHECK(a.len == 0);
    WORKS(mk_truncate(c, n ? mk_context_used(c) : r->n_tokens, &err));
    WORKS(mk_append(c, tokens, n, &err));
    CHECK(go_on(c, &three, &b) == 0);
    if (!n)
        CHECK_STR(b.text, "\xe2\x82\xac");
    else if (b.token[0] == r->next[2])
        CHECKF(!strncmp(b.text, "\xef\xbf\xbd", 3), "%s: \"%s\"", device, b.text);
    else
        CHECK(on_gpu());        /* close to call there */
}

/* The reference's first three tokens as the three bytes of a character. */
static void test_halves(void)
{
    const int byte_e2 = 158, byte_82 = 224, byte_ac = 105;      /* in the demo model's vocabulary */
    const struct reference *r = &references[0];
    char dir[256], *tokenizer = read_demo("tokenizer.json");
    const struct mk_sampling one = greedy(1), s = greedy(4);
    struct mk_context *c;
    struct mk_model *m;
    struct answer a, b = {0};

    swap_ids(tokenizer, r->next[0], byte_e2);
    swap_ids(tokenizer, r->next[1], byte_82);
    swap_ids(tokenizer, r->next[2], byte_ac);
    demo_copy("halves", NULL, tokenizer, dir);
    free(tokenizer);
    open_context(dir, &m, &c);
    if (c) {
        answer(c, r->tokens, r->n_tokens, &s, &a);
        CHECK_STR(a.text, "\xe2\x82\xac about");
        WORKS(mk_truncate(c, r->n_tokens, &err));
        for (int i = 0; i < 4; i++) {
            CHECK(go_on(c, &one, &b) == 0);
            CHECK(b.len == (i < 2 ? 0 : i == 2 ? 3 : a.len));
        }
        same_tokens("a character in three calls", &a, &b);
        half_lost(c, r, NULL, 0);
        half_lost(c, r, r->tokens, 1);
    }
    mk_context_free(c);
    mk_close(m);
}

/* ---- Memory that is not there ---- */

/* The linker sends our calls here (--wrap); the n-th of them fails. */
static long calls, fail_at;

static int fails_now(void)
{
    return __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) == fail_at;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
char *__real_strdup(const char *s);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
char *__wrap_strdup(const char *s);

void *__wrap_malloc(size_t n)
{
    return fails_now() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails_now() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails_now() ? NULL : __real_realloc(p, n);
}

char *__wrap_strdup(const char *s)
{
    return fails_now() ? NULL : __real_strdup(s);
}

/* Everything from mk_open to a few tokens; the code of what fails first. */
static int whole_life(struct mk_err *err)
{
    static const char *const set[] = {"warps=4", NULL};
    const struct mk_options options = {
        .size = sizeof options, .device = "cpu", .threads = 1, .set = set};
    const struct reference *r = &references[0];
    const struct mk_sampling s = noise(8, 3);
    struct mk_model *m = NULL;
    struct mk_context *c = NULL;
    int32_t tokens[32];
    size_t n = 0;
    int rc = mk_open(demo, &options, &m, err);

    if (rc == 0)
        rc = mk_context_make(m, SMALL, &c, err);
    if (rc == 0)
        rc = mk_chat_tokens(m, NULL, r->prompt, 1, tokens, 32, &n, err);
    if (rc == 0)
        rc = mk_append(c, tokens, (int)n, err);
    if (rc == 0)
        rc = mk_generate(c, &s, NULL, NULL, NULL, err);
    CHECK(!rc || rc == err->code);
    CHECK(rc == 0 || !m || !c || mk_context_length(c) == SMALL);
    mk_context_free(c);
    mk_close(m);
    return rc;
}

static void test_no_memory(void)
{
    struct mk_err err;
    long total, step, failed = 0;

    fail_at = 0;
    calls = 0;
    CHECK(whole_life(&err) == 0);
    total = calls;
    step = total > 240 ? total / 240 + 1 : 1;
    for (long at = 1; at <= total; at += at < 60 || at > total - 60 ? 1 : step) {
        int rc;

        memset(&err, 0, sizeof err);
        calls = 0;
        fail_at = at;
        rc = whole_life(&err);
        fail_at = 0;
        failed += rc != 0;
        CHECKF(rc == 0 || (rc == MK_ENOMEM && err.text[0]),
               "allocation %ld of %ld: code %d, \"%s\"", at, total, rc, err.text);
    }
    CHECKF(failed > 20, "%ld of %ld allocations are noticed", failed, total);
    printf("%ld allocations, %ld failures\n", total, failed);
}

/* ---- All of it ---- */

static void run_on(const char *where)
{
    const struct mk_options options = {.size = sizeof options, .device = where, .set = plan,
                                       .progress = on_progress, .user = &cancel_at_progress};

    device = where;
    WORKS(mk_open(demo, &options, &model, &err));
    WORKS(mk_context_make(model, 0, &big, &err));
    WORKS(mk_context_make(model, SMALL, &small, &err));
    if (!big || !small)
        return;
    CHECK(mk_context_length(big) == MAX_CONTEXT && mk_context_used(big) == 0);
    test_info();
    test_references();
    test_stats();
    test_pieces();
    test_logits();
    test_continue();
    test_truncate();
    test_full();
    test_turns();
    test_threads();
    test_cancel();
    test_cancel_append();
    test_storm();
    test_stops();
    test_seeds();
    test_ranges();
    test_ids();
    test_null();
    test_empty();
    test_streaming();
    test_tokenize();
    test_chat();
    mk_context_free(big);
    mk_context_free(small);
    mk_close(model);
    test_end_token();
    test_halves();
}

static void find_folders(void)
{
    const char *src = getenv("srcdir"), *models = getenv("MK_MODELS_DIR");
    char path[4096];
    struct stat st;

    if (!src)
        src = stat("demo-reference.txt", &st) ? "tests" : ".";
    snprintf(srcdir, sizeof srcdir, "%s", src);
    if (models)
        snprintf(path, sizeof path, "%.4000s/demo", models);
    else
        snprintf(path, sizeof path, "%.4000s/../models/demo", srcdir);
    CHECKF(realpath(path, demo) != NULL, "%s is not there", path);
    strcpy(scratch, "/tmp/t-mk-XXXXXX");
    CHECK(mkdtemp(scratch) != NULL);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *where)
{
    (void)st;
    (void)type;
    (void)where;
    return remove(path);
}

int main(void)
{
    const struct mk_options gpu = {.size = sizeof gpu, .device = "gpu"};
    struct mk_model *m;
    struct mk_err err;
    int rc;

    find_folders();
    read_references();
    run_on("cpu");
    test_open_arguments();
    test_open();
    test_no_memory();
    rc = mk_open(demo, &gpu, &m, &err);
    if (rc == 0) {
        mk_close(m);
        run_on("gpu");
        test_bad_plan();
    } else {
        CHECKF(rc == MK_ENOGPU, "opening the GPU: %d, %s", rc, err.text);
        printf("the CPU alone: %s\n", err.text);
    }
    CHECK(nftw(scratch, remove_one, 8, FTW_DEPTH | FTW_PHYS) == 0);
    return check_done();
}
