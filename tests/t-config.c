/* t-config.c - config.json to struct gen_model: the cases of config.test, names and places of
   models, end tokens, sizes of the carried models, RoPE frequencies against Hugging Face. */
#include "tests/check.h"
#include "gen/model.h"
#include <errno.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

#define CONFIG "models/toy/config.json"

static char scratch[] = "/tmp/t-config-XXXXXX";

static const char *test_dir(void)
{
    const char *srcdir = getenv("srcdir");

    return srcdir ? srcdir : access("config.test", R_OK) ? "tests" : ".";
}

__attribute__((format(printf, 1, 2)))
static char *text_of(const char *fmt, ...)
{
    static char buf[4][8192];
    static int turn;
    va_list ap;

    turn = (turn + 1) % 4;
    va_start(ap, fmt);
    vsnprintf(buf[turn], sizeof(buf[turn]), fmt, ap);
    va_end(ap);
    return buf[turn];
}

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");

    if (!f || fputs(text, f) < 0 || fclose(f)) {
        perror(path);
        exit(1);
    }
}

/* ---- config.test --------------------------------------------------------- */

enum { MAX_MEMBERS = 40, MAX_BASES = 4, MAX_LINE = 2048 };

struct member {
    char key[128], value[1024];
};

struct config {
    char name[32];
    int n;
    struct member m[MAX_MEMBERS];
};

static struct config bases[MAX_BASES], now;
static int n_bases;
static char raw[8192];                  /* the text of a "json" case */
static size_t raw_len;

static void add(struct config *c, const char *key, const char *value)
{
    if (c->n == MAX_MEMBERS)
        exit(1);
    snprintf(c->m[c->n].key, sizeof(c->m[c->n].key), "%s", key);
    snprintf(c->m[c->n].value, sizeof(c->m[c->n].value), "%s", value);
    c->n++;
}

static int find(const struct config *c, const char *key)
{
    int i = 0;

    while (i < c->n && strcmp(c->m[i].key, key))
        i++;
    return i;
}

/* KEY or "KEY WITH BLANKS", then VALUE. */
static void split(char *line, char **key, char **value)
{
    char *end;

    *key = *line == '"' ? line + 1 : line;
    end = strchr(*key, *line == '"' ? '"' : ' ');
    if (!end) {
        *value = line + strlen(line);
        return;
    }
    *value = end + (*line == '"' ? 2 : 1);
    *end = '\0';
}

static void unescape(const char *s)
{
    for (raw_len = 0; *s && raw_len < sizeof(raw); s++) {
        unsigned byte;

        if (s[0] == '\\' && s[1] == 'x' && sscanf(s + 2, "%2x", &byte) == 1) {
            raw[raw_len++] = (char)byte;
            s += 3;
        } else if (s[0] == '\\' && s[1] == 'n') {
            raw[raw_len++] = '\n';
            s++;
        } else {
            s += s[0] == '\\';
            raw[raw_len++] = *s;
        }
    }
}

static void compose(const struct config *c)
{
    raw_len = (size_t)snprintf(raw, sizeof(raw), "{");
    for (int i = 0; i < c->n; i++)
        raw_len += (size_t)snprintf(raw + raw_len, sizeof(raw) - raw_len, "%s\"%s\": %s",
                                    i ? ",\n " : "", c->m[i].key, c->m[i].value);
    raw_len += (size_t)snprintf(raw + raw_len, sizeof(raw) - raw_len, "}\n");
}

static const char *summary(const struct gen_model *m)
{
    static const char *const dtypes[] = {"bf16", "fp16", "fp32"};
    static char s[512];
    int n = snprintf(s, sizeof(s), "%s %s D %d H %d K %d E %d F %d V %d L %d context %d eps %g "
                     "theta %g ", m->name, m->family, m->D, m->H, m->K, m->E, m->F, m->V, m->L,
                     m->max_context, m->eps, m->rope_theta);

    if (m->rope == GEN_ROPE_PLAIN)
        n += sprintf(s + n, "plain");
    else
        n += sprintf(s + n, "llama3 %g %g %g %d", m->rope_factor, m->rope_low, m->rope_high,
                     m->rope_original);
    n += sprintf(s + n, "%s%s %s %s end", m->qk_norm ? " norm" : "", m->qkv_bias ? " bias" : "",
                 m->tied ? "tied" : "untied", dtypes[m->dtype]);
    for (int i = 0; i < m->n_end; i++)
        n += sprintf(s + n, " %d", m->end[i]);
    return s;
}

