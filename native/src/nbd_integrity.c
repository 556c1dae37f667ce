/* The integrity area: regions in flux, blocks being changed, sums as stored (see integrity.h).
 *
 * Why a sum that is believed is right, whatever ends the server.
 *
 * Data and sums are written to two files, in no order that anything promises: after a power cut
 * each sector of either that was not flushed is old or new. So a region (4 MiB) has a bit, and
 *
 *   (1) before the first byte of a change to a region whose bit may be 0 on the disk, the bit is
 *       set and durable (`mark`; those that come together share one durable write);
 *   (2) a bit is cleared only when the data and the sums that were written to its region are
 *       durable: `pick` takes regions that nobody changes, the caller makes both files durable,
 *       `clear` clears those of them in which nothing has begun since. A clear need not be durable:
 *       a bit too many costs a recomputation;
 *   (3) at a start, and when the disk has refused sums, those of regions with a bit are not
 *       believed before they have been recomputed from the data ("settled"). That makes them right
 *       by definition, whatever was torn;
 *   (4) a start makes the bits that it has read durable: who was killed while it wrote one has left
 *       it in the kernel's cache, where it looks like one of (1).
 *
 * Where the bit is 0 on the disk, everything that was ever written is durable by (1) and (2), so
 * the sums there are those of the data, and a mismatch is damage. Where it is 1 a mismatch after a
 * crash means nothing, and is not believed. kill -9 is the easier case: both files are as the last
 * system call left them, and the bit is there.
 *
 * FLUSH and FUA make the data durable, and nothing more is needed: until its sum is durable too,
 * the bit is, and a start takes the sum from the data that the flush has promised.
 *
 * While the server runs, data and sum of a block belong together under its range: whoever changes
 * blocks holds [first, end) alone, in the order of arrival, so that nobody starves and changes of
 * many blocks do not wait in a circle. Readers hold nothing; when a sum does not fit they look
 * again under the range, and only that is a mismatch.
 *
 * Bits are written by one at a time (`bits_busy`): an older copy never goes over a newer one.
 */
#define _GNU_SOURCE
#include "integrity.h"

#include "crc32c.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define BITS_SECTOR ((uint64_t)512)
#define STORE_BLOCKS 1024

/* Of a region. */
enum {
    CLEAN,     /* bit 0 */
    WANTED,    /* somebody waits for its bit */
    SYNCING,   /* its bit is being written */
    FLUX,      /* bit 1, durable */
    RESTING,   /* the same, and nothing has begun in it since the last `pick` */
    CLEARING,  /* the same since data and sums are being made durable */
    UNSETTLED, /* bit 1, durable; the sums are not believed */
};

static const uint8_t zeroes[INTEGRITY_BLOCK_BYTES];

static uint32_t sum_of_zeroes(void)
{
    static _Atomic uint32_t known;
    uint32_t sum = atomic_load_explicit(&known, memory_order_relaxed);
    if (!sum) {
        sum = native_crc32c(zeroes, sizeof zeroes, 0);
        atomic_store_explicit(&known, sum, memory_order_relaxed);
    }
    return sum;
}

uint32_t integrity_stored(uint32_t sum, size_t length)
{
    if (length < INTEGRITY_BLOCK_BYTES)
        sum = native_crc32c(zeroes, INTEGRITY_BLOCK_BYTES - length, sum);
    return sum ^ sum_of_zeroes();
}

uint32_t integrity_finished(uint32_t stored)
{
    return stored ^ sum_of_zeroes();
}

void integrity_sums(const uint8_t *data, size_t length, uint64_t offset, uint32_t *sums)
{
    size_t part = INTEGRITY_BLOCK_BYTES - offset % INTEGRITY_BLOCK_BYTES;
    part = part < length ? part : length;
    if (part % INTEGRITY_BLOCK_BYTES) {
        *sums++ = native_crc32c(data, part, 0);
        data += part;
        length -= part;
    }
    native_crc32c_blocks(data, length, INTEGRITY_BLOCK_BYTES, sums);
}

/* ---- opening ---- */

static void *map_memory(size_t length)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static uint64_t regions_of(uint64_t size_bytes)
{
    return (size_bytes + INTEGRITY_REGION_BYTES - 1) / INTEGRITY_REGION_BYTES;
}

static int get_bit(struct native_integrity *area, uint64_t region)
{
    return area->bits[region / 8] >> region % 8 & 1;
}

static void set_bit(struct native_integrity *area, uint64_t region, int on)
{
    uint8_t mask = (uint8_t)(1 << region % 8);
    area->bits[region / 8] = (uint8_t)(on ? area->bits[region / 8] | mask
                                          : area->bits[region / 8] & ~mask);
}

