/* pool.h - threads that share out the items of one job at a time.  For cpu.c. */
#ifndef RT_POOL_H
#define RT_POOL_H
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

enum { RT_POOL_THREADS = 256 };         /* at most */

/* Do items BEGIN .. END-1 of a job; WORKER is 0 .. threads-1. */
typedef void rt_job_fn(void *arg, int worker, size_t begin, size_t end);

struct rt_pool {
    int n;                              /* threads, the caller's included */
    pthread_t thread[RT_POOL_THREADS];  /* [1 .. n-1] */
    pthread_mutex_t lock;
    pthread_cond_t go, done;
    atomic_uint epoch;                  /* number of the job; a new one starts the workers */
    atomic_int left;                    /* workers that have not finished it */
    atomic_size_t next;                 /* first item that nobody has taken */
    size_t items, grain;
    rt_job_fn *fn;                      /* NULL: end the thread */
    void *arg;
};

/* P is zeros.  Start THREADS threads, the caller's counted; 0: one for each CPU that this process may use.
   One that cannot be made is done without: p->n says how many there are. */
void rt_pool_make(struct rt_pool *p, int threads);
void rt_pool_free(struct rt_pool *p);

/* Do ITEMS items on all threads, GRAIN at a time, and return when all are done; COST is the whole job's
   multiplications.  A small job is done in the caller's thread.  One caller at a time. */
void rt_pool_run(struct rt_pool *p, rt_job_fn *fn, void *arg, size_t items, size_t grain, double cost);
#endif