/* Parse RAW from a block of exactly its size and compare with the line WANT. */
static void check_case(const char *want, int line)
{
    struct gen_model m, before;
    struct mk_err err = {0, ""};
    const char *code, *place = strstr(want, "CONFIG");
    char *copy = malloc(raw_len + 1), *got;
    int rc;

    memset(&m, 0x5a, sizeof(m));
    before = m;
    memcpy(copy, raw, raw_len);
    copy = realloc(copy, raw_len ? raw_len : 1);
    rc = gen_model_parse(copy, raw_len, CONFIG, &m, &err);
    free(copy);
    code = rc == MK_EFORMAT ? "EFORMAT" : rc == MK_EUNSUPPORTED ? "EUNSUPPORTED" : "?";
    got = rc ? text_of("%s %s", code, err.text)
             : text_of("ok%s%s", want[2] ? " " : "", want[2] ? summary(&m) : "");
    if (place)
        want = text_of("%.*s%s%s", (int)(place - want), want, CONFIG, place + 6);
    CHECKF(!strcmp(got, want), "config.test:%d\n    got  %s\n    want %s", line, got, want);
    CHECK(rc == err.code && (rc == 0 || !memcmp(&m, &before, sizeof(m))));
}

/* One line of config.test; 1 when it ended a case. */
static int take(char *line, int number, int *in_base)
{
    char *key, *value;

    if (!strncmp(line, "base ", 5) && n_bases < MAX_BASES) {
        snprintf(bases[n_bases++].name, sizeof(bases[0].name), "%.31s", line + 5);
        *in_base = 1;
    } else if (*in_base) {
        split(line, &key, &value);
        add(&bases[n_bases - 1], key, value);
    } else if (!strncmp(line, "on ", 3)) {
        now.n = -1;
        for (int i = 0; i < n_bases; i++) {
            if (!strcmp(bases[i].name, line + 3))
                now = bases[i];
        }
        CHECKF(now.n >= 0, "config.test:%d: no such base", number);
        compose(&now);
    } else if (!strncmp(line, "json ", 5)) {
        unescape(line + 5);
    } else if (!strncmp(line, "set ", 4) || !strncmp(line, "add ", 4)) {
        split(line + 4, &key, &value);
        if (*line == 's' && find(&now, key) < now.n)
            snprintf(now.m[find(&now, key)].value, sizeof(now.m[0].value), "%s", value);
        else
            add(&now, key, value);
        compose(&now);
    } else if (!strncmp(line, "del ", 4)) {
        int i = find(&now, line + 4);

        CHECKF(i < now.n, "config.test:%d: no such key", number);
        memmove(&now.m[i], &now.m[i + 1], (size_t)(now.n - i - 1) * sizeof(now.m[0]));
        now.n--;
        compose(&now);
    } else {
        check_case(line, number);
        return 1;
    }
    return 0;
}

static void test_cases(void)
{
    FILE *f = fopen(text_of("%s/config.test", test_dir()), "r");
    char line[MAX_LINE];
    int number = 0, in_base = 0, cases = 0;

    if (!f) {
        perror("config.test");
        exit(1);
    }
    while (fgets(line, sizeof(line), f)) {
        number++;
        line[strcspn(line, "\n")] = '\0';
        if (!*line)
            in_base = 0;
        else if (*line != '#')
            cases += take(line, number, &in_base);
    }
    fclose(f);
    CHECKF(cases > 80, "only %d cases", cases);
}

/* ---- Sizes --------------------------------------------------------------- */

