/* A pool of threads behind the interface of ring.h, where io_uring is missing or forbidden. */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#define THREADS_MAX 64u

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work, progress;
    struct ring_list waiting, ended;
    int stopping, event_fd;
    uint32_t count;
    pthread_t threads[THREADS_MAX];
};

static int64_t attempt(const struct ring_slot *slot)
{
    const struct iovec *iov = slot->iov + slot->iov_first;
    int count = (int)(slot->iov_count - slot->iov_first);
    int64_t result;
    switch (slot->op) {
    case RING_READ:
        result = preadv2(slot->fd, iov, count, (off_t)slot->offset, slot->flags);
        break;
    case RING_WRITE:
        result = pwritev2(slot->fd, iov, count, (off_t)slot->offset, slot->flags);
        break;
    case RING_FSYNC:
        result = slot->flags ? fdatasync(slot->fd) : fsync(slot->fd);
        break;
    default:
        result = fallocate(slot->fd, slot->flags, (off_t)slot->offset, (off_t)slot->length);
    }
    return result < 0 ? -errno : result;
}

static void *serve(void *argument)
{
    struct pool *pool = argument;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        struct ring_slot *slot = ring_pop(&pool->waiting);
        if (!slot) {
            if (pool->stopping)
                break;
            pthread_cond_wait(&pool->work, &pool->lock);
            continue;
        }
        pthread_mutex_unlock(&pool->lock);
        while (!ring_attempt_ended(slot, attempt(slot)))
            ;
        pthread_mutex_lock(&pool->lock);
        ring_push(&pool->ended, slot);
        pthread_cond_signal(&pool->progress);
        if (pool->ended.count == 1) {
            uint64_t one = 1;
            ssize_t ignored = write(pool->event_fd, &one, sizeof one);
            (void)ignored;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void pool_stop(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stopping = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->count; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->progress);
    free(pool);
}

static int threads_open(struct native_ring *ring, uint32_t threads)
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return ENOMEM;
    pool->event_fd = ring->event_fd;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->progress, NULL);
    sigset_t all, old;
    sigfillset(&all); /* signals belong to Python's thread */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = 0;
    while (!error && pool->count < threads && pool->count < THREADS_MAX) {
        error = pthread_create(&pool->threads[pool->count], NULL, serve, pool);
        pool->count += !error;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!pool->count) {
        pool_stop(pool);
        return error ? error : EINVAL;
    }
    ring->state = pool;
    return 0;
}

static void threads_submit(struct native_ring *ring)
{
    struct pool *pool = ring->state;
    struct ring_slot *slot;
    pthread_mutex_lock(&pool->lock);
    while ((slot = ring_pop(&ring->queued))) {
        ring_push(&pool->waiting, slot);
        pthread_cond_signal(&pool->work);
    }
    pthread_mutex_unlock(&pool->lock);
}

static void threads_collect(struct native_ring *ring, int wait)
{
    struct pool *pool = ring->state;
    struct ring_slot *slot;
    pthread_mutex_lock(&pool->lock);
    while (wait && !pool->ended.count)
        pthread_cond_wait(&pool->progress, &pool->lock);
    while ((slot = ring_pop(&pool->ended)))
        ring_push(&ring->ended, slot);
    pthread_mutex_unlock(&pool->lock);
}

static void threads_close(struct native_ring *ring)
{
    pool_stop(ring->state);
}

const struct ring_engine ring_threads = {threads_open, threads_submit, threads_collect,
                                         threads_close};
