/* tokenfile.h - what a tokenizer is made of; shared by tokenfile.c, which reads it,
   tokenizer.c, which encodes with it, and chat.c. */
#ifndef RT_TOKENFILE_H
#define RT_TOKENFILE_H
#include "runtime/added.h"
#include "runtime/bpe.h"
#include "runtime/split.h"

enum { RT_MAX_ENDS = 16 };

/* What the post-processor puts before and after a text. */
struct rt_ends {
    int32_t before[RT_MAX_ENDS], after[RT_MAX_ENDS];
    int n_before, n_after;
};

struct rt_tokenizer {
    struct rt_vocab vocab;
    struct rt_added added;
    struct rt_split *split;
    struct rt_ends ends;
    struct rt_unk unk;
    int nfc;                /* normalise text to NFC first */
    int ignore_merges;      /* a piece that is a token is not merged */
    char *chat_template;    /* tokenizer_config.json chat_template, or NULL */
};

#endif
