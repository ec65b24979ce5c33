/* gpu.h - what the plan needs to know about a GPU; never asks a device. */
#ifndef GEN_GPU_H
#define GEN_GPU_H
#include "gen/err.h"

struct gen_gpu {
    char name[32];          /* profile name, [A-Za-z0-9._-] */
    int arch;               /* compute capability * 10: 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121 */
    int sms;                /* multiprocessors */
    int smem_block;         /* shared memory a block may opt in to, bytes */
    int smem_sm;            /* shared memory of an SM, bytes */
    int64_t l2_bytes;
    int clock_mhz;          /* SM boost clock */
    int mem_gbps;           /* memory bandwidth of the data sheet, GB/s (1e9) */
    int64_t mem_bytes;      /* device memory; 0: unknown */
    int clusters[5];        /* clusters of 1, 2, 4, 8, 16 CTAs that fit at once with full shared memory; 0: none */
    int host;               /* 1: emulated on the CPU by libmkhost; never in a profile or a file */
};

/* Profile NAME ("h200"), or a file of "key = value" lines as printed by gen_gpu_print.
   Returns 0, MK_ENOENT (lists the known names), MK_EIO, MK_EFORMAT (names file, line and key). */
int gen_gpu_read(const char *where, struct gen_gpu *out, struct mk_err *err);
/* The default profile of an architecture (90 -> h200).  Returns 0 or MK_EUNSUPPORTED. */
int gen_gpu_default(int arch, struct gen_gpu *out, struct mk_err *err);
/* The emulated GPU of an architecture, "host-sm_90": its default profile with 16 SMs.
   Returns 0 or MK_EUNSUPPORTED. */
int gen_gpu_host(int arch, struct gen_gpu *out);
/* "sm_90", "sm_90a" or "90" -> 90.  Returns 0 or MK_EUNSUPPORTED (lists what we know). */
int gen_gpu_arch(const char *text, int *arch, struct mk_err *err);
const char *gen_gpu_profile(int i);            /* names, NULL past the end */
const int *gen_gpu_archs(void);                /* known architectures, 0 at the end */
/* Part I of the product that G is: parts have equal SMs, but different ones in their GPCs, and so hold
   different numbers of clusters.  *OUT is G with the counts of part I, the most first; the last one
   has no clusters.  Returns 0, or -1 past the end.
   A GPC of sm_90 has 18 SMs, some switched off in pairs (H100 white paper: 8 GPCs of 9 TPCs), and a
   cluster lies in one GPC.  132 SMs are 12 fewer than 8 GPCs have: at worst three GPCs have 14, one
   cluster of 8 instead of two, so parts hold 16 to 13 (15 were measured on one H200), of
   4 32 to 29, of 16 8 to 5, of 2 66, also when G does not know its own.  Of other architectures' GPCs we know nothing: there is G itself,
   and one without clusters. */
int gen_gpu_part(const struct gen_gpu *g, int i, struct gen_gpu *out);
/* Print as a file that gen_gpu_read takes back.  The caller frees the string; NULL: no memory. */
char *gen_gpu_print(const struct gen_gpu *g);
#endif
