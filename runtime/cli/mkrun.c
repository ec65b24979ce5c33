/* mkrun.c - prompt in, text out; everything goes through mk.h. */
#include "config.h"
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "runtime/cli/cli.h"
#include "runtime/mk.h"

static const char help[] =
    "Usage: mkrun MODEL_DIR [-p TEXT | -f FILE] [OPTION]...\n"
    "Continue a text, or answer in a chat, with the model in the folder MODEL_DIR.\n"
    "Without -p, -f and --ids the prompt is read from standard input.\n"
    "\n"
    "Prompt:\n"
    "  -p, --prompt TEXT    the prompt\n"
    "  -f, --file FILE      the prompt is in FILE, less the newline at its end; \"-\" is\n"
    "                       standard input\n"
    "      --ids FILE       the prompt is token ids, decimal, with blanks or commas between\n"
    "      --raw            the prompt is plain text: no special token in it or before it\n"
    "      --chat           a conversation, a line of standard input for each turn; with -p\n"
    "                       or -f, one turn.  /reset starts anew, /quit or end of file ends,\n"
    "                       Ctrl-C stops an answer\n"
    "      --system TEXT    what the model is told before the first turn\n"
    "\n"
    "Answer:\n"
    "  -n, --max-tokens N   at most N new tokens; 0: until the model ends or the context is\n"
    "                       full (default: 256, in a chat 0)\n"
    "      --temp T         temperature; 0 (default): always the most likely token\n"
    "      --top-k K        choose among the K most likely tokens; 0 (default): all\n"
    "      --top-p P        choose among the most likely tokens with probability P together;\n"
    "                       1 (default): all\n"
    "      --seed N         the same seed gives the same text (default 0)\n"
    "      --ignore-end     run on past the model's end tokens\n"
    "      --print-ids      print token ids instead of text\n"
    "      --logits FILE    no answer: the logits after every token of the prompt, as an .npy\n"
    "                       file, float32 [tokens][vocabulary]\n"
    "      --stats          speeds, on standard error\n"
    "\n"
    "Machine:\n"
    "      --device WHERE   gpu, cpu or auto (default: the GPU if there is one); host or\n"
    "                       host:sm_XX: the kernel on an emulated GPU, to test and debug it\n"
    "  -c, --context N      tokens of prompt and answers together\n"
    "                       (default: the model's maximum or 4096, whichever is smaller)\n"
    "      --threads N      of the CPU (default: one per core)\n"
    "      --plan FILE      plan choices of the kernel, or none, see mkgen\n"
    "      --set KEY=VALUE  one plan choice, see mkgen; may be repeated\n"
    "      --help, --version\n"
    "\n"
    "Example: mkrun models/demo -p 'The sea was' -n 60 --temp 0.8 --seed 7\n";

enum { DEFAULT_CONTEXT = 4096, DEFAULT_TOKENS = 256 };

struct options {
    const char *dir, *prompt, *file, *ids, *system, *logits;
    struct mk_options mk;
    struct mk_sampling sampling;
    struct cli_list set;
    int max_tokens;             /* -1: not given */
    int context;
    int raw, chat, print_ids, stats;
};

/* ---- Arguments ---- */

enum { OPT_IDS = 256, OPT_RAW, OPT_CHAT, OPT_SYSTEM, OPT_TEMP, OPT_TOP_K, OPT_TOP_P, OPT_SEED,
       OPT_IGNORE_END, OPT_PRINT_IDS, OPT_LOGITS, OPT_STATS, OPT_DEVICE, OPT_THREADS, OPT_PLAN,
       OPT_SET, OPT_HELP, OPT_VERSION };

static const struct option longs[] = {
    { "prompt", required_argument, NULL, 'p' },
    { "file", required_argument, NULL, 'f' },
    { "ids", required_argument, NULL, OPT_IDS },
    { "raw", no_argument, NULL, OPT_RAW },
    { "chat", no_argument, NULL, OPT_CHAT },
    { "system", required_argument, NULL, OPT_SYSTEM },
    { "max-tokens", required_argument, NULL, 'n' },
    { "temp", required_argument, NULL, OPT_TEMP },
    { "top-k", required_argument, NULL, OPT_TOP_K },
    { "top-p", required_argument, NULL, OPT_TOP_P },
    { "seed", required_argument, NULL, OPT_SEED },
    { "ignore-end", no_argument, NULL, OPT_IGNORE_END },
    { "print-ids", no_argument, NULL, OPT_PRINT_IDS },
    { "logits", required_argument, NULL, OPT_LOGITS },
    { "stats", no_argument, NULL, OPT_STATS },
    { "device", required_argument, NULL, OPT_DEVICE },
    { "context", required_argument, NULL, 'c' },
    { "threads", required_argument, NULL, OPT_THREADS },
    { "plan", required_argument, NULL, OPT_PLAN },
    { "set", required_argument, NULL, OPT_SET },
    { "help", no_argument, NULL, OPT_HELP },
    { "version", no_argument, NULL, OPT_VERSION },
    { NULL, 0, NULL, 0 }
};