static void test_limits(void)
{
    struct gen_model m;
    struct mk_err err;
    size_t big = (1 << 20) + 1;
    char *text = malloc(big);

    memset(text, ' ', big);
    CHECK(gen_model_parse(text, big, CONFIG, &m, &err) == MK_EFORMAT);
    CHECK_STR(err.text, CONFIG ": 1048577 bytes; at most 1048576 are read");
    memset(text, '[', 65);
    memset(text + 65, ']', 65);
    CHECK(gen_model_parse(text, 130, CONFIG, &m, &err) == MK_EFORMAT);
    CHECK_STR(err.text, CONFIG ": line 1, column 65: nested deeper than 64 levels");
    CHECK(gen_model_parse(text + 1, 128, CONFIG, &m, &err) == MK_EFORMAT);
    CHECK_STR(err.text, CONFIG ": expected an object { ... }");
    memset(text, '[', big);
    CHECK(gen_model_parse(text, big - 1, CONFIG, &m, &err) == MK_EFORMAT);
    CHECK(gen_model_parse(text, 64, CONFIG, &m, NULL) == MK_EFORMAT);
    free(text);
}

/* Whole parameter counts as published; the second column is without an untied embedding. */
static void test_carried(void)
{
    static const struct {
        const char *name;
        int64_t params, params_read;
    } want[] = {
        {"llama-3.1-8b", 8030261248, 7504924672}, {"llama-3.2-1b", 1235814400, 1235814400},
        {"llama-3.2-3b", 3212749824, 3212749824}, {"qwen2.5-0.5b", 494032768, 494032768},
        {"qwen2.5-1.5b", 1543714304, 1543714304}, {"qwen2.5-7b", 7615616512, 7070619136},
        {"qwen3-0.6b", 596049920, 596049920}, {"qwen3-1.7b", 1720574976, 1720574976},
        {"qwen3-4b", 4022468096, 4022468096}, {"qwen3-8b", 8190735360, 7568405504},
        {"smollm2-1.7b", 1711376384, 1711376384}, {"smollm2-135m", 134515008, 134515008},
        {"smollm2-360m", 361821120, 361821120},
    };
    int n = 0, listed = 0;

    while (gen_model_carried(n)) {
        CHECK(n == 0 || strcmp(gen_model_carried(n - 1), gen_model_carried(n)) < 0);
        n++;
    }
    for (size_t i = 0; i < sizeof(want) / sizeof(want[0]); i++) {
        struct gen_model m;
        struct mk_err err;

        CHECKF(gen_model_read(want[i].name, &m, &err) == 0, "%s", err.text);
        CHECK_STR(m.name, want[i].name);
        CHECKF(gen_model_params(&m) == want[i].params, "%s", m.name);
        CHECKF(gen_model_params_read(&m) == want[i].params_read, "%s", m.name);
        for (int k = 0; k < n; k++)
            listed += !strcmp(gen_model_carried(k), want[i].name);
    }
    CHECK(listed == (int)(sizeof(want) / sizeof(want[0])));
}

/* ---- RoPE ---------------------------------------------------------------- */

static void test_inv_freq(void)
{
    FILE *f = fopen(text_of("%s/inv-freq.txt", test_dir()), "r");
    char line[4096], folder[128];
    int n, used, models = 0;

    if (!f) {
        perror("inv-freq.txt");
        exit(1);
    }
    while (fgets(line, sizeof(line), f)) {
        struct gen_model m;
        struct mk_err err;
        char *s = line;

        if (sscanf(line, "%127s %d%n", folder, &n, &used) != 2)
            continue;
        CHECKF(gen_model_read(text_of("%s/../%s", test_dir(), folder), &m, &err) == 0, "%s",
               err.text);
        CHECK(n == m.E / 2);
        s += used;
        for (int i = 0; i < n; i++) {
            uint32_t want = (uint32_t)strtoul(s, &s, 16), got;
            float v = gen_model_inv_freq(&m, i);

            memcpy(&got, &v, sizeof(got));
            /* Hugging Face's own powf is not always correctly rounded: one unit apart. */
            CHECKF(got - want + 1 <= 2, "%s inv_freq[%d]: got %08x want %08x", folder, i, got,
                   want);
        }
        models++;
    }
    fclose(f);
    CHECKF(models >= 18, "only %d models", models);
}

/* ---- Names and places ---------------------------------------------------- */

