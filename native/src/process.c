#define _GNU_SOURCE
#include "process.h"

#include <errno.h>
#include <malloc.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

int native_set_io_flusher(int on)
{
    return prctl(PR_SET_IO_FLUSHER, on ? 1UL : 0UL, 0UL, 0UL, 0UL) ? errno : 0;
}

int native_lock_memory(void)
{
    return mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) ? errno : 0;
}

/* Larger blocks than MMAP_MIN_BYTES come from the kernel and go back to it. */
#define MMAP_MIN_BYTES (32 << 20)

int native_keep_memory(int bytes)
{
    return mallopt(M_MMAP_THRESHOLD, MMAP_MIN_BYTES) && mallopt(M_TRIM_THRESHOLD, bytes) ? 0
                                                                                         : EINVAL;
}

int native_parent_death_signal(int signal)
{
    return prctl(PR_SET_PDEATHSIG, (unsigned long)signal, 0UL, 0UL, 0UL) ? errno : 0;
}