static int parse_device(const char *text)
{
    if (!strcmp(text, "gpu") || !strcmp(text, "cpu") || !strcmp(text, "auto")
        || !strcmp(text, "host") || !strncmp(text, "host:", 5))
        return 0;
    return cli_usage("--device: '%s' is not gpu, cpu, host, host:sm_XX or auto", text);
}

static int check_options(struct options *o, int argc, char **argv)
{
    int prompts = !!o->prompt + !!o->file + !!o->ids;

    if (optind == argc)
        return cli_usage("the model's folder is missing");
    if (optind + 1 < argc)
        return cli_usage("'%s' is too much: one model folder, and the prompt after -p",
                         argv[optind + 1]);
    if (prompts > 1)
        return cli_usage("only one of --prompt, --file and --ids can be used");
    if (o->chat && (o->ids || o->raw || o->logits))
        return cli_usage("--chat and --%s do not go together",
                         o->ids ? "ids" : o->raw ? "raw" : "logits");
    if (o->system && !o->chat)
        return cli_usage("--system needs --chat");
    if (o->sampling.top_p <= 0)
        return cli_usage("--top-p: must be above 0");
    o->dir = argv[optind];
    o->sampling.max_tokens = o->max_tokens >= 0 ? o->max_tokens : o->chat ? 0 : DEFAULT_TOKENS;
    o->mk.set = o->set.item;
    return 0;
}

/* Returns 0, an exit status, or -1: the whole job was done here. */
static int parse(int argc, char **argv, struct options *o)
{
    struct mk_sampling *s = &o->sampling;
    int c, rc = 0;

    while (!rc && (c = getopt_long(argc, argv, "p:f:n:c:", longs, NULL)) != -1) {
        switch (c) {
        case 'p': o->prompt = optarg; break;
        case 'f': o->file = optarg; break;
        case 'n': rc = cli_int("--max-tokens", optarg, 0, 1 << 24, &o->max_tokens); break;
        case 'c': rc = cli_int("--context", optarg, 1, 1 << 24, &o->context); break;
        case OPT_IDS: o->ids = optarg; break;
        case OPT_RAW: o->raw = 1; break;
        case OPT_CHAT: o->chat = 1; break;
        case OPT_SYSTEM: o->system = optarg; break;
        case OPT_TEMP: rc = cli_float("--temp", optarg, 0, 100, &s->temperature); break;
        case OPT_TOP_K: rc = cli_int("--top-k", optarg, 0, 1 << 24, &s->top_k); break;
        case OPT_TOP_P: rc = cli_float("--top-p", optarg, 0, 1, &s->top_p); break;
        case OPT_SEED: rc = cli_u64("--seed", optarg, &s->seed); break;
        case OPT_IGNORE_END: s->ignore_end = 1; break;
        case OPT_PRINT_IDS: o->print_ids = 1; break;
        case OPT_LOGITS: o->logits = optarg; break;
        case OPT_STATS: o->stats = 1; break;
        case OPT_DEVICE: rc = parse_device(o->mk.device = optarg); break;
        case OPT_THREADS: rc = cli_int("--threads", optarg, 0, 4096, &o->mk.threads); break;
        case OPT_PLAN: o->mk.plan_file = optarg; break;
        case OPT_SET: rc = cli_list_add(&o->set, optarg); break;
        case OPT_HELP: fputs(help, stdout); return -1;
        case OPT_VERSION: cli_version(); return -1;
        default: return cli_bad_option();
        }
    }
    return rc ? rc : check_options(o, argc, argv);
}

/* ---- Ctrl-C: stops the answer, not the program ---- */

static struct mk_context *volatile running;     /* computing now; NULL: nothing to stop */
static volatile sig_atomic_t interrupts;        /* since the answer or the prompt began */