static void check_name(const char *path, const char *want)
{
    struct gen_model m;
    struct mk_err err;

    CHECKF(gen_model_parse(raw, raw_len, path, &m, &err) == 0, "%s", err.text);
    CHECK_STR(m.name, want);
}

static void test_names(void)
{
    char path[200];

    now = bases[0];
    compose(&now);
    check_name("qwen3-0.6b", "qwen3-0.6b");
    check_name("a/b/Model_1.5", "Model_1.5");
    check_name("a/b/", "b");
    check_name("a/b/config.json", "b");
    check_name("config.json", "model");
    check_name("/tmp/my-config.json", "my-config");
    check_name("x/$(reboot)`id`", "reboot--id-");
    check_name("x/'); m4_esyscmd({|id|})", "m4_esyscmd---id---");
    check_name("x/a\"b\nc\xff\xfe", "a-b-c--");
    check_name("../..", "model");
    check_name("x/-o", "o");
    check_name("x/.hidden", "hidden");
    check_name("x/\xe2\x82\xac", "model");
    check_name("", "model");
    memset(path, 'n', sizeof(path));
    path[sizeof(path) - 1] = '\0';
    check_name(path, text_of("%.63s", path));
}

/* Fails with CODE, and the text is FMT...; the scratch folder in it is written @. */
static void check_read(const char *where, int code, const char *want)
{
    struct gen_model m;
    struct mk_err err = {0, ""};
    char text[8192], *at;

    CHECKF(gen_model_read(where, &m, &err) == code, "%s: %d %s", where, err.code, err.text);
    snprintf(text, sizeof(text), "%s", err.text);
    while ((at = strstr(text, scratch))) {
        *at = '@';
        memmove(at + 1, at + strlen(scratch), strlen(at + strlen(scratch)) + 1);
    }
    CHECK_STR(text, want);
}

static void test_places(void)
{
    struct gen_model m;
    struct mk_err err;
    char *dir = strdup(text_of("%s/my model", scratch));
    char *config = strdup(text_of("%s/config.json", dir));
    char *other = strdup(text_of("%s/generation_config.json", dir));

    mkdir(dir, 0700);
    check_read(dir, MK_ENOENT, "@/my model/config.json: cannot open: No such file or directory");
    now = bases[0];
    compose(&now);
    write_file(config, raw);
    CHECK(gen_model_read(dir, &m, &err) == 0 && m.n_end == 1);
    CHECK_STR(m.name, "my-model");
    CHECK(gen_model_read(config, &m, &err) == 0);
    CHECK_STR(m.name, "my-model");

    /* The Hugging Face cache: files are links into a folder of blobs. */
    CHECK(rename(config, text_of("%s/blob", dir)) == 0 && symlink("blob", config) == 0);
    CHECK(gen_model_read(dir, &m, &err) == 0);
    CHECK_STR(m.name, "my-model");
    CHECK(rename(text_of("%s/blob", dir), config) == 0);

    write_file(other, "{\"eos_token_id\": [1, 7], \"top_p\": 0.9, \"anything\": {}}");
    CHECK(gen_model_read(dir, &m, &err) == 0 && m.n_end == 2 && m.end[0] == 1 && m.end[1] == 7);
    write_file(other, "{\"eos_token_id\": 5000}");
    check_read(dir, MK_EFORMAT, "@/my model/generation_config.json: key \"eos_token_id\": "
               "expected token ids from 0 to vocab_size - 1 = 999, found 5000");
    write_file(other, "[");
    check_read(dir, MK_EFORMAT, "@/my model/generation_config.json: line 1, column 2: the JSON "
               "ends too early");
    unlink(other);

    CHECK(truncate(config, (off_t)1 << 30) == 0);
    check_read(dir, MK_EFORMAT, "@/my model/config.json: 1073741824 bytes; at most 1048576 are "
               "read");
    unlink(config);
    mkfifo(config, 0600);
    check_read(dir, MK_EIO, "@/my model/config.json: not a regular file");
    unlink(config);
    mkdir(config, 0700);
    check_read(dir, MK_EIO, "@/my model/config.json: not a regular file");
    rmdir(config);
    rmdir(dir);
    free(dir);
    free(config);
    free(other);
}

