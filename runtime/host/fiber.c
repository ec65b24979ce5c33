/* fiber.c - stacks and switches, by Boost.Context; sanitizers are told of every one. */
#include "runtime/host/machine.h"

#include <stdlib.h>
#include <sys/mman.h>

extern void *make_fcontext(void *top, size_t size, void (*run)(struct transfer));

enum { STACK = 64 << 10, SANITIZED_STACK = 256 << 10, GUARD = 4096 };
enum { PAGE = 4096, COLOUR = 9 * CACHE_LINE }; /* as far from each other lanes begin that work side by side */

/* Stacks that no fiber has: a launch of another shape takes them, pages and all.  The link lies at the top.
   ThreadSanitizer would take what the last fiber left there for a race. */
struct spare {
    struct spare *next;
    char *stack;
};
static struct spare *spares;

static struct spare *top_of(const struct fiber *f)
{
    return (struct spare *) (void *) (f->stack + f->stack_bytes - sizeof(struct spare));
}

static int map_stack(struct fiber *f)
{
    f->stack = mmap(NULL, f->stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                    -1, 0);
    if (f->stack == MAP_FAILED) {
        f->stack = NULL;
        return -1;
    }
    mprotect(f->stack, GUARD, PROT_NONE);
    return 0;
}

int fiber_make(struct fiber *f)
{
    static unsigned made;

    f->stack_bytes = __tsan_create_fiber || __asan_region_is_poisoned ? SANITIZED_STACK : STACK;
    if (spares) {
        f->stack = spares->stack;
        spares = spares->next;
    } else if (map_stack(f)) {
        return -1;
    }
    f->colour = f->stack_bytes == STACK ? made++ * COLOUR % PAGE : 0; /* sanitizers are slow anyway */
    f->tsan = __tsan_create_fiber ? __tsan_create_fiber(0) : NULL;
    f->fake_stack = NULL;
    return 0;
}

void fiber_free(struct fiber *f)
{
    if (f->stack) {
        if (f->tsan)
            __tsan_destroy_fiber(f->tsan);
        if (__asan_unpoison_memory_region)
            __asan_unpoison_memory_region(f->stack + GUARD, f->stack_bytes - GUARD);
        if (__tsan_create_fiber) {
            munmap(f->stack, f->stack_bytes);
        } else {
            *top_of(f) = (struct spare) {spares, f->stack};
            spares = top_of(f);
        }
    }
    f->stack = NULL;
    f->tsan = NULL;
}

static struct fiber *running; /* the one that came from jump_fcontext last */
static void (*run_next)(void);

/* Where every switch arrives: the fiber that stopped keeps its place. */
static void arrived(struct transfer t)
{
    const void *bottom;
    size_t size;
    struct fiber *before = t.data;

    before->context = t.context;
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(running->fake_stack, &bottom, &size);
        if (!before->stack_bytes) { /* the host's own stack: known from here on */
            before->stack = (char *) bottom;
            before->stack_bytes = size;
        }
    }
}

static void first_run(struct transfer t)
{
    arrived(t);
    run_next();
    abort(); /* a lane leaves by switching away */
}

void fiber_start(struct fiber *f, void (*run)(void))
{
    run_next = run;
    if (__asan_unpoison_memory_region) /* what the last launch left */
        __asan_unpoison_memory_region(f->stack + GUARD, f->stack_bytes - GUARD);
    f->fake_stack = NULL;
    f->context = make_fcontext(f->stack + f->stack_bytes - f->colour, f->stack_bytes - f->colour - GUARD, first_run);
}

void fiber_switch_watched(struct fiber *from, struct fiber *to, int leave)
{
    if (!from->tsan && __tsan_get_current_fiber)
        from->tsan = __tsan_get_current_fiber();
    running = to;
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(leave ? NULL : &from->fake_stack, to->stack, to->stack_bytes);
    if (__tsan_switch_to_fiber)
        __tsan_switch_to_fiber(to->tsan, 1); /* 1: the switch orders nothing */
    arrived(jump_fcontext(to->context, from));
}