static void on_interrupt(int sig)
{
    struct mk_context *c = running;

    interrupts = interrupts + 1;
    if (c && interrupts == 1) {
        mk_cancel(c);
    } else if (c && interrupts > 2) {           /* it does not listen: leave */
        signal(sig, SIG_DFL);
        raise(sig);
    }
}

static void catch_interrupts(void)
{
    struct sigaction sa, old;

    if (sigaction(SIGINT, NULL, &old) || old.sa_handler == SIG_IGN)
        return;
    memset(&sa, 0, sizeof(sa));
    sa.sa_handler = on_interrupt;               /* no SA_RESTART: a read at the prompt ends */
    sigaction(SIGINT, &sa, NULL);
}

static void work_begin(struct mk_context *c)
{
    interrupts = 0;
    running = c;
}

/* Returns 1 if Ctrl-C came.  A cancel that arrived too late must not stop the next call. */
static int work_end(struct mk_context *c, int rc)
{
    running = NULL;
    if (interrupts && rc != MK_ECANCELED)
        mk_append(c, NULL, 0, NULL);
    return interrupts != 0;
}

/* ---- Prompt ---- */

struct tokens { int32_t *id; int n; };

/* Decimal numbers with blanks, newlines or commas between, as written by people and numpy. */
static int parse_ids(const char *name, const char *text, size_t size, struct tokens *t)
{
    const char *p = text, *stop = text + size;

    t->id = malloc((size / 2 + 1) * sizeof(*t->id));
    if (!t->id)
        return cli_fail("not enough memory");
    for (;;) {
        char *end;
        long v;

        while (p < stop && *p && strchr(" \t\r\n,[]", *p))
            p++;
        if (p == stop)
            return 0;
        errno = 0;
        v = strtol(p, &end, 10);
        if (!isdigit((unsigned char) *p) || errno || v > INT32_MAX || t->n == INT_MAX)
            return cli_fail("%s: byte %zu: not a token id", name, (size_t) (p - text));
        t->id[t->n++] = (int32_t) v;
        p = end;
    }
}

/* NAME says in messages where TEXT is from. */
static int tokenize(const struct mk_model *m, const char *name, const char *text, size_t len,
                    int flags, struct tokens *t)
{
    struct mk_err err;
    size_t n;

    if (mk_tokenize(m, text, len, flags, NULL, 0, &n, &err))
        return cli_fail("%s: %s", name, err.text);
    if (n > INT_MAX)
        return cli_fail("the prompt has %zu tokens, which is more than any context", n);
    t->id = malloc((n + 1) * sizeof(*t->id));
    if (!t->id)
        return cli_fail("not enough memory");
    if (mk_tokenize(m, text, len, flags, t->id, n, &n, &err))
        return cli_error(&err);
    t->n = (int) n;
    return 0;
}

static const char *prompt_name(const struct options *o)
{
    const char *path = o->ids ? o->ids : o->file ? o->file : "-";

    return o->prompt ? "--prompt" : strcmp(path, "-") ? path : "standard input";
}

/* The text of the prompt; the caller frees *TEXT.  The newline that ends a file is not part
   of it. */
static int read_prompt(const struct options *o, char **text, size_t *size)
{
    const char *path = o->ids ? o->ids : o->file ? o->file : "-";

    if (!o->prompt) {
        if (!strcmp(path, "-") && isatty(STDIN_FILENO))
            cli_note("reading the prompt from standard input, up to Ctrl-D");
        if (cli_read(path, text, size))
            return CLI_FAILED;
        if (*size && (*text)[*size - 1] == '\n')
            (*text)[--*size] = 0;
        return 0;
    }
    *text = strdup(o->prompt);
    if (!*text)
        return cli_fail("not enough memory");
    *size = strlen(*text);
    return 0;
}

static int read_tokens(const struct options *o, const struct mk_model *m, struct tokens *t)
{
    char *text;
    size_t size;
    int rc = read_prompt(o, &text, &size);

    if (rc)
        return rc;
    if (o->ids)
        rc = parse_ids(prompt_name(o), text, size, t);
    else
        rc = tokenize(m, prompt_name(o), text, size, o->raw ? 0 : MK_SPECIAL, t);
    free(text);
    if (rc == 0 && t->n == 0)
        rc = cli_fail("%s: the prompt is empty, and there is nothing to continue",
                      prompt_name(o));
    return rc;
}

