/* See ring.h. */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

int ring_attempt_ended(struct ring_slot *slot, int64_t result)
{
    if (result == -EAGAIN || result == -EINTR)
        return 0;
    if (slot->op != RING_READ && slot->op != RING_WRITE) {
        slot->result = result;
        return 1;
    }
    if (result > 0)
        slot->done += (uint64_t)result;
    if (result < 0 || result == 0 || slot->done >= slot->length) {
        slot->result = result < 0 ? result : (int64_t)slot->done;
        return 1;
    }
    uint64_t rest = (uint64_t)result; /* short: go on behind what was moved */
    if (slot->offset != RING_STREAM)
        slot->offset += rest;
    while (rest >= slot->iov[slot->iov_first].iov_len)
        rest -= slot->iov[slot->iov_first++].iov_len;
    struct iovec *iov = &slot->iov[slot->iov_first];
    iov->iov_base = (char *)iov->iov_base + rest;
    iov->iov_len -= rest;
    return 0;
}

static int start(struct native_ring *ring, int engine, uint32_t threads)
{
    int error = ENOSYS;
    if (engine == RING_AUTO || engine == RING_URING) {
        ring->engine = &ring_uring;
        ring->kind = RING_URING;
        error = ring->engine->open(ring, threads);
    }
    if (error && engine != RING_URING) {
        ring->engine = &ring_threads;
        ring->kind = RING_THREADS;
        error = ring->engine->open(ring, threads);
    }
    return error;
}

static void release(struct native_ring *ring)
{
    for (uint32_t i = 0; ring->slots && i < ring->depth; i++)
        free(ring->slots[i].iov);
    free(ring->slots);
    if (ring->event_fd >= 0)
        close(ring->event_fd);
    free(ring);
}

struct native_ring *native_ring_open(uint32_t depth, int engine, uint32_t threads, int *error)
{
    struct native_ring *ring = calloc(1, sizeof *ring);
    *error = ENOMEM;
    if (!ring)
        return NULL;
    ring->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ring->depth = depth;
    ring->slots = calloc(depth, sizeof *ring->slots);
    if (ring->event_fd < 0 || !ring->slots) {
        release(ring);
        return NULL;
    }
    for (uint32_t i = 0; i < depth; i++)
        ring_push(&ring->free, &ring->slots[i]);
    *error = start(ring, engine, threads);
    if (*error) {
        release(ring);
        return NULL;
    }
    return ring;
}

void native_ring_close(struct native_ring *ring)
{
    while (ring->in_flight > ring->ended.count)
        ring->engine->collect(ring, 1);
    ring->engine->close(ring);
    release(ring);
}

int native_ring_kind(struct native_ring *ring)
{
    return ring->kind;
}

int native_ring_event_fd(struct native_ring *ring)
{
    return ring->event_fd;
}

uint32_t native_ring_in_flight(struct native_ring *ring)
{
    return ring->in_flight + ring->queued.count;
}

static int reserve(struct ring_slot *slot, size_t count)
{
    if (count <= slot->iov_capacity)
        return 0;
    struct iovec *larger = realloc(slot->iov, count * sizeof *larger);
    if (!larger)
        return ENOMEM;
    slot->iov = larger;
    slot->iov_capacity = (uint32_t)count;
    return 0;
}

int native_ring_add(struct native_ring *ring, int op, uint64_t tag, int fd, uint64_t offset,
                    void *const *buffers, const size_t *lengths, size_t count, int flags)
{
    struct ring_slot *slot = ring->free.first;
    if (!slot)
        return EBUSY;
    if (count > RING_IOV_MAX)
        return EINVAL;
    int error = reserve(slot, count);
    if (error)
        return error;
    uint64_t length = 0;
    for (size_t i = 0; i < count; i++) {
        slot->iov[i] = (struct iovec){buffers[i], lengths[i]};
        length += lengths[i];
    }
    ring_pop(&ring->free);
    slot->tag = tag;
    slot->op = op;
    slot->fd = fd;
    slot->flags = flags;
    slot->offset = offset;
    slot->length = length;
    slot->iov_count = (uint32_t)count;
    slot->iov_first = 0;
    slot->done = 0;
    ring_push(&ring->queued, slot);
    return 0;
}

int native_ring_add_one(struct native_ring *ring, int op, uint64_t tag, int fd, uint64_t offset,
                        void *buffer, uint64_t length, int flags)
{
    struct ring_slot *slot = ring->free.first;
    size_t size = (size_t)length;
    int error = native_ring_add(ring, op, tag, fd, offset, &buffer, &size, buffer ? 1 : 0, flags);
    if (!error)
        slot->length = length;
    return error;
}

uint32_t native_ring_submit(struct native_ring *ring)
{
    uint32_t count = ring->queued.count;
    if (count) {
        ring->in_flight += count;
        ring->engine->submit(ring);
    }
    return count;
}

uint32_t native_ring_reap(struct native_ring *ring, uint64_t *tags, int64_t *results, uint32_t max)
{
    uint64_t counter;
    ssize_t ignored = read(ring->event_fd, &counter, sizeof counter);
    (void)ignored;
    ring->engine->collect(ring, 0);
    uint32_t count = 0;
    struct ring_slot *slot;
    for (; count < max && (slot = ring_pop(&ring->ended)); count++) {
        tags[count] = slot->tag;
        results[count] = slot->result;
        ring->in_flight--;
        ring_push(&ring->free, slot);
    }
    if (ring->ended.count) { /* more than the caller takes: stay readable */
        uint64_t one = 1;
        ignored = write(ring->event_fd, &one, sizeof one);
    }
    return count;
}
