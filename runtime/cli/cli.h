/* cli.h - what mkgen, mkrun and mkbench share: the only code that prints or exits.

   Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (by the signal itself
   where nothing is left to say). */
#ifndef CLI_H
#define CLI_H
#include <getopt.h>
#include <stddef.h>
#include <stdint.h>
#include "runtime/mk.h"

enum { CLI_OK = 0, CLI_FAILED = 1, CLI_USAGE = 2, CLI_INTERRUPTED = 130 };

/* First call of main: messages start with NAME, whatever the file is called. */
void cli_start(const char *name, int argc, char **argv);

/* Print "NAME: TEXT" on stderr.  Each returns the exit status that fits. */
int cli_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int cli_usage(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int cli_error(const struct mk_err *err);
void cli_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* What getopt_long's '?' means: it has printed its message; adds the pointer to --help. */
int cli_bad_option(void);
int cli_version(void);
/* Last call of main: STATUS, or 1 when stdout could not be written. */
int cli_end(int status);

/* Numbers of options.  0, or CLI_USAGE after printing what is wrong with OPTION. */
int cli_int(const char *option, const char *text, int lo, int hi, int *out);
int cli_u64(const char *option, const char *text, uint64_t *out);
int cli_float(const char *option, const char *text, double lo, double hi, float *out);
/* "1,200,1024": up to CAP integers in lo..hi; "none": no number. */
int cli_int_list(const char *option, const char *text, int lo, int hi, int *out, int cap, int *n);

/* A list of strings of repeated options, NULL at the end.  Zero-initialise. */
struct cli_list { const char **item; int n; };
/* 0, or CLI_FAILED after printing. */
int cli_list_add(struct cli_list *list, const char *item);

/* mk_progress_fn and mk_warn_fn; USER is not used.  Progress is shown on stderr when that
   is a terminal and the work takes over a second. */
void cli_progress(void *user, const char *what, double fraction);
void cli_warn(void *user, const char *text);
/* Remove a progress line, if there is one. */
void cli_progress_clear(void);

/* Read the whole file PATH, or stdin for "-".  TEXT is zero terminated; free it.
   0, or CLI_FAILED after printing. */
int cli_read(const char *path, char **text, size_t *size);

/* Writing a file that is complete or not there: data goes to a temporary file beside PATH,
   which cli_file_done renames and a signal removes.  "-" is stdout, and what is no regular
   file (/dev/null, a pipe) is written directly.  One at a time.
   0, or CLI_FAILED after printing; done and drop are to be called once after a good open. */
struct cli_file { void *stream; char *path; char *temp; };
int cli_file_open(struct cli_file *f, const char *path);
int cli_file_write(struct cli_file *f, const void *data, size_t size);
int cli_file_done(struct cli_file *f);
void cli_file_drop(struct cli_file *f);
/* All of it in one call. */
int cli_file_put(const char *path, const void *data, size_t size);

double cli_now(void);                       /* seconds, monotonic */
/* "1.19 GB", "66.2 KB" (units of 1000) in BUF; returns BUF. */
const char *cli_size(int64_t bytes, char buf[16]);
#endif