/* Too long is known before the weights are read. */
static int check_length(const struct options *o, const struct mk_info *info, int n)
{
    int context = o->context;

    if (!context)
        context = info->max_context < DEFAULT_CONTEXT ? info->max_context : DEFAULT_CONTEXT;
    if (n > context)
        return cli_fail("the prompt has %d tokens, the context holds %d "
                        "(--context; this model's maximum is %d)", n, context, info->max_context);
    if (n == context && !o->logits)
        return cli_fail("the prompt has %d tokens and fills the context of %d; there is no room "
                        "for an answer (--context; this model's maximum is %d)", n, context,
                        info->max_context);
    return 0;
}

/* ---- Answer ---- */

struct printer { int ids; int count; int newline; };

static int print_token(void *user, int32_t token, const char *text, size_t len)
{
    struct printer *p = user;

    cli_progress_clear();
    if (p->ids) {
        printf(p->count ? " %d" : "%d", (int) token);
        p->newline = 0;
    } else if (len) {
        fwrite(text, 1, len, stdout);
        p->newline = text[len - 1] == '\n';
    }
    p->count++;
    fflush(stdout);
    return ferror(stdout);
}

static void print_stats(const struct mk_context *c, int answers)
{
    static const char *const from[] = { "none: on the CPU", "compiled", "from the cache",
                                        "from a pack" };
    struct mk_stats s = { .size = sizeof(s) };
    struct mk_err err;

    if (mk_context_stats(c, &s, &err)) {
        cli_error(&err);
        return;
    }
    fprintf(stderr, "load     %.2f s, kernel %.2f s (%s)\n", s.load_s, s.kernel_s,
            from[s.kernel_from & 3]);
    fprintf(stderr, "prefill  %d tokens in %.2f ms", s.prefill_tokens, 1e3 * s.prefill_s);
    if (s.prefill_s > 0 && s.prefill_tokens > 0)
        fprintf(stderr, ", %.0f tok/s", s.prefill_tokens / s.prefill_s);
    fputc('\n', stderr);
    if (!answers)
        return;
    fprintf(stderr, "first    token after %.2f ms\n", 1e3 * s.first_token_s);
    fprintf(stderr, "decode   %d tokens in %.2f ms", s.decode_tokens, 1e3 * s.decode_s);
    if (s.decode_s > 0 && s.decode_tokens > 0)
        fprintf(stderr, ", %.1f tok/s", s.decode_tokens / s.decode_s);
    fputc('\n', stderr);
}

/* Append T and print the answer.  Returns 0, CLI_FAILED, or CLI_INTERRUPTED: Ctrl-C; *LOST is
   set when the context can only be freed. */
static int answer(const struct options *o, struct mk_context *c, const struct tokens *t, int ids,
                  int *lost)
{
    struct printer p = { .ids = ids, .newline = 1 };
    struct mk_err err;
    int rc, stopped;

    work_begin(c);
    rc = mk_append(c, t->id, t->n, &err);
    if (rc == 0)
        rc = mk_generate(c, &o->sampling, print_token, &p, NULL, &err);
    stopped = work_end(c, rc);
    cli_progress_clear();
    if (!p.newline)
        putchar('\n');
    fflush(stdout);
    *lost = rc == MK_EDEVICE;
    if (rc && rc != MK_ECANCELED)
        return cli_error(&err);
    if (o->stats)
        print_stats(c, 1);
    return stopped ? CLI_INTERRUPTED : CLI_OK;
}

/* ---- Logits ---- */

/* The .npy header of a float32 array [rows][cols], padded to 128 bytes as numpy reads it. */
static int write_npy_header(struct cli_file *f, int rows, int cols)
{
    const uint16_t one = 1;
    const int little = *(const unsigned char *) &one;
    char head[128];
    int n;

    memset(head, ' ', sizeof(head));
    memcpy(head, "\x93NUMPY\x01\x00\x76\x00", 10);
    n = snprintf(head + 10, sizeof(head) - 10,
                 "{'descr': '%cf4', 'fortran_order': False, 'shape': (%d, %d), }",
                 little ? '<' : '>', rows, cols);
    head[10 + n] = ' ';
    head[sizeof(head) - 1] = '\n';
    return cli_file_write(f, head, sizeof(head));
}

/* Teacher-forced, one token at a time, so that it is the decode kernel that is looked at. */
static int write_rows(struct cli_file *f, struct mk_context *c, const struct tokens *t,
                      float *row, int vocab)
{
    struct mk_err err;
    int rc;

    for (int i = 0; i < t->n; i++) {
        work_begin(c);
        rc = mk_append(c, t->id + i, 1, &err);
        if (rc == 0)
            rc = mk_logits(c, row, &err);
        if (work_end(c, rc))
            return CLI_INTERRUPTED;
        if (rc)
            return cli_error(&err);
        if (cli_file_write(f, row, (size_t) vocab * sizeof(*row)))
            return CLI_FAILED;
        cli_progress(NULL, "logits", (i + 1.0) / t->n);
    }
    return 0;
}

