/* pool.c - see pool.h. */
#define _GNU_SOURCE                     /* sched_getaffinity */
#include "runtime/pool.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#define SPIN 2000                       /* looks for a job before a thread sleeps, some 0.1 ms */
#define SMALL 32768                     /* multiplications not worth waking a thread for */

struct worker {
    struct rt_pool *pool;
    int number;
};

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void work(struct rt_pool *p, int worker)
{
    size_t begin;

    while ((begin = atomic_fetch_add(&p->next, p->grain)) < p->items)
        p->fn(p->arg, worker, begin,
              p->items - begin < p->grain ? p->items : begin + p->grain);
}

static void *run_thread(void *arg)
{
    struct worker w = *(struct worker *)arg;
    struct rt_pool *p = w.pool;
    unsigned seen = 0;

    free(arg);
    for (;;) {
        for (int i = 0; i < SPIN && atomic_load(&p->epoch) == seen; i++)
            relax();
        pthread_mutex_lock(&p->lock);
        while (atomic_load(&p->epoch) == seen)
            pthread_cond_wait(&p->go, &p->lock);
        pthread_mutex_unlock(&p->lock);
        seen++;
        if (!p->fn)
            return NULL;
        work(p, w.number);
        if (atomic_fetch_sub(&p->left, 1) == 1) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->lock);
        }
    }
}

static void start(struct rt_pool *p, rt_job_fn *fn, void *arg, size_t items, size_t grain)
{
    p->fn = fn;
    p->arg = arg;
    p->items = items;
    p->grain = grain;
    atomic_store(&p->next, 0);
    atomic_store(&p->left, p->n - 1);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->epoch, 1);
    pthread_cond_broadcast(&p->go);
    pthread_mutex_unlock(&p->lock);
}

void rt_pool_run(struct rt_pool *p, rt_job_fn *fn, void *arg, size_t items, size_t grain, double cost)
{
    if (p->n == 1 || items <= grain || cost < SMALL) {
        fn(arg, 0, 0, items);
        return;
    }
    start(p, fn, arg, items, grain);
    work(p, 0);
    for (int i = 0; i < SPIN && atomic_load(&p->left); i++)
        relax();
    pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->left))
        pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static int cpus(void)
{
#ifdef __linux__
    cpu_set_t set;

    if (!sched_getaffinity(0, sizeof set, &set))
        return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

void rt_pool_make(struct rt_pool *p, int threads)
{
    sigset_t all, old;

    if (threads <= 0)
        threads = cpus();
    threads = threads < 1 ? 1 : threads > RT_POOL_THREADS ? RT_POOL_THREADS : threads;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->go, NULL);
    pthread_cond_init(&p->done, NULL);
    sigfillset(&all);                   /* signals are for the application's threads */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (p->n = 1; p->n < threads; p->n++) {
        struct worker *w = malloc(sizeof *w);

        if (!w)
            break;
        *w = (struct worker){p, p->n};
        if (pthread_create(&p->thread[p->n], NULL, run_thread, w)) {
            free(w);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void rt_pool_free(struct rt_pool *p)
{
    start(p, NULL, NULL, 0, 1);
    for (int i = 1; i < p->n; i++)
        pthread_join(p->thread[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->go);
    pthread_cond_destroy(&p->done);
}
