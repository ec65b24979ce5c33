/* fuzz-tokenizer.c - any bytes as tokenizer.json, and any bytes as text.

   Each input is opened as a tokenizer (from a scratch folder) and, when that is possible,
   encodes texts that reach its branches.  The input itself is a text as well, for a sound
   tokenizer, and must come back from its tokens. */
#include "tests/fuzz/fuzz.h"

#include "runtime/tokenizer.h"
#include "runtime/utf8.h"

#define BASE(added, norm, pre, post, model) "{\"version\":\"1.0\",\"added_tokens\":" added \
    ",\"normalizer\":" norm ",\"pre_tokenizer\":" pre ",\"post_processor\":" post \
    ",\"decoder\":{\"type\":\"ByteLevel\"},\"model\":" model "}"
#define ADDED "[{\"id\":7,\"content\":\"<s>\",\"single_word\":false,\"lstrip\":false," \
    "\"rstrip\":true,\"normalized\":false,\"special\":true},{\"id\":8," \
    "\"content\":\"caf\xC3\xA9\"," \
    "\"single_word\":true,\"lstrip\":true,\"rstrip\":false,\"normalized\":true,\"special\":false}]"
#define MODEL(merges) "{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":\"a\",\"fuse_unk\":true," \
    "\"byte_fallback\":false,\"ignore_merges\":true,\"vocab\":{\"a\":0,\"b\":1,\"ab\":2," \
    "\"\\u0120\":3,\"\xC4\xA0" "a\":4,\"\\\"\":5,\"aba\":6},\"merges\":" merges "}"
#define LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":true}"
#define SPLIT "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?i:'s|'t)|[^\\\\r\\\\n\\\\p{L}]?" \
    "\\\\p{L}+|\\\\p{N}{1,3}|\\\\s+(?!\\\\S)|\\\\s+\"},\"behavior\":\"Isolated\",\"invert\":false}"
#define POST "{\"type\":\"Sequence\",\"processors\":[{\"type\":\"ByteLevel\"}," \
    "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\"," \
    "\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"special_tokens\":" \
    "{\"<s>\":{\"id\":\"<s>\",\"ids\":[7],\"tokens\":[\"<s>\"]}}}]}"

static const char small[] = BASE("[]", "null", LEVEL, "null", MODEL("[\"a b\",\"ab a\"]"));
static const char full[] = BASE(ADDED, "{\"type\":\"NFC\"}", "{\"type\":\"Sequence\","
    "\"pretokenizers\":[" SPLIT ",{\"type\":\"Digits\",\"individual_digits\":true}," LEVEL "]}",
    POST, MODEL("[[\"a\",\"b\"],[\"\xC4\xA0\",\"a\"],[\"ab\",\"a\"]]"));
static const char text[] = "caf\xC3\xA9 <s>  cafe\xCC\x81 it's \xF0\x9F\x98\x80 123 ab\r\n\t abaab";

static const struct fuzz_seed seeds[] = {
    {small, sizeof small - 1}, {full, sizeof full - 1}, {text, sizeof text - 1}, {NULL, 0}};
static const char *const words[] = {"\"vocab\"", "\"merges\"", "\"model\"", "\"content\"",
    "\"NFC\"", "\"Digits\"", "\"Split\"", "\"Removed\"", "\"String\"", "\"invert\":true", "\\\\s",
    "(?:a|a)+", "(?=a)", "(?<=b)", "{0,9}", "{65535}", "[^", "\\\\P{Lu}", "\\\\x{10FFFF}", "*+",
    "|", "\\ud83d\\ude00", "\\u0120", "#version", "\xCC\x95\xCC\x96", "\xF4\x8F\xBF\xBF",
    "<s>", NULL};

static char folder[64], file[96];
static struct rt_tokenizer *sound;

static void write_input(const void *data, size_t size)
{
    FILE *f;

    unlink(file);               /* writing over a file waits for the disk on some systems */
    f = fopen(file, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f))
        abort();
}