/* The bits of [first, end) go to the file; held: bits_busy, not the lock. Others may set bits
 * meanwhile: those wait for a write of their own. */
static int write_bits(struct native_integrity *area, uint64_t first, uint64_t end, int flags)
{
    uint64_t from = first / 8 / BITS_SECTOR * BITS_SECTOR;
    uint64_t to = ((end + 7) / 8 + BITS_SECTOR - 1) / BITS_SECTOR * BITS_SECTOR;
    return native_write_exactly(area->fd, area->bits + from, to - from, INTEGRITY_BITS_AT + from,
                                flags);
}

/* The states of what the file says, whose bits are durable then. */
static int load_bits(struct native_integrity *area)
{
    uint64_t regions = regions_of(area->size_bytes), end = 0;
    if (regions > INTEGRITY_REGIONS_MAX)
        return EFBIG;
    int error = native_read_exactly(area->fd, area->bits, (regions + 7) / 8, INTEGRITY_BITS_AT);
    if (error)
        return error;
    for (uint64_t region = 0; region < regions; region++)
        if (get_bit(area, region)) {
            area->states[region] = UNSETTLED;
            area->unsettled++;
            area->in_flux++;
            end = region + 1;
        }
    return end ? write_bits(area, 0, end, RWF_DSYNC) : 0;
}

struct native_integrity *native_integrity_open(int fd, uint64_t size_bytes, int event_fd,
                                               int *error)
{
    struct native_integrity *area = calloc(1, sizeof *area);
    *error = ENOMEM;
    if (!area)
        return NULL;
    area->fd = fd;
    area->event_fd = event_fd;
    area->size_bytes = size_bytes;
    area->ranges_end = &area->ranges;
    area->wanted_first = UINT64_MAX;
    pthread_mutex_init(&area->lock, NULL);
    pthread_cond_init(&area->changed, NULL);
    area->bits = map_memory(INTEGRITY_BITS_BYTES);
    area->states = map_memory(INTEGRITY_REGIONS_MAX);
    if (area->bits && area->states)
        *error = load_bits(area);
    if (*error) {
        native_integrity_free(area);
        return NULL;
    }
    return area;
}

void native_integrity_free(struct native_integrity *area)
{
    if (area->bits)
        munmap(area->bits, INTEGRITY_BITS_BYTES);
    if (area->states)
        munmap((void *)area->states, INTEGRITY_REGIONS_MAX);
    pthread_cond_destroy(&area->changed);
    pthread_mutex_destroy(&area->lock);
    free(area);
}

/* ---- waiting ---- */

static void wait_change(struct native_integrity *area)
{
    area->waiters++;
    pthread_cond_wait(&area->changed, &area->lock);
    area->waiters--;
}

static void tell_change(struct native_integrity *area)
{
    if (area->waiters)
        pthread_cond_broadcast(&area->changed);
}

/* ---- bits ---- */

static void take_bits(struct native_integrity *area)
{
    while (area->bits_busy)
        wait_change(area);
    area->bits_busy = 1;
}

static void give_bits(struct native_integrity *area)
{
    area->bits_busy = 0;
    tell_change(area);
}

/* All bits that somebody waits for become durable. Lock held, let go meanwhile. */
static int write_wanted(struct native_integrity *area)
{
    uint64_t first = area->wanted_first, end = area->wanted_end;
    area->wanted_first = UINT64_MAX;
    area->wanted_end = 0;
    area->bits_busy = 1;
    for (uint64_t region = first; region < end; region++)
        if (area->states[region] == WANTED)
            area->states[region] = SYNCING;
    pthread_mutex_unlock(&area->lock);
    int error = write_bits(area, first, end, RWF_DSYNC);
    pthread_mutex_lock(&area->lock);
    for (uint64_t region = first; region < end; region++)
        if (area->states[region] == SYNCING) {
            area->states[region] = error ? CLEAN : FLUX;
            area->in_flux += !error;
            if (error)
                set_bit(area, region, 0);
        }
    give_bits(area);
    return error;
}

/* The regions [first, end) may be changed, by somebody whose range is in the list. Lock held. */
static int mark(struct native_integrity *area, uint64_t first, uint64_t end)
{
    for (;;) {
        int missing = 0;
        for (uint64_t region = first; region < end; region++) {
            uint8_t state = area->states[region];
            if (state == CLEAN) {
                area->states[region] = WANTED;
                set_bit(area, region, 1);
                if (region < area->wanted_first)
                    area->wanted_first = region;
                if (region >= area->wanted_end)
                    area->wanted_end = region + 1;
            } else if (state == RESTING || state == CLEARING)
                area->states[region] = FLUX;
            missing |= state == CLEAN || state == WANTED || state == SYNCING;
        }
        if (!missing)
            return 0;
        if (area->bits_busy) { /* the next write is for us, or we do it */
            wait_change(area);
            continue;
        }
        int error = write_wanted(area);
        if (error)
            return error;
    }
}

