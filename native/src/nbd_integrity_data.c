/* Data read, written, settled and scrubbed under its integrity area (see nbd_integrity.c). */
#define _GNU_SOURCE
#include "integrity.h"

#include "crc32c.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define BLOCK INTEGRITY_BLOCK_BYTES
#define PIECE_BYTES (INTEGRITY_PIECE_BLOCKS * BLOCK)
#define SETTLED_BLOCKS ((size_t)32) /* at a time: clients that write there wait */

enum { PARTIAL_HEAD = 1, PARTIAL_TAIL = 2 };

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Of a block: 4096, but at the end of the disk. */
static size_t length_of(uint64_t block, uint64_t size_bytes)
{
    return (size_t)smaller(BLOCK, size_bytes - block * BLOCK);
}

static int read_block(int fd, uint64_t block, uint64_t size_bytes, uint8_t *to)
{
    size_t length = length_of(block, size_bytes);
    memset(to + length, 0, BLOCK - length);
    return native_read_exactly(fd, to, length, block * BLOCK);
}

static uint32_t sum_of(const uint8_t *data, size_t length)
{
    return integrity_stored(native_crc32c(data, length, 0), length);
}

/* A whole block whose range is held, checked unless nothing is known of it. */
static int read_held(struct native_integrity *area, int fd, uint64_t block, uint8_t *to,
                     uint64_t *bad)
{
    uint32_t sum;
    int error = read_block(fd, block, area->size_bytes, to);
    if (!error)
        error = integrity_load(area, block, 1, &sum);
    if (error || sum == sum_of(to, BLOCK) || !integrity_is_settled(area, block))
        return error;
    *bad = block * BLOCK;
    integrity_report(area, block);
    return EBADMSG;
}

static int read_again(struct native_integrity *area, int fd, uint64_t block, uint8_t *to,
                      uint64_t *bad)
{
    struct native_integrity_range range = {.first = block, .end = block + 1};
    integrity_enter(area, &range);
    int error = read_held(area, fd, block, to, bad);
    integrity_leave(area, &range);
    return error;
}

/* Up to a piece of whole blocks (the last one of the disk may be short); `data` has room for them.
 * They lie in one region. */
static int read_blocks(struct native_integrity *area, int fd, uint8_t *data, size_t length,
                       uint64_t block, uint32_t *finished, uint64_t *bad)
{
    uint32_t sums[INTEGRITY_PIECE_BLOCKS];
    uint8_t again[BLOCK] __attribute__((aligned(4096)));
    int settled = integrity_is_settled(area, block); /* before the data */
    int error = native_read_exactly(fd, data, length, block * BLOCK);
    if (!error && !settled && finished)
        integrity_sums(data, length, block * BLOCK, finished);
    if (error || !settled)
        return error;
    error = integrity_load(area, block, (length + BLOCK - 1) / BLOCK, sums);
    for (size_t i = 0, at = 0; at < length && !error; i++, at += BLOCK) {
        size_t part = (size_t)smaller(BLOCK, length - at);
        int right = sum_of(data + at, part) == sums[i];
        if (!right && !(error = read_again(area, fd, block + i, again, bad)))
            memcpy(data + at, again, part); /* a change was under way */
        if (finished) /* from what is stored: data that has changed since is found by the client */
            finished[i] = right && part == BLOCK ? integrity_finished(sums[i])
                                                 : native_crc32c(data + at, part, 0);
    }
    return error;
}

int native_integrity_read(struct native_integrity *area, int fd, uint8_t *data, size_t length,
                          uint64_t offset, uint32_t *sums, uint64_t *bad)
{
    uint8_t whole[BLOCK] __attribute__((aligned(4096)));
    uint64_t size_bytes = area->size_bytes;
    int error = 0;
    while (length && !error) {
        uint64_t block = offset / BLOCK;
        size_t within = offset % BLOCK, left = length_of(block, size_bytes) - within;
        size_t part;
        if (within || length < left) { /* some of a block */
            part = (size_t)smaller(length, left);
            error = read_blocks(area, fd, whole, within + left, block, NULL, bad);
            if (!error)
                memcpy(data, whole + within, part);
            if (!error && sums)
                *sums = native_crc32c(data, part, 0);
        } else {
            part = (size_t)smaller(length, PIECE_BYTES - offset % PIECE_BYTES);
            if (offset + part != size_bytes)
                part -= part % BLOCK;
            error = read_blocks(area, fd, data, part, block, sums, bad);
        }
        sums = sums ? sums + (within + part + BLOCK - 1) / BLOCK : NULL;
        data += part;
        offset += part;
        length -= part;
    }
    return error;
}

/* ---- changes ---- */

