/* The integrity area of an export: a checksum of each block of its disk, in a file of its own.
 *
 * nbd_integrity.c       the area: regions in flux, who changes which blocks, sums as stored
 * nbd_integrity_data.c  data read, written and settled under it
 * nbd_file.c            whole reads and writes
 *
 * Layout of the file (its header is gnbd/server/integrity.py's):
 *
 * | offset               | size              | what                                            |
 * |----------------------|-------------------|-------------------------------------------------|
 * | 0, 4096              | 4096 each         | two copies of the header                        |
 * | INTEGRITY_BITS_AT    | 2 MiB             | one bit per region of 4 MiB: it is in flux      |
 * | INTEGRITY_SUMS_AT    | 4 per 4-KiB block | CRC-32C of the block, padded with zeroes to     |
 * |                      |                   | 4 KiB, XOR that of a block of zeroes; little    |
 * |                      |                   | endian. So a block of zeroes has 0              |
 */
#ifndef NATIVE_INTEGRITY_H
#define NATIVE_INTEGRITY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define INTEGRITY_BLOCK_BYTES ((size_t)4096)
#ifndef INTEGRITY_REGION_BYTES /* smaller ones in tests; at least a piece */
#define INTEGRITY_REGION_BYTES ((uint64_t)4 << 20)
#endif
#define INTEGRITY_REGION_BLOCKS (INTEGRITY_REGION_BYTES / INTEGRITY_BLOCK_BYTES)
#define INTEGRITY_REGIONS_MAX ((uint64_t)1 << 24)
#define INTEGRITY_BITS_BYTES (INTEGRITY_REGIONS_MAX / 8)
#define INTEGRITY_BITS_AT ((uint64_t)8192)
#define INTEGRITY_SUMS_AT (INTEGRITY_BITS_AT + INTEGRITY_BITS_BYTES)
#ifndef INTEGRITY_PIECE_BLOCKS
#define INTEGRITY_PIECE_BLOCKS ((size_t)256) /* read and checked at a time; of one region */
#endif
#define INTEGRITY_BAD_MAX 64

enum native_integrity_outcome {
    INTEGRITY_DONE,    /* the data is written */
    INTEGRITY_FAILED,  /* nobody knows how much of it */
    INTEGRITY_NOTHING, /* none of it */
};

/* Blocks [first, end) that somebody changes, or looks at while nobody changes them. */
struct native_integrity_range {
    uint64_t first, end;
    struct native_integrity_range *next;
};

/* One change under way. */
struct native_integrity_change {
    struct native_integrity_range range;
    uint64_t offset, length, size_bytes;
    const uint8_t *data;   /* NULL: zeroes */
    const uint32_t *sums;  /* NULL, or finished checksums of the pieces of `data` */
    uint32_t head, tail;   /* sums of the first and last block if they are changed in part */
    int partial;           /* PARTIAL_HEAD | PARTIAL_TAIL */
};

struct native_integrity {
    int fd;
    int event_fd; /* written at each mismatch; -1: none */
    _Atomic uint64_t size_bytes;
    pthread_mutex_t lock; /* all that follows but the atomics */
    pthread_cond_t changed;
    int waiters;
    struct native_integrity_range *ranges, **ranges_end; /* in the order of arrival */
    int bits_busy; /* somebody writes bits; only he may clear any */
    uint64_t wanted_first, wanted_end; /* regions that wait for a durable bit lie in there */
    uint8_t *bits;
    _Atomic uint8_t *states;
    _Atomic uint64_t mismatches, unsettled, in_flux;
    uint64_t bad[INTEGRITY_BAD_MAX];
    int bad_count;
};

/* nbd_integrity.c. All give 0 or an errno; EBADMSG: the block at *bad (bytes) is not what was
 * written. */
struct native_integrity *native_integrity_open(int fd, uint64_t size_bytes, int event_fd,
                                               int *error);