/* A model in $MK_MODELS_DIR, and one in ./models without the variable. */
static void test_search(void)
{
    char *models = strdup(text_of("%s/models", scratch));
    char *toy = strdup(text_of("%s/toy-1", models));
    char *config = strdup(text_of("%s/config.json", toy));
    char *was = strdup(getenv("MK_MODELS_DIR")), *cwd = getcwd(NULL, 0);
    struct mk_err err;
    struct gen_model m;

    mkdir(models, 0700);
    mkdir(toy, 0700);
    write_file(config, raw);
    setenv("MK_MODELS_DIR", models, 1);
    CHECK_STR(gen_model_folder("toy-1"), toy);
    CHECK(gen_model_read("toy-1", &m, &err) == 0);
    CHECK_STR(m.name, "toy-1");
    CHECK(gen_model_folder("../models/toy-1") == NULL);
    CHECK(gen_model_folder("..") == NULL);
    CHECK(gen_model_folder("") == NULL);
    CHECK(gen_model_folder(NULL) == NULL);
    CHECK(gen_model_read("toy-2", &m, &err) == MK_ENOENT);
    CHECKF(strstr(err.text, "toy-2: no such file or folder, and no model of that name; known are: ")
           == err.text && strstr(err.text, "toy-1"), "%s", err.text);
    CHECK(gen_model_read("no/such/place", &m, &err) == MK_ENOENT);

    unsetenv("MK_MODELS_DIR");
    if (chdir(scratch) == 0) {
        CHECK_STR(gen_model_folder("toy-1"), "models/toy-1");
        CHECK(gen_model_read("toy-1", &m, NULL) == 0);
        mkdir("toy-1", 0700);           /* a folder of that name that is no model */
        CHECKF(gen_model_read("toy-1", &m, &err) == 0, "%s", err.text);
        rmdir("toy-1");
        CHECK(chdir(toy) == 0 && gen_model_read(".", &m, &err) == 0);
        CHECK_STR(m.name, "toy-1");
    }
    CHECK(chdir(cwd) == 0);
    setenv("MK_MODELS_DIR", was, 1);
    unlink(config);
    rmdir(toy);
    rmdir(models);
    free(models);
    free(toy);
    free(config);
    free(was);
    free(cwd);
}

/* ---- json.h and err.h ---------------------------------------------------- */

static void test_json(void)
{
    static const char text[] = "{\"a\": 9007199254740991, \"b\": 9007199254740993, \"c\": -3.0,"
                               " \"d\": [1, \"x\", null], \"A\": true, \"e\": 1e999}";
    struct gen_json *root;
    const struct gen_json *v;
    int64_t i = 0;
    double d;
    int b;

    CHECK(gen_json_parse(text, sizeof(text) - 1, "t", &root, NULL) == 0);
    CHECK(gen_json_int(gen_json_get(root, "a"), 0, INT64_MAX, &i) == 0);
    CHECK(i == 9007199254740991);
    CHECK(gen_json_int(gen_json_get(root, "b"), 0, INT64_MAX, &i) == -1);
    CHECK(gen_json_int(gen_json_get(root, "c"), -3, -3, &i) == 0 && i == -3);
    CHECK(gen_json_int(gen_json_get(root, "c"), -2, 3, &i) == -1);
    CHECK(gen_json_bool(gen_json_get(root, "A"), &b) == 0 && b == 1);
    CHECK(gen_json_bool(gen_json_get(root, "a"), &b) == -1);
    CHECK(gen_json_double(gen_json_get(root, "e"), &d) == -1);
    CHECK(gen_json_get(root, "D") == NULL && gen_json_get(NULL, "d") == NULL);
    CHECK(gen_json_count(root) == 6 && gen_json_count(gen_json_get(root, "d")) == 3);
    CHECK_STR(gen_json_key(gen_json_first(root)), "a");
    v = gen_json_next(gen_json_first(gen_json_get(root, "d")));
    CHECK_STR(gen_json_string(v), "x");
    CHECK(gen_json_key(v) == NULL && gen_json_get(v, "x") == NULL && !gen_json_first(v));
    CHECK(gen_json_is_null(gen_json_next(v)) && !gen_json_next(gen_json_next(v)));
    gen_json_free(root);
    gen_json_free(NULL);
}