/* The sum of a block of which [from, to) becomes `data` (NULL: zeroes); the rest must be right. */
static int merge(struct native_integrity *area, int fd, uint64_t block, size_t from, size_t to,
                 const uint8_t *data, uint32_t *sum, uint64_t *bad)
{
    uint8_t whole[BLOCK] __attribute__((aligned(4096)));
    int error = read_held(area, fd, block, whole, bad);
    if (error)
        return error;
    if (data)
        memcpy(whole + from, data, to - from);
    else
        memset(whole + from, 0, to - from);
    *sum = sum_of(whole, BLOCK);
    return 0;
}

static int merge_ends(struct native_integrity *area, int fd, struct native_integrity_change *change,
                      uint64_t *bad)
{
    uint64_t first = change->range.first, last = change->range.end - 1;
    uint64_t end = change->offset + change->length;
    size_t from = change->offset % BLOCK, to = (size_t)(end - last * BLOCK);
    const uint8_t *data = change->data;
    int short_tail = to < length_of(last, change->size_bytes), error = 0;
    if (from || (first == last && short_tail)) {
        size_t until = first == last ? to : BLOCK;
        change->partial |= PARTIAL_HEAD;
        error = merge(area, fd, first, from, until, data, &change->head, bad);
    }
    if (!error && short_tail && first != last) {
        if (data)
            data += change->length - to;
        change->partial |= PARTIAL_TAIL;
        error = merge(area, fd, last, 0, to, data, &change->tail, bad);
    }
    return error;
}

int native_integrity_begin(struct native_integrity *area, int fd,
                           struct native_integrity_change *change, const uint8_t *data,
                           const uint32_t *sums, uint64_t length, uint64_t offset, uint64_t *bad)
{
    uint64_t end = offset + length;
    *change = (struct native_integrity_change){
        .range = {.first = offset / BLOCK, .end = (end + BLOCK - 1) / BLOCK},
        .offset = offset, .length = length, .data = data, .sums = sums,
    };
    if (!length)
        return 0;
    int error = integrity_enter_changing(area, &change->range);
    if (error)
        return error;
    change->size_bytes = area->size_bytes;
    error = merge_ends(area, fd, change, bad);
    if (error)
        integrity_leave(area, &change->range);
    return error;
}

/* Sums of what is there, whatever that is; the range is held. */
static int take_from_data(struct native_integrity *area, int fd, uint64_t first, uint64_t end,
                          uint64_t size_bytes)
{
    uint8_t data[SETTLED_BLOCKS * BLOCK] __attribute__((aligned(4096)));
    uint32_t sums[SETTLED_BLOCKS], before[SETTLED_BLOCKS];
    while (first < end) {
        size_t count = (size_t)smaller(end - first, SETTLED_BLOCKS);
        size_t length = (size_t)smaller(count * BLOCK, size_bytes - first * BLOCK);
        int error = integrity_load(area, first, count, before);
        if (!error)
            error = native_read_exactly(fd, data, length, first * BLOCK);
        for (size_t i = 0; i < count && !error; i++)
            sums[i] = sum_of(data + i * BLOCK, (size_t)smaller(BLOCK, length - i * BLOCK));
        if (!error && memcmp(sums, before, count * sizeof *sums))
            error = integrity_store(area, first, count, sums);
        if (error)
            return error;
        first += count;
    }
    return 0;
}

/* What has been written is known. */
static int store_sums(struct native_integrity *area, const struct native_integrity_change *change)
{
    uint32_t sums[INTEGRITY_PIECE_BLOCKS];
    uint64_t block = change->range.first, end = change->range.end, at = block * BLOCK;
    uint64_t stop = change->offset + change->length;
    size_t index = 0;
    if (!change->data && !change->partial)
        return integrity_store_zeroes(area, block, end - block);
    for (int error = 0; block < end; block += index) {
        for (index = 0; index < sizeof sums / sizeof *sums && block + index < end; index++) {
            uint64_t number = block + index;
            at = number * BLOCK;
            size_t length = (size_t)smaller(BLOCK, stop - at);
            if (number == change->range.first && change->partial & PARTIAL_HEAD)
                sums[index] = change->head;
            else if (number == end - 1 && change->partial & PARTIAL_TAIL)
                sums[index] = change->tail;
            else if (!change->data)
                sums[index] = 0;
            else if (change->sums)
                sums[index] = integrity_stored(change->sums[number - change->range.first], length);
            else
                sums[index] = sum_of(change->data + (at - change->offset), length);
        }
        if ((error = integrity_store(area, block, index, sums)))
            return error;
    }
    return 0;
}

int native_integrity_end(struct native_integrity *area, int fd,
                         struct native_integrity_change *change, int outcome)
{
    int error = 0;
    if (!change->length)
        return 0;
    if (outcome == INTEGRITY_DONE)
        error = store_sums(area, change);
    else if (outcome == INTEGRITY_FAILED)
        error = take_from_data(area, fd, change->range.first, change->range.end,
                               change->size_bytes);
    integrity_leave(area, &change->range);
    return error;
}

