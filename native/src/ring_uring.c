/* io_uring by raw system calls (see ring.h).
 *
 * Every slot has at most one submission entry, and the completion ring is twice as large as the
 * submission ring, so neither overflows.
 */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct uring {
    int fd;
    void *submission_map, *completion_map;
    size_t submission_size, completion_size, entries_size;
    struct io_uring_sqe *entries;
    struct io_uring_cqe *completions;
    uint32_t *submission_tail, *submission_mask, *submission_array;
    uint32_t *completion_head, *completion_tail, *completion_mask;
    uint32_t unsubmitted;
};

static int enter(struct uring *uring, uint32_t submit, uint32_t wait)
{
    unsigned flags = wait ? IORING_ENTER_GETEVENTS : 0;
    long result = syscall(__NR_io_uring_enter, uring->fd, submit, wait, flags, NULL, 0);
    return result < 0 ? -errno : (int)result;
}

static void uring_free(struct uring *uring)
{
    if (uring->submission_map != MAP_FAILED)
        munmap(uring->submission_map, uring->submission_size);
    if (uring->completion_map != MAP_FAILED)
        munmap(uring->completion_map, uring->completion_size);
    if (uring->entries != MAP_FAILED)
        munmap(uring->entries, uring->entries_size);
    close(uring->fd);
    free(uring);
}

static void *map(int fd, size_t size, uint64_t offset)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
}

static int map_rings(struct uring *uring, const struct io_uring_params *params)
{
    uring->submission_size = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
    uring->completion_size =
        params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    uring->entries_size = params->sq_entries * sizeof(struct io_uring_sqe);
    uring->submission_map = map(uring->fd, uring->submission_size, IORING_OFF_SQ_RING);
    uring->completion_map = map(uring->fd, uring->completion_size, IORING_OFF_CQ_RING);
    uring->entries = map(uring->fd, uring->entries_size, IORING_OFF_SQES);
    if (uring->submission_map == MAP_FAILED || uring->completion_map == MAP_FAILED ||
        uring->entries == MAP_FAILED)
        return ENOMEM;
    char *submission = uring->submission_map, *completion = uring->completion_map;
    uring->submission_tail = (uint32_t *)(submission + params->sq_off.tail);
    uring->submission_mask = (uint32_t *)(submission + params->sq_off.ring_mask);
    uring->submission_array = (uint32_t *)(submission + params->sq_off.array);
    uring->completion_head = (uint32_t *)(completion + params->cq_off.head);
    uring->completion_tail = (uint32_t *)(completion + params->cq_off.tail);
    uring->completion_mask = (uint32_t *)(completion + params->cq_off.ring_mask);
    uring->completions = (struct io_uring_cqe *)(completion + params->cq_off.cqes);
    return 0;
}

/* Whether the kernel has all the operations (5.6). */
static int supported(int fd)
{
    static const uint8_t needed[] = {IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC,
                                     IORING_OP_FALLOCATE};
    size_t size = sizeof(struct io_uring_probe) + 256 * sizeof(struct io_uring_probe_op);
    struct io_uring_probe *probe = calloc(1, size);
    int good = probe && !syscall(__NR_io_uring_register, fd, IORING_REGISTER_PROBE, probe, 256);
    for (size_t i = 0; good && i < sizeof needed; i++)
        good = needed[i] <= probe->last_op &&
               probe->ops[needed[i]].flags & IO_URING_OP_SUPPORTED;
    free(probe);
    return good;
}

static int uring_open(struct native_ring *ring, uint32_t threads)
{
    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    struct uring *uring = calloc(1, sizeof *uring);
    if (!uring)
        return ENOMEM;
    uring->submission_map = uring->completion_map = MAP_FAILED;
    uring->entries = MAP_FAILED;
    uring->fd = (int)syscall(__NR_io_uring_setup, ring->depth, &params);
    if (uring->fd < 0) {
        int error = errno;
        free(uring);
        return error;
    }
    int error = supported(uring->fd) ? map_rings(uring, &params) : ENOSYS;
    if (!error && syscall(__NR_io_uring_register, uring->fd, IORING_REGISTER_EVENTFD,
                          &ring->event_fd, 1))
        error = errno;
    if (error)
        uring_free(uring);
    else
        ring->state = uring;
    return error;
}

static void fill(struct io_uring_sqe *entry, const struct ring_slot *slot)
{
    static const uint8_t codes[] = {[RING_READ] = IORING_OP_READV,
                                    [RING_WRITE] = IORING_OP_WRITEV,
                                    [RING_FSYNC] = IORING_OP_FSYNC,
                                    [RING_FALLOCATE] = IORING_OP_FALLOCATE};
    memset(entry, 0, sizeof *entry);
    entry->opcode = codes[slot->op];
    entry->fd = slot->fd;
    entry->user_data = (uint64_t)(uintptr_t)slot;
    switch (slot->op) {
    case RING_FSYNC:
        entry->fsync_flags = slot->flags ? IORING_FSYNC_DATASYNC : 0;
        break;
    case RING_FALLOCATE:
        entry->off = slot->offset;
        entry->addr = slot->length;
        entry->len = (uint32_t)slot->flags;
        break;
    default:
        entry->off = slot->offset;
        entry->addr = (uint64_t)(uintptr_t)(slot->iov + slot->iov_first);
        entry->len = slot->iov_count - slot->iov_first;
        entry->rw_flags = slot->flags;
    }
}

/* Push what is queued; the kernel takes it at once but for want of memory. */
static void uring_submit(struct native_ring *ring)
{
    struct uring *uring = ring->state;
    uint32_t tail = *uring->submission_tail;
    struct ring_slot *slot;
    while ((slot = ring_pop(&ring->queued))) {
        uint32_t index = tail & *uring->submission_mask;
        fill(&uring->entries[index], slot);
        uring->submission_array[index] = index;
        tail++;
        uring->unsubmitted++;
    }
    __atomic_store_n(uring->submission_tail, tail, __ATOMIC_RELEASE);
    while (uring->unsubmitted) {
        int taken = enter(uring, uring->unsubmitted, 0);
        if (taken > 0) {
            uring->unsubmitted -= (uint32_t)taken;
        } else if (taken != -EINTR) {
            struct timespec pause = {0, 1000000};
            nanosleep(&pause, NULL);
        }
    }
}

static void uring_collect(struct native_ring *ring, int wait)
{
    struct uring *uring = ring->state;
    uint32_t head = *uring->completion_head;
    if (wait && head == __atomic_load_n(uring->completion_tail, __ATOMIC_ACQUIRE))
        enter(uring, 0, 1);
    uint32_t tail = __atomic_load_n(uring->completion_tail, __ATOMIC_ACQUIRE);
    struct ring_list again = {0};
    for (; head != tail; head++) {
        const struct io_uring_cqe *entry = &uring->completions[head & *uring->completion_mask];
        struct ring_slot *slot = (struct ring_slot *)(uintptr_t)entry->user_data;
        ring_push(ring_attempt_ended(slot, entry->res) ? &ring->ended : &again, slot);
    }
    __atomic_store_n(uring->completion_head, head, __ATOMIC_RELEASE);
    if (again.count) {
        struct ring_list queued = ring->queued;
        ring->queued = again;
        uring_submit(ring);
        ring->queued = queued;
    }
}

static void uring_close(struct native_ring *ring)
{
    uring_free(ring->state);
}

const struct ring_engine ring_uring = {uring_open, uring_submit, uring_collect, uring_close};
