/* The integrity area through power cuts and kills, under sanitizers.
 *
 *     power SEED COUNT      COUNT lives of one disk and its area, one after the other
 *
 * Two disks in memory stand for the two files. Each remembers per sector what is durable and every
 * content that was written since: after a power cut each sector has any of these, independently.
 * A life ends in the middle of any write, by a kill (the caches survive) or by a power cut, or in
 * order. After each end the area is opened again:
 *
 *  - every block is readable, and has what its disk has: no false mismatch;
 *  - a byte that changes in a region without durable bit is found.
 *
 * The calls of the C code to the files lead here (-Dpread=power_pread ...).
 */
#define _GNU_SOURCE
#include "../../../native/src/integrity.h"

#include <assert.h>
#include <errno.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#define SECTOR 512
#define DISK_BYTES ((size_t)5 * INTEGRITY_REGION_BYTES + 2 * 4096 + 1536)
#define AREA_BYTES ((size_t)INTEGRITY_SUMS_AT + 4096)
#define VERSIONS_MAX 200000

enum { DATA = 100, AREA };

struct version {
    int disk;
    size_t sector;
    uint8_t content[SECTOR];
};

static struct disk {
    uint8_t *now, *durable;
    size_t length;
} disks[2];
static struct version *versions; /* that are not durable, in order */
static size_t version_count;
static uint64_t chance, writes_left;
static jmp_buf death;
static unsigned long cuts, kills, orders, damages;

static uint64_t draw(uint64_t below)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance % below;
}

/* ---- the disks ---- */

ssize_t power_pread(int fd, void *data, size_t length, off_t offset)
{
    struct disk *disk = &disks[fd - DATA];
    assert((size_t)offset + length <= disk->length);
    memcpy(data, disk->now + offset, length);
    return (ssize_t)length;
}

off_t power_lseek(int fd, off_t offset, int whence)
{
    (void)fd, (void)offset, (void)whence;
    errno = EINVAL;
    return -1;
}

static void make_durable(int number, size_t from, size_t to)
{
    size_t kept = 0;
    memcpy(disks[number].durable + from, disks[number].now + from, to - from);
    for (size_t i = 0; i < version_count; i++) {
        size_t at = versions[i].sector * SECTOR;
        if (versions[i].disk != number || at < from || at >= to)
            versions[kept++] = versions[i];
    }
    version_count = kept;
}

static void note_versions(int number, size_t from, size_t to)
{
    for (size_t sector = from / SECTOR; sector * SECTOR < to; sector++) {
        assert(version_count < VERSIONS_MAX);
        struct version *version = &versions[version_count++];
        version->disk = number;
        version->sector = sector;
        memcpy(version->content, disks[number].now + sector * SECTOR, SECTOR);
    }
}

ssize_t power_pwritev2(int fd, const struct iovec *part, int count, off_t offset, int flags)
{
    int number = fd - DATA;
    struct disk *disk = &disks[number];
    size_t from = (size_t)offset, length = part->iov_len;
    int last = !writes_left--;
    assert(count == 1 && from + length <= disk->length);
    if (last && length > 1)
        length = draw(length + 1); /* it dies in the middle */
    memcpy(disk->now + from, part->iov_base, length);
    note_versions(number, from, from + length);
    if (last)
        longjmp(death, 1);
    if (flags & RWF_DSYNC)
        make_durable(number, from / SECTOR * SECTOR,
                     (from + length + SECTOR - 1) / SECTOR * SECTOR);
    return (ssize_t)length;
}

static void flush(int fd)
{
    make_durable(fd - DATA, 0, disks[fd - DATA].length);
}

/* Each sector has any of what it had since it was durable. */
static void lose_power(void)
{
    int bias = (int)draw(4); /* nearly all, nearly nothing, anything */
    for (int number = 0; number < 2; number++)
        memcpy(disks[number].now, disks[number].durable, disks[number].length);
    for (size_t i = 0; i < version_count; i++) {
        uint64_t odds = draw(16);
        if (bias == 0 ? odds : bias == 1 ? !odds : odds < 8)
            memcpy(disks[versions[i].disk].now + versions[i].sector * SECTOR, versions[i].content,
                   SECTOR);
    }
    for (int number = 0; number < 2; number++)
        memcpy(disks[number].durable, disks[number].now, disks[number].length);
    version_count = 0;
}

/* ---- a life ---- */

static void change(struct native_integrity *area)
{
    static uint8_t data[65536 + 4096];
    uint64_t bad = 0, offset = draw(3) ? draw(DISK_BYTES) : draw(DISK_BYTES / 4096) * 4096;
    uint64_t length = draw(3) ? draw(9000) : draw(17) * 4096;
    if (length > DISK_BYTES - offset)
        length = DISK_BYTES - offset;
    int zero = !draw(4);
    memset(data, zero ? 0 : (int)draw(256), length);
    if (!zero)
        for (size_t i = 0; i < length; i += 97)
            data[i] = (uint8_t)draw(256);
    if (!zero) {
        static uint32_t sums[32];
        int trailer = (int)draw(2);
        if (trailer)
            integrity_sums(data, length, offset, sums);
        assert(!native_integrity_write(area, DATA, data, trailer ? sums : NULL, length, offset,
                                       draw(8) ? 0 : RWF_DSYNC, &bad));
        return;
    }
    struct native_integrity_change change;
    struct iovec part = {data, length};
    assert(!native_integrity_begin(area, DATA, &change, NULL, NULL, length, offset, &bad));
    if (length)
        power_pwritev2(DATA, &part, 1, (off_t)offset, 0);
    assert(!native_integrity_end(area, DATA, &change, draw(8) ? INTEGRITY_DONE
                                                             : INTEGRITY_FAILED));
}