static int write_logits(const struct options *o, struct mk_context *c, const struct tokens *t,
                        int vocab)
{
    float *row = malloc((size_t) vocab * sizeof(*row));
    struct cli_file f;
    int rc;

    if (!row)
        return cli_fail("not enough memory");
    rc = cli_file_open(&f, o->logits);
    if (rc == 0) {
        rc = write_npy_header(&f, t->n, vocab);
        if (rc == 0)
            rc = write_rows(&f, c, t, row, vocab);
        if (rc == 0)
            rc = cli_file_done(&f);
        else
            cli_file_drop(&f);
    }
    free(row);
    if (rc == 0 && o->stats)
        print_stats(c, 0);
    return rc;
}

/* ---- Chat ---- */

/* An answer that was stopped has no end token; the next turn must find one.  END holds the
   tokens that are appended then (none when the family's end is not known). */
static int needs_end(const struct mk_model *m, const struct mk_context *c)
{
    int used = mk_context_used(c);

    return used > 0 && !mk_token_is_end(m, mk_context_tokens(c)[used - 1]);
}

/* The token that ends a turn: the one that an end token's text gives and nothing else does. */
static int find_end(const struct mk_model *m, int32_t *end)
{
    static const char *const known[] = { "<|im_end|>", "<|eot_id|>" };
    int32_t id[4];
    size_t n, len;
    const char *bytes;

    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (mk_tokenize(m, known[i], strlen(known[i]), MK_SPECIAL, id, 4, &n, NULL) || n < 1 ||
            n > 4 || mk_token_bytes(m, id[n - 1], &bytes, &len, NULL))
            continue;
        *end = id[n - 1];
        if (len == strlen(known[i]) && !memcmp(bytes, known[i], len))
            return 1;
    }
    return 0;
}

/* Tokens of the turn USER, after an end token if the last answer lacks it. */
static int turn_tokens(const struct options *o, const struct mk_model *m,
                       const struct mk_context *c, const char *user, struct tokens *t)
{
    int first = mk_context_used(c) == 0;
    struct mk_err err;
    int32_t end;
    size_t n;

    if (mk_chat_tokens(m, o->system, user, first, NULL, 0, &n, &err))
        return cli_error(&err);
    if (n >= INT_MAX)
        return cli_fail("the turn has %zu tokens, which is more than any context", n);
    t->id = malloc((n + 1) * sizeof(*t->id));
    if (!t->id)
        return cli_fail("not enough memory");
    if (!first && needs_end(m, c) && find_end(m, &end))
        t->id[t->n++] = end;
    if (mk_chat_tokens(m, o->system, user, first, t->id + t->n, n, &n, &err))
        return cli_error(&err);
    t->n += (int) n;
    return 0;
}

/* One turn.  A turn that cannot be taken leaves the conversation as it was. */
static int turn(const struct options *o, const struct mk_model *m, struct mk_context *c,
                const char *user, int *lost)
{
    int used = mk_context_used(c), length = mk_context_length(c);
    struct tokens t = { 0 };
    struct mk_err err;
    int rc = turn_tokens(o, m, c, user, &t);

    if (rc == 0 && t.n >= length - used)
        rc = cli_fail("the conversation has %d tokens with this turn, the context holds %d "
                      "(--context); /reset starts anew", used + t.n, length);
    else if (rc == 0)
        rc = answer(o, c, &t, o->print_ids, lost);
    free(t.id);
    /* Stopped before the first token of the answer: as if it had not been asked. */
    if (!*lost && rc && mk_context_used(c) <= used + t.n && mk_truncate(c, used, &err))
        return cli_error(&err);
    return rc;
}

/* A line without its newline, LEN bytes, or NULL: end of input, or a second Ctrl-C in a row. */
static char *read_line(char **line, size_t *cap, size_t *len, int interactive)
{
    ssize_t n;

    interrupts = 0;
    for (;;) {
        int before = interrupts;

        if (interactive) {
            fputs("> ", stderr);
            fflush(stderr);
        }
        errno = 0;
        n = getline(line, cap, stdin);
        if (n >= 0)
            break;
        if (errno != EINTR || before || !interactive)
            return NULL;
        clearerr(stdin);
        fputs("\n(Ctrl-C again, or /quit, ends)\n", stderr);
    }
    if (n > 0 && (*line)[n - 1] == '\n')
        (*line)[--n] = 0;
    if (n > 0 && (*line)[n - 1] == '\r')
        (*line)[--n] = 0;
    *len = (size_t) n;
    return *line;
}

