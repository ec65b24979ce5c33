/* cxx.h - the source of an emulated kernel -> a shared object, by the system's C++ compiler. */
#ifndef RT_CXX_H
#define RT_CXX_H
#include <stddef.h>
#include "gen/err.h"

/* The compiler and its options, one string with blanks between the words; part of the cache
   key.  The compiler is $MK_HOST_CXX, else the first of c++, g++ and clang++ that PATH has (c++
   when it has none); $MK_HOST_CXXFLAGS stands at the end.  When this process has the run-time
   library of a sanitizer, the kernel gets that sanitizer too.  The caller frees; NULL: no
   memory. */
char *rt_cxx_options(void);

/* The first line that the compiler of OPTIONS prints about its version, in VERSION.
   Returns 0, MK_ETOOL (says how to get a compiler), MK_ENOMEM, MK_EIO. */
int rt_cxx_version(const char *options, char *version, size_t size, struct mk_err *err);

/* Compile SRC.  NAME is the path at which a debugger will find SRC; its last part stands in
   messages.  Nothing is left on the disk.
   bytes, size  malloc'd, on success
   Returns 0, MK_ECOMPILE (err->text starts with the last part of NAME and holds what the
   compiler said, from the first error on), MK_ETOOL, MK_EIO, MK_ENOMEM. */
int rt_cxx_compile(const char *src, const char *name, const char *options, unsigned char **bytes,
                   size_t *size, struct mk_err *err);

/* ---- For tests: faults in the kernel --------------------------------------- */

enum { RT_PLANT_EDITS = 4 };

struct rt_plant {
    const char *name;       /* [A-Za-z0-9_-]; stands in the options, and so in the cache key,
                               beside a hash of the edits */
    struct {
        const char *old;    /* text of the kernel; NULL: no more edits */
        const char *new;    /* what stands in its place */
        int count;          /* how often OLD is there */
    } edit[RT_PLANT_EDITS];
};

/* Kernels that are made from now on have the fault PLANT, which must stay; NULL: none.  Not while
   a kernel is made. */
void rt_cxx_plant(const struct rt_plant *plant);

/* Put the fault, if there is one, into *SRC (malloc'd, and exchanged for another).
   Returns 0, MK_ECOMPILE (its text is not in the kernel as often as it says), MK_ENOMEM. */
int rt_cxx_fault(char **src, struct mk_err *err);
#endif
