/* A block I/O ring: batches of operations in, completions out through an eventfd.
 *
 * ring.c          slots, short transfers, the interface
 * ring_uring.c    io_uring by raw system calls
 * ring_threads.c  a pool of threads, where io_uring is not allowed
 *
 * Invariants: in flight <= depth; an operation completes exactly once; a read or write completes
 * with all its bytes, with less only at the end of the file, or with an error. Buffers stay valid
 * until the completion was reaped (the caller's duty). One thread submits and reaps at a time.
 */
#ifndef NATIVE_RING_H
#define NATIVE_RING_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

enum native_ring_engine { RING_AUTO = 0, RING_URING = 1, RING_THREADS = 2 };
enum native_ring_op { RING_READ = 0, RING_WRITE = 1, RING_FSYNC = 2, RING_FALLOCATE = 3 };

#define RING_DEPTH_MAX 4096u
#define RING_IOV_MAX 1024u
/* Offset of streams: at the current position. */
#define RING_STREAM UINT64_MAX

struct ring_slot {
    uint64_t tag, offset, length;
    struct iovec *iov;
    uint32_t iov_capacity, iov_count, iov_first;
    uint64_t done;   /* bytes of earlier short transfers */
    int64_t result;  /* bytes or -errno, once complete */
    int fd, op, flags;
    struct ring_slot *next;
};

struct ring_list {
    struct ring_slot *first, *last;
    uint32_t count;
};

struct native_ring;

/* What an engine does; each gets the ring. */
struct ring_engine {
    int (*open)(struct native_ring *ring, uint32_t threads); /* 0 or an errno */
    /* Hand over everything in ring->queued. */
    void (*submit)(struct native_ring *ring);
    /* Append what ended to ring->ended; wait for at least one if `wait`. */
    void (*collect)(struct native_ring *ring, int wait);
    void (*close)(struct native_ring *ring);
};

struct native_ring {
    const struct ring_engine *engine;
    void *state;
    int event_fd, kind;
    uint32_t depth, in_flight; /* in flight: given to the engine or ended, and not yet reaped */
    struct ring_slot *slots;
    struct ring_list free, queued, ended;
};

extern const struct ring_engine ring_uring, ring_threads;

static inline void ring_push(struct ring_list *list, struct ring_slot *slot)
{
    slot->next = NULL;
    if (list->first)
        list->last->next = slot;
    else
        list->first = slot;
    list->last = slot;
    list->count++;
}

static inline struct ring_slot *ring_pop(struct ring_list *list)
{
    struct ring_slot *slot = list->first;
    if (slot) {
        list->first = slot->next;
        list->count--;
    }
    return slot;
}

/* One attempt of the operation ended with `result` (bytes or -errno): 1 if the operation is
 * complete (slot->result is set), 0 if it has to go on. */
int ring_attempt_ended(struct ring_slot *slot, int64_t result);

struct native_ring *native_ring_open(uint32_t depth, int engine, uint32_t threads, int *error);
/* Waits for everything that was submitted. */
void native_ring_close(struct native_ring *ring);
int native_ring_kind(struct native_ring *ring);
int native_ring_event_fd(struct native_ring *ring);
uint32_t native_ring_in_flight(struct native_ring *ring);
/* Queue one operation; 0, EBUSY (the ring is full) or another errno. `flags`: RWF_* of a write, 1
 * for an fsync of data only, the mode of fallocate. */
int native_ring_add(struct native_ring *ring, int op, uint64_t tag, int fd, uint64_t offset,
                    void *const *buffers, const size_t *lengths, size_t count, int flags);
int native_ring_add_one(struct native_ring *ring, int op, uint64_t tag, int fd, uint64_t offset,
                        void *buffer, uint64_t length, int flags);
uint32_t native_ring_submit(struct native_ring *ring);
/* Completions, at most `max`; results are bytes or -errno. */
uint32_t native_ring_reap(struct native_ring *ring, uint64_t *tags, int64_t *results, uint32_t max);
#endif