int integrity_unsettle(struct native_integrity *area, uint64_t first, uint64_t end)
{
    if (first >= end)
        return 0;
    pthread_mutex_lock(&area->lock);
    take_bits(area);
    for (uint64_t region = first; region < end; region++)
        set_bit(area, region, 1);
    pthread_mutex_unlock(&area->lock);
    int error = write_bits(area, first, end, RWF_DSYNC);
    pthread_mutex_lock(&area->lock);
    for (uint64_t region = first; region < end && !error; region++)
        if (area->states[region] != UNSETTLED) {
            area->in_flux += area->states[region] == CLEAN;
            area->unsettled++;
            area->states[region] = UNSETTLED;
        }
    give_bits(area);
    pthread_mutex_unlock(&area->lock);
    return error;
}

void native_integrity_doubt(struct native_integrity *area, int all)
{
    pthread_mutex_lock(&area->lock);
    uint64_t regions = regions_of(area->size_bytes);
    for (uint64_t region = 0; region < regions; region++) {
        uint8_t state = area->states[region];
        if (state == FLUX || state == RESTING || state == CLEARING || (all && state != UNSETTLED)) {
            area->states[region] = UNSETTLED;
            area->unsettled++;
        }
    }
    tell_change(area);
    pthread_mutex_unlock(&area->lock);
}

/* ---- becoming clean ---- */

static int is_held(struct native_integrity *area, uint64_t region)
{
    uint64_t first = region * INTEGRITY_REGION_BLOCKS, end = first + INTEGRITY_REGION_BLOCKS;
    for (struct native_integrity_range *range = area->ranges; range; range = range->next)
        if (range->first < end && first < range->end)
            return 1;
    return 0;
}

uint64_t native_integrity_pick(struct native_integrity *area, int all)
{
    uint64_t picked = 0;
    pthread_mutex_lock(&area->lock);
    uint64_t regions = regions_of(area->size_bytes);
    for (uint64_t region = 0; region < regions; region++) {
        uint8_t state = area->states[region];
        if ((state == RESTING || (all && state == FLUX)) && !is_held(area, region)) {
            area->states[region] = CLEARING;
            picked++;
        } else if (state == FLUX)
            area->states[region] = RESTING;
    }
    pthread_mutex_unlock(&area->lock);
    return picked;
}

int native_integrity_clear(struct native_integrity *area, int durable)
{
    uint64_t first = UINT64_MAX, end = 0;
    pthread_mutex_lock(&area->lock);
    take_bits(area);
    uint64_t regions = regions_of(area->size_bytes);
    for (uint64_t region = 0; region < regions; region++) {
        if (area->states[region] != CLEARING)
            continue;
        area->states[region] = durable ? CLEAN : RESTING;
        if (!durable)
            continue;
        set_bit(area, region, 0);
        area->in_flux--;
        first = first < region ? first : region;
        end = region + 1;
    }
    pthread_mutex_unlock(&area->lock);
    int error = first < end ? write_bits(area, first, end, 0) : 0;
    pthread_mutex_lock(&area->lock);
    give_bits(area);
    pthread_mutex_unlock(&area->lock);
    return error;
}

int integrity_is_settled(struct native_integrity *area, uint64_t block)
{
    return atomic_load(&area->states[block / INTEGRITY_REGION_BLOCKS]) != UNSETTLED;
}

void integrity_settled(struct native_integrity *area, uint64_t region)
{
    pthread_mutex_lock(&area->lock);
    if (area->states[region] == UNSETTLED) {
        area->states[region] = FLUX;
        area->unsettled--;
    }
    pthread_mutex_unlock(&area->lock);
}

/* ---- ranges ---- */

/* Lock held. */
static void append(struct native_integrity *area, struct native_integrity_range *range)
{
    range->next = NULL;
    *area->ranges_end = range;
    area->ranges_end = &range->next;
}

/* Nobody before us holds or wants any of it. Lock held, let go meanwhile. */
static void wait_turn(struct native_integrity *area, struct native_integrity_range *range)
{
    struct native_integrity_range *other = area->ranges;
    while (other != range) {
        if (other->first < range->end && range->first < other->end) {
            wait_change(area);
            other = area->ranges;
        } else
            other = other->next;
    }
}

static void take_out(struct native_integrity *area, struct native_integrity_range *range)
{
    struct native_integrity_range **place = &area->ranges;
    while (*place != range)
        place = &(*place)->next;
    *place = range->next;
    if (!range->next)
        area->ranges_end = place;
    tell_change(area);
}

