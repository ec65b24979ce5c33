/* nvrtc.h - CUDA source -> cubin.  libnvrtc is opened at run time. */
#ifndef RT_NVRTC_H
#define RT_NVRTC_H
#include <stddef.h>
#include "gen/err.h"

/* Looked for, in order: $MK_NVRTC (a library file or a folder; when it is set, nothing else),
   the loader's path (libnvrtc.so, .so.13, .so.12), $CUDA_HOME, /usr/local/cuda, the folder
   configured with --with-nvrtc (macro NVRTC_DIR), .nvrtc in the folder of libmk.so or of the
   program that holds libmk and in the four folders above it, $XDG_DATA_HOME/mkgen/nvrtc,
   ~/.local/share/mkgen/nvrtc.  In each folder the library may lie at the top, in lib64, in
   lib, or in nvidia/cu13/lib or nvidia/cuda_nvrtc/lib (pip install --target).  The last
   three places must belong to the user or root and not be writable by everybody.
   Returns 0, MK_ETOOL (says where it looked and how to get it).
   VERSION: "13.0", static storage, or NULL if not wanted. */
int rt_nvrtc_open(const char **version, struct mk_err *err);

/* 1 if the library at hand can compile for ARCH (90 means sm_90a), else 0. */
int rt_nvrtc_knows(int arch);

/* The options of a compilation, one string, the same for the same input:
   "--gpu-architecture=sm_90a --std=c++17 ..." with $MK_NVRTC_FLAGS at the end; part of the
   cache key.  The caller frees. */
char *rt_nvrtc_options(int arch);

/* Compile SRC; NAME (a path, kernel.cu) stands in messages.  OPTIONS as above.
   cubin, size  malloc'd, on success
   log          malloc'd compiler output with ptxas's account of registers and spills, also on
                success; *log is NULL when nothing was compiled; NULL: not wanted
   Returns 0, MK_ECOMPILE (err->text starts with NAME and holds the log from its
   first error on),
   MK_EUNSUPPORTED (this NVRTC does not know ARCH), MK_ETOOL, MK_ENOMEM. */
int rt_nvrtc_compile(const char *src, const char *name, int arch, const char *options,
                     unsigned char **cubin, size_t *size, char **log, struct mk_err *err);
#endif