#ifdef __has_feature            /* clang's way to say it */
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
/* Our malloc, for this program and cJSON: allocation number FAIL_AT gives no memory. */
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t size);
void __libc_free(void *p);
static long fail_at, allocations, live;

static int fails(void)
{
    if (++allocations != fail_at)
        return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size)
{
    void *p = fails() ? NULL : __libc_malloc(size);

    live += p != NULL;
    return p;
}

void *calloc(size_t n, size_t size)
{
    void *p = fails() ? NULL : __libc_calloc(n, size);

    live += p != NULL;
    return p;
}

void *realloc(void *old, size_t size)
{
    void *p = fails() ? NULL : __libc_realloc(old, size);

    live += p && !old;
    return p;
}

void free(void *p)
{
    live -= p != NULL;
    __libc_free(p);
}

static void test_no_memory(void)
{
    struct mk_err err;
    struct gen_model m;
    int rc = -1;
    long n = 0;

    now = bases[0];
    compose(&now);
    while (rc && n < 1000) {
        long before = live;

        allocations = 0;
        fail_at = ++n;
        rc = gen_model_parse(raw, raw_len, CONFIG, &m, &err);
        fail_at = 0;
        CHECKF(live == before, "allocation %ld failed: %ld blocks lost", n, live - before);
        CHECKF(rc == 0 || (rc == MK_ENOMEM && strstr(err.text, CONFIG ": no memory for ")),
               "allocation %ld failed: %d %s", n, rc, err.text);
    }
    CHECKF(rc == 0 && n > 20, "%ld allocations", n);
}
#else
static void test_no_memory(void)
{
}
#endif

/* An object with many keys, and its last key again. */
static void test_many_keys(void)
{
    enum { N = 150000 };
    char *text = malloc(N * 20 + 64);
    struct gen_json *root;
    struct mk_err err;
    size_t len = 0;

    for (int i = 0; i < N; i++)
        len += (size_t)sprintf(text + len, "%c\"k%d\":%d", i ? ',' : '{', i, i);
    text[len] = '}';
    CHECK(gen_json_parse(text, len + 1, "t", &root, &err) == 0);
    CHECK(gen_json_count(root) == N);
    gen_json_free(root);
    len += (size_t)sprintf(text + len, ",\"k%d\":0}", N - 1);
    CHECK(gen_json_parse(text, len, "t", &root, &err) == MK_EFORMAT && root == NULL);
    CHECK_STR(err.text, "t: key \"k149999\" stands twice in one object");
    free(text);
}

static void test_err(void)
{
    struct mk_err err;

    CHECK(gen_fail(&err, MK_EIO, "%s\n", "bad\xff\x1b[31m\xc3\xa9") == MK_EIO);
    CHECK_STR(err.text, "bad??[31m\xc3\xa9");
    CHECK(gen_fail_in(&err, MK_EINVAL, "file %d", 7) == MK_EIO && err.code == MK_EIO);
    CHECK_STR(err.text, "file 7: bad??[31m\xc3\xa9");
    CHECK(gen_fail(&err, MK_EINVAL, "again: %s", err.text) == MK_EINVAL);
    CHECK_STR(err.text, "again: file 7: bad??[31m\xc3\xa9");
    CHECK(gen_fail(NULL, MK_EIO, "x") == MK_EIO && gen_fail_in(NULL, MK_EIO, "x") == MK_EIO);
    CHECK(gen_fail(&err, MK_EIO, "%*s", 5000, "x") == MK_EIO && strlen(err.text) == 4095);
}

int main(void)
{
    if (!getenv("MK_MODELS_DIR"))
        setenv("MK_MODELS_DIR", text_of("%s/../models", test_dir()), 1);
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 1;
    }
    test_err();
    test_json();
    test_many_keys();
    test_cases();
    test_no_memory();
    test_limits();
    test_carried();
    test_inv_freq();
    test_names();
    test_places();
    test_search();
    rmdir(scratch);
    return check_done();
}