static void read_something(struct native_integrity *area)
{
    static uint8_t data[65536];
    uint64_t bad = 0, offset = draw(DISK_BYTES), length = draw(sizeof data);
    if (length > DISK_BYTES - offset)
        length = DISK_BYTES - offset;
    assert(!native_integrity_read(area, DATA, data, length, offset, NULL, &bad));
    assert(!memcmp(data, disks[0].now + offset, length));
}

static void changes(struct native_integrity *area, uint64_t count)
{
    while (count--)
        change(area);
}

/* What the keeper does, with changes at each of its steps. */
static void rest(struct native_integrity *area, uint64_t between)
{
    int data_first = (int)draw(2);
    native_integrity_pick(area, !draw(3));
    changes(area, draw(between));
    flush(data_first ? DATA : AREA);
    changes(area, draw(between));
    flush(data_first ? AREA : DATA);
    changes(area, draw(between));
    assert(!native_integrity_clear(area, 1));
}

static void settle_some(struct native_integrity *area, uint64_t count)
{
    int error;
    for (uint64_t region = 0; count--; region++) {
        region = native_integrity_settle(area, DATA, region, &error);
        assert(!error);
        if (region == UINT64_MAX)
            return;
    }
}

static void live(struct native_integrity *area)
{
    for (uint64_t left = draw(30); left; left--)
        switch (draw(8)) {
        case 0:
            rest(area, 4);
            break;
        case 1:
            flush(DATA);
            break;
        case 2:
            settle_some(area, draw(4));
            break;
        case 3:
            read_something(area);
            break;
        default:
            change(area);
        }
    if (!draw(4)) { /* an orderly end */
        flush(DATA);
        native_integrity_pick(area, 1);
        flush(AREA);
        native_integrity_clear(area, 1);
        if (draw(2))
            flush(AREA);
        orders++;
    }
}

static struct native_integrity *open_area(void)
{
    int error;
    struct native_integrity *area = native_integrity_open(AREA, DISK_BYTES, -1, &error);
    assert(area && !error);
    return area;
}

/* Damage that nobody wrote, where no bit says that something may be torn, is found. */
static void damage(void)
{
    uint8_t byte;
    uint64_t at = draw(DISK_BYTES), region = at / INTEGRITY_REGION_BYTES, bad = 0;
    if (disks[1].now[INTEGRITY_BITS_AT + region / 8] >> region % 8 & 1)
        return;
    struct native_integrity *area = open_area();
    disks[0].now[at] ^= 0x40;
    settle_some(area, 100);
    int error = native_integrity_read(area, DATA, &byte, 1, at, NULL, &bad);
    assert(error == EBADMSG && bad == at / 4096 * 4096);
    disks[0].now[at] ^= 0x40;
    native_integrity_free(area);
    damages++;
}

static void check_all(unsigned long life)
{
    static uint8_t data[DISK_BYTES];
    uint64_t bad = 0;
    struct native_integrity *area = open_area();
    uint64_t left = writes_left;
    writes_left = UINT64_MAX;
    if (draw(2))
        settle_some(area, draw(2) ? 100 : 2);
    int error = native_integrity_read(area, DATA, data, DISK_BYTES, 0, NULL, &bad);
    if (error)
        fprintf(stderr, "life %lu: error %d at %llu\n", life, error, (unsigned long long)bad);
    assert(!error);
    assert(!memcmp(data, disks[0].now, DISK_BYTES));
    writes_left = left;
    native_integrity_free(area);
}

int main(int count, char **arguments)
{
    assert(count == 3);
    uint64_t seed = strtoull(arguments[1], NULL, 10);
    unsigned long lives = strtoul(arguments[2], NULL, 10);
    size_t lengths[] = {DISK_BYTES, AREA_BYTES};
    for (int number = 0; number < 2; number++) {
        struct disk *disk = &disks[number];
        disk->length = lengths[number];
        disk->now = calloc(1, disk->length);
        disk->durable = calloc(1, disk->length);
        assert(disk->now && disk->durable);
    }
    versions = malloc(VERSIONS_MAX * sizeof *versions);
    assert(versions);
    for (volatile unsigned long life = 0; life < lives; life++) {
        chance = (seed + life) * 0x9e3779b97f4a7c15ull | 1;
        struct native_integrity *volatile area = open_area();
        /* A kill while the first bits are written is one chance only, so many lives are short. */
        writes_left = draw(2) ? UINT64_MAX : draw(draw(2) ? 6 : 120);
        if (!setjmp(death))
            live(area);
        native_integrity_free(area);
        if (draw(2)) {
            lose_power();
            cuts++;
        } else {
            kills++;
            if (version_count > VERSIONS_MAX / 2) {
                flush(DATA);
                flush(AREA);
            }
        }
        writes_left = UINT64_MAX;
        if (draw(2))
            damage();
        check_all(life);
    }
    printf("%lu power cuts, %lu kills, %lu orderly ends, %lu damages found\n", cuts, kills, orders,
           damages);
    return 0;
}
