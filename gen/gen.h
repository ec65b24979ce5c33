/* gen.h - the generator's one door: model x GPU -> plan -> params.m4 -> kernel.cu. */
#ifndef GEN_GEN_H
#define GEN_GEN_H
#include "gen/gpu.h"
#include "gen/model.h"
#include "gen/plan.h"
#include "gen/predict.h"

#define GEN_VERSION PACKAGE_VERSION     /* from config.h */

/* Make the plan for MODEL on GPU with room for CONTEXT tokens (0: the model's maximum or
   4096, whichever is smaller).
   plan_file  "key = value" lines, '#' comments; NULL: none
   set        "key=value" strings, NULL at the end, win over the file; NULL: none
   Returns 0, MK_EINVAL (unknown key, value out of range, or a plan that does not fit: says
   what would), MK_EIO, MK_EFORMAT, MK_ENOMEM. */
int gen_plan_make(const struct gen_model *m, const struct gen_gpu *g, int context,
                  const char *plan_file, const char *const *set,
                  struct gen_plan *out, struct mk_err *err);

/* Plan files that were measured lie beside the carried models: models/NAME/GPU.plan, where GPU is
   the GPU's name without "nvidia-" (gen_plan_file_name: "h200.plan", for the driver's NVIDIA H200 and
   for the profile).  gen_plan_carried looks in every place of carried models for the file of a
   model of M's shape, whatever its name: 1 and its path in OUT, or 0. */
void gen_plan_file_name(const struct gen_gpu *g, char *out, size_t size);
int gen_plan_carried(const struct gen_model *m, const struct gen_gpu *g, char *out, size_t size);

enum { GEN_PATH = 4352, GEN_CHOICES = 80 };
struct gen_plan_source {
    char file[GEN_PATH];         /* the choices are from this file; "": from none */
    char predicted[GEN_CHOICES]; /* or are these of the performance model, "KEY=VALUE KEY=VALUE"; "": the rules' */
    struct mk_err refused;       /* code not 0: a carried file does not fit, and is not used */
};

/* gen_plan_make for a caller who chooses nothing - PLAN_FILE is NULL, SET NULL, empty or timing alone -: with the
   carried plan file; where there is none that fits, with those choices of chunk_bytes, balance and, without clusters,
   group, if any, with which a token at position 1056, or the last one, is predicted to take less time than with the
   rules, by at least 3 % each.
   PLAN_FILE "none": no file, not even a carried one.  For other callers it is gen_plan_make.
   Returns as gen_plan_make; *SOURCE is filled in either case. */
int gen_plan_choose(const struct gen_model *m, const struct gen_gpu *g, int context,
                    const char *plan_file, const char *const *set, struct gen_plan *out,
                    struct gen_plan_source *source, struct mk_err *err);

/* Prove that decode can neither deadlock nor overwrite words of a hop that are still read, and
   that hops, chunks and ring fit; gen_plan_make does it to every plan.
   Returns 0, MK_EINVAL (names hop, stage and CTAs), MK_ENOMEM. */
int gen_plan_check(const struct gen_plan *p, struct mk_err *err);
/* What word WORD of the exchange is and who sends it: "hop O word 17 (rows 46..47), sent by
   CTA 5".  Always ends OUT, of SIZE > 0 bytes, with a 0. */
void gen_hop_describe(const struct gen_plan *p, int word, char *out, size_t size);

/* The text of params.m4 for PLAN: everything that the templates are told.  The caller
   frees; NULL: no memory. */
char *gen_plan_params(const struct gen_plan *p);
/* The plan as a person reads it: every choice, stage, hop and offset, and how long each stage is
   predicted to take (--dump-plan). */
char *gen_plan_dump(const struct gen_plan *p);
/* A few lines: shapes, bytes per token, hops per layer, shared memory, roofline. */
char *gen_plan_summary(const struct gen_plan *p);
/* Plan keys for --list-keys: NAME, its range and what it does; NULL past the end. */
const char *gen_plan_key(int i);

/* Run m4 over the embedded templates with PARAMS; checks the output (ASCII, no macro name
   left over, no tabs, no trailing blanks).  Free *SRC.
   Returns 0, MK_ETOOL (no m4: says how to get it), MK_ECOMPILE (m4 said something, was
   killed, or its output is not clean: names template and line), MK_ENOMEM. */
int gen_emit(const char *params, char **src, struct mk_err *err);

/* Digest of the embedded templates, 16 hex digits; static storage. */
const char *gen_templates_digest(void);
#endif
