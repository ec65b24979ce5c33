/* cache.h - kernels by what they were made from: packs, the cache folder, the compiler.

   An entry is a folder  NAME-sm_90-<16 hex digits of xxh3 over the key>/  (for the emulated
   device NAME-host-sm_90-...)  with
     params.m4    what the templates got                 \
     key          the other inputs, "name = value" lines  } compared byte for byte on a hit
     kernel.cu    the emitted source
     kernel.cubin what NVRTC made of it; for the emulated device a shared object
     provenance   "name = value" lines: the version of nvrtc or of the C++ compiler, sizes and
                  xxh3 of both files above, xxh3 of these lines
   Made in a private folder (.tmp-...) beside it, every file fsynced, published by rename.  An
   entry that does not match its own provenance is a miss, and is replaced.  Private
   folders that a killed process left are removed by a store an hour later.  Beside the
   entries lie their empty lock files (.NAME-....lock).
   A pack is a folder of such entries, found the same way, never written to. */
#ifndef RT_CACHE_H
#define RT_CACHE_H
#include <stddef.h>
#include "gen/err.h"

struct rt_key {
    const char *name;        /* model name, [A-Za-z0-9._-] */
    int arch;
    int host;                /* 1: for the emulated device, by the C++ compiler */
    const char *params;      /* the text of params.m4 */
    const char *templates;   /* digest of the templates, hex */
    const char *version;     /* of the generator */
    const char *options;     /* of NVRTC, or of rt_cxx_options */
};

enum { RT_FROM_COMPILER = 1, RT_FROM_CACHE = 2, RT_FROM_PACK = 3 };

struct rt_kernel {
    unsigned char *cubin;
    size_t size;
    int from;                /* RT_FROM_... */
    char path[4096];         /* the entry's folder, or "" when it could not be stored */
};

/* Return the kernel for KEY: from a pack of PACKS (folders, ':' between; NULL: none), else
   from the cache ($MK_CACHE_DIR, $XDG_CACHE_HOME/mk, ~/.cache/mk; made 0700; refused when it
   belongs to someone else or others can write to it), else emitted (gen_emit) and compiled
   and stored.  Many processes may come at once: one compiles, under a lock file, the others
   wait for it and find the entry (a lock whose holder died is released by the kernel).
   A store that fails, or an unusable cache folder, is a warning: the kernel in memory is
   still good.  MK_ECOMPILE: the source is kept in the cache folder as failed-<hash>.cu and
   err->text names it.  A pack's options need not equal ours (key.options).
   progress  called as "compile" about every 100 ms with a growing guess of the fraction, at
             most 0.99, while the compiler runs (in a thread of its own) or another process
             compiles, and with 1 when it is done; or NULL
   Returns 0, MK_ECOMPILE, MK_ETOOL, MK_EUNSUPPORTED, MK_EIO, MK_ENOMEM, MK_EINVAL (a key with a
   name or a line that cannot stand in a file). */
int rt_kernel_get(const struct rt_key *key, const char *packs,
                  mk_progress_fn *progress, mk_warn_fn *warn, void *user,
                  struct rt_kernel **out, struct mk_err *err);
void rt_kernel_free(struct rt_kernel *k);

/* Write the kernel for KEY as an entry of the pack folder DIR (made if absent), from the
   cache or by compiling it.  The folder can be read by every user.
   Returns 0 or as rt_kernel_get; MK_EIO: DIR cannot be written. */
int rt_pack_write(const struct rt_key *key, const char *dir, mk_progress_fn *progress,
                  void *user, struct mk_err *err);
#endif