static int chat(const struct options *o, const struct mk_model *m, struct mk_context *c)
{
    int interactive = isatty(STDIN_FILENO), status = CLI_OK, lost = 0;
    char *line = NULL;
    size_t cap = 0, len;
    struct mk_err err;

    while (!lost && read_line(&line, &cap, &len, interactive)) {
        if (!strcmp(line, "/quit"))
            break;
        if (!strcmp(line, "/reset")) {
            if (mk_truncate(c, 0, &err))
                status = cli_error(&err);
        } else if (strlen(line) != len) {
            status = cli_fail("standard input: byte %zu of the line: a zero byte", strlen(line));
        } else if (strspn(line, " \t") != len) {
            int rc = turn(o, m, c, line, &lost);

            if (rc == CLI_FAILED)
                status = rc;
        }
    }
    if (interactive)
        fputc('\n', stderr);
    free(line);
    if (!lost && interrupts)
        return CLI_INTERRUPTED;
    return interactive && !lost ? CLI_OK : status;
}

/* --chat with -p or -f. */
static int chat_once(const struct options *o, const struct mk_model *m, struct mk_context *c)
{
    int lost = 0, rc;
    char *text;
    size_t size;

    rc = read_prompt(o, &text, &size);
    if (rc)
        return rc;
    if (strlen(text) != size)
        rc = cli_fail("%s: byte %zu: a zero byte", prompt_name(o), strlen(text));
    else if (size == 0)
        rc = cli_fail("%s: the prompt is empty, and there is nothing to answer", prompt_name(o));
    else
        rc = turn(o, m, c, text, &lost);
    free(text);
    return rc;
}

/* ---- All of it ---- */

static int run_in_context(const struct options *o, struct mk_model *m,
                          const struct mk_info *info, const struct tokens *t)
{
    struct mk_context *c;
    struct mk_err err;
    int rc, lost = 0;

    rc = mk_context_make(m, o->context, &c, &err);
    cli_progress_clear();
    if (rc)
        return cli_error(&err);
    catch_interrupts();
    if (o->logits)
        rc = write_logits(o, c, t, info->vocab);
    else if (!o->chat)
        rc = answer(o, c, t, o->print_ids || !info->has_tokenizer, &lost);
    else
        rc = o->prompt || o->file ? chat_once(o, m, c) : chat(o, m, c);
    mk_context_free(c);
    return rc;
}

static int run(const struct options *o)
{
    struct mk_info info = { .size = sizeof(info) };
    struct tokens t = { 0 };
    struct mk_model *m;
    struct mk_err err;
    int rc = CLI_OK;

    if (mk_open(o->dir, &o->mk, &m, &err))
        return cli_error(&err);
    if (mk_model_info(m, &info, &err))
        rc = cli_error(&err);
    else if (o->chat && !info.has_chat)
        rc = cli_fail("%s has no chat template; without --chat the text is continued", o->dir);
    else if (!o->ids && !info.has_tokenizer)
        rc = cli_fail("%s has no tokenizer.json; give token ids with --ids", o->dir);
    else if (!o->chat)
        rc = read_tokens(o, m, &t);
    if (rc == 0 && !strcmp(info.device, "cpu") && (o->mk.plan_file || o->mk.set))
        cli_note("warning: --plan and --set choose the kernel of a GPU; the CPU has none");
    if (rc == 0 && !o->chat)
        rc = check_length(o, &info, t.n);
    if (rc == 0)
        rc = run_in_context(o, m, &info, &t);
    free(t.id);
    mk_close(m);
    return rc;
}

int main(int argc, char **argv)
{
    struct options o = {
        .mk = { .size = sizeof(o.mk), .progress = cli_progress, .warn = cli_warn },
        .sampling = { .size = sizeof(o.sampling), .top_p = 1 },
        .max_tokens = -1,
    };
    int rc;

    cli_start("mkrun", argc, argv);
    rc = parse(argc, argv, &o);
    if (rc == 0)
        rc = run(&o);
    free(o.set.item);
    return cli_end(rc < 0 ? CLI_OK : rc);
}