static void clean_up(void)
{
    rt_tokenizer_free(sound);
    unlink(file);
    rmdir(folder);
}

static void set_up(void)
{
    static char doc[65536];
    const char *tmp = getenv("TMPDIR");
    struct mk_err err;
    int extra = 0x100;
    size_t n;

    snprintf(folder, sizeof folder, "%.30s/fuzz-tokenizer-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(folder))
        abort();
    snprintf(file, sizeof file, "%s/tokenizer.json", folder);
    n = (size_t)snprintf(doc, sizeof doc, "{\"pre_tokenizer\":{\"type\":\"Sequence\","
                         "\"pretokenizers\":[%s,{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
                         "\"use_regex\":false}]},\"decoder\":{\"type\":\"ByteLevel\"},"
                         "\"model\":{\"vocab\":{", SPLIT);
    for (int b = 0; b < 256; b++) {     /* a token for every byte */
        int plain = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD);

        n += (size_t)snprintf(doc + n, sizeof doc - n, "%s\"\\u%04x\":%d", b ? "," : "",
                              plain ? b : extra++, b);
    }
    n += (size_t)snprintf(doc + n, sizeof doc - n, "},\"merges\":[]}}");
    write_input(doc, n);
    if (rt_tokenizer_open(folder, 256, &sound, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    atexit(clean_up);
}

/* Encode; every id must be one of the tokenizer's. */
static void encode(const struct rt_tokenizer *t, int vocab, const char *s, size_t len, int flags)
{
    int32_t ids[64];
    struct mk_err err;
    size_t n = 0;

    if (rt_tokenizer_encode(t, s, len, flags, ids, 64, &n, &err))
        return;
    for (size_t i = 0; i < n && i < 64; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            abort();
}

/* One byte is one token of SOUND, and text comes back from its tokens. */
static void check_text(const char *s, size_t len)
{
    int32_t *ids = malloc((len + 1) * sizeof *ids);
    struct mk_err err;
    size_t n = 0;
    int rc = rt_tokenizer_encode(sound, s, len, 0, ids, len, &n, &err);

    if ((rc == 0) != (rt_utf8_valid(s, len) == len) || (rc == 0 && n != len))
        abort();
    for (size_t i = 0; rc == 0 && i < n; i++)
        if (ids[i] != (unsigned char)s[i])
            abort();
    free(ids);
}

static void check_stream(const char *s, size_t len)
{
    struct rt_utf8 u = {{0}, 0};
    char *out = malloc(3 * (len + 4) + 3);
    size_t n = rt_utf8_push(&u, s, len, out);

    n += rt_utf8_flush(&u, out + n);
    if (n > 3 * (len + 4) || rt_utf8_valid(out, n) != n)
        abort();
    if (rt_utf8_valid(s, len) == len) {
        char *nfc, *again;
        size_t n_nfc, n_again;

        if (n != len || rt_utf8_nfc(s, len, &nfc, &n_nfc) ||
            rt_utf8_nfc(nfc, n_nfc, &again, &n_again))
            abort();
        if (n_again != n_nfc || memcmp(again, nfc, n_nfc))
            abort();
        if (again != nfc)
            free(again);
        if (nfc != s)
            free(nfc);
    }
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct rt_tokenizer *t;
    struct mk_err err;

    if (!sound)
        set_up();
    check_text((const char *)data, size);
    check_stream((const char *)data, size);
    write_input(data, size);
    if (rt_tokenizer_open(folder, 300, &t, &err)) {
        if (err.code == 0 || !err.text[0])
            abort();
        return 0;
    }
    encode(t, 300, text, sizeof text - 1, 0);
    encode(t, 300, text, sizeof text - 1, MK_SPECIAL | RT_ADD_BOS);
    encode(t, 300, (const char *)data, size, MK_SPECIAL);
    rt_tokenizer_free(t);
    return 0;
}

FUZZ_MAIN(seeds, words, NULL)
