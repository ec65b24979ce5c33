/* matrix.h - what the matrix instructions of a GPU do, without a GPU: pure functions, no state.
   Sections are those of the PTX ISA manual, version 9.2. */
#ifndef HOST_MATRIX_H
#define HOST_MATRIX_H
#include <stddef.h>
#include <stdint.h>

/* fp16 (BF16 0) and bf16 (1), from bits and to bits as cvt.rn (9.7.9.21) does: to nearest even,
   subnormals kept, too large becomes infinite, NaN becomes 7fff. */
float host_to_float(int bf16, uint16_t x);
uint16_t host_from_float(int bf16, float x);

/* ldmatrix.sync.aligned.m8n8.x4{.trans}.shared.b16 (9.7.14.5.15): ROWS[i] is what lies at lane
   i's address, OUT[lane] the registers. */
void host_ldmatrix(uint32_t out[32][4], const uint16_t rows[32][8], int transposed);

/* mma.sync.aligned.m16n8kK.row.col.f32 (9.7.14.5.14), K 8 or 16: c += a b.  With K = 8 the
   fragments are a[lane][0..1] and b[lane][0]; the rest is read and does not matter.  Products are
   exact, their sum is a double, and c is rounded once; a NaN is 7fffffff. */
void host_mma(int k, int bf16, float c[32][4], const uint32_t a[32][4], const uint32_t b[32][2]);

enum host_wgmma_result {
    HOST_WGMMA_DONE,
    HOST_WGMMA_N,               /* not a multiple of 8 in 8..256 */
    HOST_WGMMA_DESCRIPTOR,      /* reserved bits, or a base offset (of a pattern that does not
                                   begin at a multiple of its size), which this does not know */
    HOST_WGMMA_BOUNDS           /* the matrix does not lie in shared memory */
};

/* wgmma.mma_async.sync.aligned.m64nNk16.f32 (9.7.15.5.2): d += a b, both in shared memory where
   the descriptors A and B say; all swizzles.  D[t] has the N / 2 registers of thread t of the
   warpgroup.  TRANS_A, TRANS_B: the instruction's immediates (0: along k, 1: along m or n).
   SHARED[0..SIZE-1] is the shared window from address 0.  Unless it is done, D is as it was. */
enum host_wgmma_result host_wgmma(int n, int bf16, int trans_a, int trans_b, float *const d[128],
                                  uint64_t a, uint64_t b, const unsigned char *shared, size_t size);
#endif
