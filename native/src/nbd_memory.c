/* Memory of all connections for requests that are longer than their buffers: bounded in total.
 *
 * A connection holds at most one piece, and none while it waits for one, outside of the gate: so
 * nobody waits in a circle, and nobody who waits holds up a revocation. Others may hold theirs for
 * long (their peer does not read); whoever has waited long enough is told ENOMEM.
 */
#define _GNU_SOURCE
#include "nbd.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t freed = PTHREAD_COND_INITIALIZER;
static size_t limit = (size_t)1 << 30, used;
static uint32_t patience_ms = 10000;

void native_nbd_set_memory_max(uint64_t bytes, uint32_t wait_ms)
{
    pthread_mutex_lock(&lock);
    limit = bytes;
    patience_ms = wait_ms;
    pthread_cond_broadcast(&freed);
    pthread_mutex_unlock(&lock);
}

uint64_t native_nbd_memory_used(void)
{
    pthread_mutex_lock(&lock);
    uint64_t bytes = used;
    pthread_mutex_unlock(&lock);
    return bytes;
}

static void give_back(size_t length)
{
    pthread_mutex_lock(&lock);
    used -= length;
    pthread_cond_broadcast(&freed);
    pthread_mutex_unlock(&lock);
}

void nbd_memory_take(struct nbd_memory *memory, size_t length)
{
    struct timespec end;
    int late = 0;
    pthread_mutex_lock(&lock);
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_nsec += (long)(patience_ms % 1000) * 1000000;
    end.tv_sec += patience_ms / 1000 + end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    while (used + length > limit && !late)
        late = pthread_cond_clockwait(&freed, &lock, CLOCK_MONOTONIC, &end);
    int taken = used + length <= limit;
    if (taken)
        used += length;
    pthread_mutex_unlock(&lock);
    if (!taken)
        return;
    if (posix_memalign((void **)&memory->data, NBD_ALIGNMENT_MAX, length))
        memory->data = NULL;
    memory->length = length;
    if (!memory->data)
        give_back(length);
}

void nbd_memory_free(struct nbd_memory *memory)
{
    if (!memory->data)
        return;
    free(memory->data);
    memory->data = NULL;
    give_back(memory->length);
}