/* To look at blocks while nobody changes them. */
void integrity_enter(struct native_integrity *area, struct native_integrity_range *range)
{
    pthread_mutex_lock(&area->lock);
    append(area, range);
    wait_turn(area, range);
    pthread_mutex_unlock(&area->lock);
}

/* To change them. On an error nothing is held. */
int integrity_enter_changing(struct native_integrity *area, struct native_integrity_range *range)
{
    uint64_t first = range->first / INTEGRITY_REGION_BLOCKS;
    uint64_t end = (range->end + INTEGRITY_REGION_BLOCKS - 1) / INTEGRITY_REGION_BLOCKS;
    pthread_mutex_lock(&area->lock);
    append(area, range); /* first of all: now nobody picks the regions */
    int error = mark(area, first, end);
    if (error)
        take_out(area, range);
    else
        wait_turn(area, range);
    pthread_mutex_unlock(&area->lock);
    return error;
}

void integrity_leave(struct native_integrity *area, struct native_integrity_range *range)
{
    pthread_mutex_lock(&area->lock);
    take_out(area, range);
    pthread_mutex_unlock(&area->lock);
}

/* ---- sums ---- */

int integrity_load(struct native_integrity *area, uint64_t block, size_t count, uint32_t *sums)
{
    int error = native_read_exactly(area->fd, (uint8_t *)sums, count * sizeof *sums,
                                    INTEGRITY_SUMS_AT + block * sizeof *sums);
    for (size_t i = 0; i < count && !error; i++)
        sums[i] = le32toh(sums[i]);
    return error;
}

int integrity_store(struct native_integrity *area, uint64_t block, size_t count,
                    const uint32_t *sums)
{
    uint32_t wire[STORE_BLOCKS];
    int error = 0;
    while (count && !error) {
        size_t part = count < STORE_BLOCKS ? count : STORE_BLOCKS;
        for (size_t i = 0; i < part; i++)
            wire[i] = htole32(sums[i]);
        error = native_write_exactly(area->fd, (uint8_t *)wire, part * sizeof *wire,
                                     INTEGRITY_SUMS_AT + block * sizeof *wire, 0);
        sums += part;
        block += part;
        count -= part;
    }
    return error;
}

int integrity_store_zeroes(struct native_integrity *area, uint64_t block, uint64_t count)
{
    static const uint8_t none[(size_t)256 << 10]; /* of 256 MiB: whole disks are discarded */
    uint64_t at = INTEGRITY_SUMS_AT + block * sizeof(uint32_t), left = count * sizeof(uint32_t);
    int error = 0;
    for (size_t part; left && !error; at += part, left -= part) {
        part = left < sizeof none ? (size_t)left : sizeof none;
        error = native_write_exactly(area->fd, none, part, at, 0);
    }
    return error;
}

int native_integrity_zeroes(struct native_integrity *area, uint64_t offset, uint64_t length)
{
    uint32_t sums[STORE_BLOCKS];
    uint64_t block = offset / INTEGRITY_BLOCK_BYTES, count = length / INTEGRITY_BLOCK_BYTES;
    while (count) {
        size_t part = count < STORE_BLOCKS ? (size_t)count : STORE_BLOCKS;
        if (integrity_load(area, block, part, sums))
            return 0;
        for (size_t i = 0; i < part; i++)
            if (sums[i])
                return 0;
        block += part;
        count -= part;
    }
    return 1;
}

/* ---- mismatches ---- */

void integrity_report(struct native_integrity *area, uint64_t block)
{
    uint64_t one = 1;
    atomic_fetch_add(&area->mismatches, 1);
    pthread_mutex_lock(&area->lock);
    if (area->bad_count < INTEGRITY_BAD_MAX)
        area->bad[area->bad_count++] = block * INTEGRITY_BLOCK_BYTES;
    pthread_mutex_unlock(&area->lock);
    if (area->event_fd >= 0 && write(area->event_fd, &one, sizeof one) < 0)
        return; /* it is full: whoever waits for it has been told */
}

int native_integrity_take_bad(struct native_integrity *area, uint64_t *out)
{
    pthread_mutex_lock(&area->lock);
    int count = area->bad_count;
    memcpy(out, area->bad, (size_t)count * sizeof *out);
    area->bad_count = 0;
    pthread_mutex_unlock(&area->lock);
    return count;
}

void native_integrity_counters(struct native_integrity *area, uint64_t *out)
{
    out[0] = atomic_load(&area->mismatches);
    out[1] = atomic_load(&area->in_flux);
    out[2] = atomic_load(&area->unsettled);
}
