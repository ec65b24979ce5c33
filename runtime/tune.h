/* tune.h - plans of one model on one device are compiled, timed and checked, each in a process of
   its own: a kernel that hangs, or a device that is lost, ends that process and no other.  The
   caller's process never opens the device, and must have one thread.  For mktune. */
#ifndef RT_TUNE_H
#define RT_TUNE_H
#include "gen/gen.h"
#include "runtime/bench.h"

enum { RT_TUNE_POSITIONS = 8, RT_TUNE_PLANS = 32 };

struct rt_tune_options {
    const char *where;          /* the model, as for rt_bench_open */
    int context;
    int pos[RT_TUNE_POSITIONS]; /* where decode is timed */
    int n_pos;
    int tokens, runs;           /* of a timed run; timed runs */
    int drop_percent;           /* give up a plan whose first runs are this much slower than the best's */
    struct rt_bench_options bench; /* its plan choices and progress are not looked at */
    void (*tick)(void *user);   /* called about every 100 ms while a process works, or NULL */
    void *user;
};

struct rt_tune;

/* Memory for the processes to share: M is the model WHERE.  OPTIONS is copied.
   Returns 0, MK_EINVAL (numbers out of range), MK_ENOMEM. */
int rt_tune_open(const struct rt_tune_options *options, const struct gen_model *m,
                 struct rt_tune **out, struct mk_err *err);
void rt_tune_close(struct rt_tune *t);

struct rt_tune_device {
    struct gen_gpu gpu;         /* as the plan wants it */
    char name[128];             /* "NVIDIA H200" */
    int driver;                 /* 13000 for CUDA 13.0 */
};

/* Ask the device, and see if there are weights.  Returns 0 or as rt_bench_weights and rt_device_open. */
int rt_tune_ask(struct rt_tune *t, struct rt_tune_device *out, struct mk_err *err);

/* Bring the kernels of N <= RT_TUNE_PLANS plans into the cache, JOBS at a time, until DEADLINE
   (seconds of rt_tune_now).  What fails is compiled again, and reported, by rt_tune_run. */
void rt_tune_compile(struct rt_tune *t, const struct gen_plan *const *plans, int n, int jobs,
                     double deadline);

enum rt_tune_end {
    RT_TUNE_RIGHT,              /* timed, and the output is right */
    RT_TUNE_SLOW,               /* given up: the first two runs at a position were too slow */
    RT_TUNE_WRONG,              /* the output is not the default plan's, or not the C reference's */
    RT_TUNE_FAILED,             /* no kernel, or it stopped (the watchdog), or the process died */
    RT_TUNE_LATE                /* ended at the deadline */
};

struct rt_tune_result {
    enum rt_tune_end end;
    double ms[RT_TUNE_POSITIONS];       /* a token: median of the runs; a short run when SLOW; else 0 */
    double noise;               /* half the distance of the runs' quartiles over the median; largest */
    double seconds;             /* all of it */
    char text[1024];            /* if not RIGHT, why: one sentence */
};

enum rt_tune_check {
    RT_TUNE_AS_REFERENCE,       /* against the C reference; what it makes is what others are compared with */
    RT_TUNE_AS_OTHERS,          /* against the output of the run AS_REFERENCE */
    RT_TUNE_AS_BOTH
};

/* Time and check the plan with choices SET (as in mk_options, over the plan's own), until DEADLINE.
   BEST: give up where the better of two runs takes drop_percent longer than this one took; or NULL.
   Returns 0 with *OUT filled, MK_ENOMEM or MK_EIO (no process could be made). */
int rt_tune_run(struct rt_tune *t, const char *const *set, enum rt_tune_check check,
                const struct rt_tune_result *best, double deadline, struct rt_tune_result *out,
                struct mk_err *err);

/* Seconds, monotonic. */
double rt_tune_now(void);
#endif