int native_integrity_write(struct native_integrity *area, int fd, const uint8_t *data,
                           const uint32_t *sums, size_t length, uint64_t offset, int flags,
                           uint64_t *bad)
{
    struct native_integrity_change change;
    int error = native_integrity_begin(area, fd, &change, data, sums, length, offset, bad);
    if (error)
        return error;
    error = native_write_exactly(fd, data, length, offset, flags);
    int sums_error = native_integrity_end(area, fd, &change,
                                          error ? INTEGRITY_FAILED : INTEGRITY_DONE);
    return error ? error : sums_error;
}

/* ---- upkeep ---- */

static int settle_region(struct native_integrity *area, int fd, uint64_t region)
{
    uint64_t size_bytes = area->size_bytes;
    uint64_t blocks = (size_bytes + BLOCK - 1) / BLOCK, block = region * INTEGRITY_REGION_BLOCKS;
    uint64_t end = smaller(block + INTEGRITY_REGION_BLOCKS, blocks);
    int error = 0;
    struct native_integrity_range range = {.first = block, .end = end};
    integrity_enter(area, &range);
    off_t data = lseek(fd, (off_t)(block * BLOCK), SEEK_DATA);
    int hole = data < 0 ? errno == ENXIO : (uint64_t)data >= end * BLOCK;
    if (hole && native_integrity_zeroes(area, block * BLOCK, (end - block) * BLOCK))
        block = end;
    integrity_leave(area, &range);
    for (; block < end && !error; block = range.end) { /* others may come in between */
        range = (struct native_integrity_range){
            .first = block, .end = smaller(end, block + SETTLED_BLOCKS)};
        integrity_enter(area, &range);
        error = take_from_data(area, fd, range.first, range.end, area->size_bytes);
        integrity_leave(area, &range);
    }
    return error;
}

uint64_t native_integrity_settle(struct native_integrity *area, int fd, uint64_t region,
                                 int *error)
{
    uint64_t end = (area->size_bytes + INTEGRITY_REGION_BYTES - 1) / INTEGRITY_REGION_BYTES;
    *error = 0;
    while (region < end && integrity_is_settled(area, region * INTEGRITY_REGION_BLOCKS))
        region++;
    if (region >= end)
        return UINT64_MAX;
    *error = settle_region(area, fd, region);
    if (!*error)
        integrity_settled(area, region);
    return region;
}

uint64_t native_integrity_check(struct native_integrity *area, int fd, uint8_t *memory,
                                size_t length, uint64_t offset, uint64_t *bad, uint64_t max,
                                uint64_t *unreadable, uint64_t *skipped)
{
    uint64_t found = 0, end = offset + length, address;
    for (size_t part; offset < end; offset += part) {
        part = (size_t)smaller(end - offset, PIECE_BYTES - offset % PIECE_BYTES);
        if (!integrity_is_settled(area, offset / BLOCK)) {
            *skipped += (part + BLOCK - 1) / BLOCK;
            continue;
        }
        if (!native_integrity_read(area, fd, memory, part, offset, NULL, &address))
            continue;
        for (uint64_t at = offset; at < offset + part; at += BLOCK) { /* which ones */
            size_t one = (size_t)smaller(BLOCK, offset + part - at);
            int error = native_integrity_read(area, fd, memory, one, at, NULL, &address);
            if (error == EBADMSG) {
                if (found < max)
                    bad[found] = at;
                found++;
            } else if (error)
                ++*unreadable;
        }
    }
    return found;
}

int native_integrity_grow(struct native_integrity *area, int fd, uint64_t size_bytes)
{
    uint64_t before = area->size_bytes, bad;
    uint64_t blocks = (size_bytes + BLOCK - 1) / BLOCK, last = before / BLOCK;
    uint64_t regions = (size_bytes + INTEGRITY_REGION_BYTES - 1) / INTEGRITY_REGION_BYTES;
    uint64_t old_regions = (before + INTEGRITY_REGION_BYTES - 1) / INTEGRITY_REGION_BYTES;
    uint8_t whole[BLOCK] __attribute__((aligned(4096)));
    if (size_bytes <= before)
        return 0;
    if (regions > INTEGRITY_REGIONS_MAX)
        return EFBIG;
    int error = integrity_unsettle(area, old_regions, regions);
    if (error)
        return error;
    /* The rest of the region in which the disk has ended: of what is new there nothing is known,
     * but a block of which a part is older must be right before it gets another sum. */
    struct native_integrity_range range = {
        .first = last, .end = smaller(old_regions * INTEGRITY_REGION_BLOCKS, blocks)};
    if (range.first < range.end) {
        error = integrity_enter_changing(area, &range);
        if (error)
            return error;
        if (before % BLOCK && (error = read_held(area, fd, last, whole, &bad)) == EBADMSG) {
            error = 0;
            last++; /* it stays wrong */
        }
        if (!error)
            error = take_from_data(area, fd, last, range.end, size_bytes);
        if (!error)
            area->size_bytes = size_bytes;
        integrity_leave(area, &range);
        return error;
    }
    area->size_bytes = size_bytes;
    return 0;
}
