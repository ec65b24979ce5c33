/* bandwidth.h - how fast this GPU reads its memory. */
#ifndef RT_BANDWIDTH_H
#define RT_BANDWIDTH_H
#include "runtime/device.h"

/* Measure it: the best of several ways of reading up to 8 GiB, each the median of 5
   launches; *GBPS in 1e9 bytes per second, METHOD names the winner.  Takes 3/4 of the
   free memory when that is less; METHOD says so below 4 GiB.  Every way adds up what it reads, and
   a sum that is not that of the data is an error.
   Returns 0, MK_ENOMEM, MK_EDEVICE, MK_ETOOL (no NVRTC: the kernels are compiled here),
   MK_ECOMPILE, MK_EUNSUPPORTED. */
int rt_bandwidth(struct rt_device *d, double *gbps, char method[128], struct mk_err *err);
#endif