void native_integrity_free(struct native_integrity *area);
/* Regions that have rested since the call before (all: every one) are to become clean; how many. */
uint64_t native_integrity_pick(struct native_integrity *area, int all);
/* What was picked is clean now, if data and sums are durable. */
int native_integrity_clear(struct native_integrity *area, int durable);
/* Every sum of [offset, offset + length), whole blocks, is that of zeroes. */
int native_integrity_zeroes(struct native_integrity *area, uint64_t offset, uint64_t length);
/* mismatches, regions in flux, regions not settled */
void native_integrity_counters(struct native_integrity *area, uint64_t *out);
/* Addresses of mismatches since the last call; how many. */
int native_integrity_take_bad(struct native_integrity *area, uint64_t *out);

void integrity_report(struct native_integrity *area, uint64_t block);
void integrity_enter(struct native_integrity *area, struct native_integrity_range *range);
int integrity_enter_changing(struct native_integrity *area, struct native_integrity_range *range);
void integrity_leave(struct native_integrity *area, struct native_integrity_range *range);
int integrity_is_settled(struct native_integrity *area, uint64_t block);
void integrity_settled(struct native_integrity *area, uint64_t region);
/* Durable bits for [first, end) of regions whose sums mean nothing yet. */
int integrity_unsettle(struct native_integrity *area, uint64_t first, uint64_t end);
int integrity_load(struct native_integrity *area, uint64_t block, size_t count, uint32_t *sums);
int integrity_store(struct native_integrity *area, uint64_t block, size_t count,
                    const uint32_t *sums);
int integrity_store_zeroes(struct native_integrity *area, uint64_t block, uint64_t count);
/* Finished checksums of the pieces of `data`. */
void integrity_sums(const uint8_t *data, size_t length, uint64_t offset, uint32_t *sums);
/* The finished checksum of a block of which that is stored. */
uint32_t integrity_finished(uint32_t stored);
/* A finished checksum of `length` bytes as it is stored. */
uint32_t integrity_stored(uint32_t sum, size_t length);

/* nbd_integrity_data.c */
/* `sums`: NULL, or the finished checksums of the pieces of `data` (cut at blocks): filled, used. */
int native_integrity_read(struct native_integrity *area, int fd, uint8_t *data, size_t length,
                          uint64_t offset, uint32_t *sums, uint64_t *bad);
int native_integrity_write(struct native_integrity *area, int fd, const uint8_t *data,
                           const uint32_t *sums, size_t length, uint64_t offset, int flags,
                           uint64_t *bad);
/* Around a change of [offset, offset + length) to `data`, or to zeroes. After a begin that fails
 * there is no end. */
int native_integrity_begin(struct native_integrity *area, int fd,
                           struct native_integrity_change *change, const uint8_t *data,
                           const uint32_t *sums, uint64_t length, uint64_t offset, uint64_t *bad);
int native_integrity_end(struct native_integrity *area, int fd,
                         struct native_integrity_change *change, int outcome);
/* The first region from `region` on whose sums are not believed gets sums of what is there; which
 * one it was, or UINT64_MAX. *error: it could not. */
uint64_t native_integrity_settle(struct native_integrity *area, int fd, uint64_t region,
                                 int *error);
/* Check [offset, offset + length), whole blocks, through `fd`; `memory` (aligned) has room for it.
 * Gives the number of blocks that are wrong, the first `max` addresses of them in `bad`. Blocks
 * that cannot be read or have no sum yet are counted. */
uint64_t native_integrity_check(struct native_integrity *area, int fd, uint8_t *memory,
                                size_t length, uint64_t offset, uint64_t *bad, uint64_t max,
                                uint64_t *unreadable, uint64_t *skipped);
/* Sums of regions in flux are not believed any more until they are settled. All: the area is given
 * up, its file is gone; what others change without it is no damage for those who still go by it.
 * Nobody settles then. */
void native_integrity_doubt(struct native_integrity *area, int all);
/* The disk is longer: durable before the return, but for the header. */
int native_integrity_grow(struct native_integrity *area, int fd, uint64_t size_bytes);

/* nbd_file.c. Past the end of the file there are zeroes. 0 or an errno. */
int native_read_exactly(int fd, uint8_t *data, size_t length, uint64_t offset);
int native_write_exactly(int fd, const uint8_t *data, size_t length, uint64_t offset, int flags);
#endif
