/* example.c - a whole application of libmk: continue a text with the model of a folder.

       cc example.c $(pkg-config --cflags --libs mkgen) -o example
       ./example models/demo "The sea was" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <mk.h>

/* Called with each new token; text is never half a character. */
static int print_text(void *user, int32_t token, const char *text, size_t len)
{
    (void) user;
    (void) token;
    return fwrite(text, 1, len, stdout) != len || fflush(stdout) != 0;
}

/* Put the tokens of PROMPT at the end of the context. */
static int append_prompt(struct mk_model *model, struct mk_context *context, const char *prompt,
                         struct mk_err *err)
{
    size_t len = strlen(prompt), cap = len + 8, n;      /* a token has a byte or more */
    int32_t *tokens = malloc(cap * sizeof(*tokens));
    int rc;

    if (!tokens) {
        snprintf(err->text, sizeof(err->text), "not enough memory for the prompt");
        return err->code = MK_ENOMEM;
    }
    rc = mk_tokenize(model, prompt, len, 0, tokens, cap, &n, err);
    if (rc == 0)
        rc = mk_append(context, tokens, (int) n, err);
    free(tokens);
    return rc;
}

static int continue_text(const char *dir, const char *prompt, struct mk_err *err)
{
    struct mk_sampling sampling = { .size = sizeof(sampling), .top_p = 1, .max_tokens = 40 };
    struct mk_stats stats = { .size = sizeof(stats) };
    static const char *const from[] = { "none: CPU", "compiled", "cache", "pack" };
    struct mk_model *model = NULL;
    struct mk_context *context = NULL;
    int rc;

    rc = mk_open(dir, NULL, &model, err);
    if (rc == 0)
        rc = mk_context_make(model, 0, &context, err);
    if (rc == 0)
        rc = append_prompt(model, context, prompt, err);
    if (rc == 0) {
        fputs(prompt, stdout);
        rc = mk_generate(context, &sampling, print_text, NULL, NULL, err);
        putchar('\n');
    }
    if (rc == 0)
        rc = mk_context_stats(context, &stats, err);
    if (rc == 0)
        fprintf(stderr, "kernel: %s\n", from[stats.kernel_from]);
    mk_context_free(context);
    mk_close(model);
    return rc;
}

int main(int argc, char **argv)
{
    struct mk_err err;

    if (argc != 3) {
        fprintf(stderr, "usage: example MODEL_DIR TEXT\n");
        return 2;
    }
    if (continue_text(argv[1], argv[2], &err)) {
        fprintf(stderr, "example: %s\n", err.text);
        return 1;
    }
    return ferror(stdout) || fflush(stdout);
}
