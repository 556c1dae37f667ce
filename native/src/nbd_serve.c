/* Requests: executed in order under the access word (see nbd.h).
 *
 * The word is looked at before each request, so a revocation waits for one request and not for
 * what was received. READ and WRITE of a plain file are executed here; everything else, and every
 * request of an export with filters, is handed to Python, one at a time.
 */
#define _GNU_SOURCE
#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define HOLE_BYTES_MIN 4096 /* shorter ones are sent as data */
#define RUNS_MAX 24 /* of holes and data in one reply; the rest is sent as data */
#define GO_ON (-1)
/* Our own clients keep what is not flushed and soon ask for a FLUSH: the disk begins with what is at
 * least so long at once. (This waits for nothing and makes nothing durable.) */
#define EARLY_BYTES_MIN 262144
#define NO_MEMORY "too little memory"

static uint8_t *map_memory(size_t length)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

/* NULL without memory. `first` was received behind the handshake. */
struct native_nbd *native_nbd_open(int sock, struct native_nbd_export *export, int logged_in,
                                   int style, const uint8_t *first, size_t length)
{
    struct native_nbd *nbd = calloc(1, sizeof *nbd);
    if (!nbd)
        return NULL;
    nbd->sock = sock;
    nbd->durable_fd = -1;
    nbd->export = export;
    nbd->logged_in = logged_in;
    nbd->structured = style != NBD_SIMPLE;
    nbd->extended = style == NBD_EXTENDED;
    cpu_set_t ours;
    nbd->lookers_max = sched_getaffinity(0, sizeof ours, &ours) ? 0 : CPU_COUNT(&ours) - 1;
    nbd->buffer = map_memory(NBD_RECEIVE_BYTES);
    nbd->arena = map_memory(NBD_ARENA_BYTES);
    nbd->headers = map_memory(NBD_PARTS_MAX * NBD_HEADER_BYTES);
    if (!nbd->buffer || !nbd->arena || !nbd->headers || length > NBD_RECEIVE_BYTES) {
        native_nbd_free(nbd);
        return NULL;
    }
    memcpy(nbd->buffer, first, length);
    nbd->end = length;
    return nbd;
}

static void unmap_memory(uint8_t *memory, size_t length)
{
    if (memory)
        munmap(memory, length);
}

void native_nbd_free(struct native_nbd *nbd)
{
    native_nbd_leave(nbd);
    unmap_memory(nbd->buffer, NBD_RECEIVE_BYTES);
    unmap_memory(nbd->arena, NBD_ARENA_BYTES);
    unmap_memory(nbd->headers, NBD_PARTS_MAX * NBD_HEADER_BYTES);
    unmap_memory(nbd->aligned, NBD_RECEIVE_BYTES);
    nbd_memory_free(&nbd->payload);
    nbd_memory_free(&nbd->large);
    if (nbd->durable_fd >= 0)
        close(nbd->durable_fd);
    free(nbd);
}

void native_nbd_set_access(struct native_nbd *nbd, struct native_access *access)
{
    native_nbd_leave(nbd);
    nbd->access = access;
}

void native_nbd_leave(struct native_nbd *nbd)
{
    if (nbd->entered) {
        nbd->entered = 0;
        native_access_leave(nbd->access);
        if (!nbd->alone)
            nbd_part(nbd->export);
    }
    if (nbd->alone) {
        nbd->alone = 0;
        nbd_end_alone(nbd->export);
    }
}

/* Nothing more is executed; from any thread. The socket is shut down by the caller. */
void native_nbd_close(struct native_nbd *nbd)
{
    atomic_store(&nbd->closing, 1);
}

static uint32_t because(struct native_nbd *nbd, uint32_t error, const char *why)
{
    native_nbd_why(nbd, why);
    return error;
}

/* GO_ON with the access checked and *error set (0: it may), or what run returns. */
static int check(struct native_nbd *nbd, uint32_t wanted, uint32_t *error)
{
    if (atomic_load(&nbd->closing) || nbd->broken) {
        nbd->refused = 1;
        return NBD_ENDED;
    }
    if (!nbd->alone && nbd->entered && atomic_load(&nbd->export->alone))
        native_nbd_leave(nbd); /* another one wants to be alone */
    if (!nbd->entered) {
        if (!nbd->alone)
            nbd_join(nbd->export);
        native_access_enter(nbd->access);
        nbd->entered = 1;
    }
    uint32_t word = native_access_word(nbd->access);
    if (word & ACCESS_CLOSED) {
        native_nbd_leave(nbd);
        return NBD_GATE;
    }
    if (!word && nbd->logged_in) {
        nbd->refused = 1;
        return NBD_ENDED;
    }
    *error = word & wanted ? 0 : because(nbd, WIRE_EPERM, "reservation conflict");
    if (word & ACCESS_STALE)
        *error = because(nbd, WIRE_ESTALE, "the volume's map is too old");
    return GO_ON;
}

static uint32_t wire_error(struct native_nbd *nbd, int error)
{
    if (error == EBADMSG) {
        snprintf(nbd->why, sizeof nbd->why, "checksum mismatch in the block at %" PRIu64, nbd->bad);
        return WIRE_EIO;
    }
    native_nbd_why(nbd, strerrordesc_np(error));
    switch (error) {
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
        return (uint32_t)error;
    default:
        return WIRE_EIO;
    }
}

static struct native_integrity *area_of(struct native_nbd *nbd)
{
    return atomic_load(&nbd->export->integrity);
}

/* 0 or an errno; EBADMSG: it is not what was written. */
static int read_run(struct native_nbd *nbd, int fd, uint8_t *data, size_t length, uint64_t offset)
{
    struct native_integrity *area = area_of(nbd);
    uint32_t *sums = nbd->checked ? nbd->sums : NULL;
    if (area)
        return native_integrity_read(area, fd, data, length, offset, sums, &nbd->bad);
    int error = native_read_exactly(fd, data, length, offset);
    if (!error && sums)
        integrity_sums(data, length, offset, sums);
    return error;
}

/* The kernel tells an open file once that a write-back has failed, whoever made it durable then:
 * through one file the failure of one connection's WRITE could be told to another one alone. -1 with
 * errno. */
static int durable_file(struct native_nbd *nbd, int fd)
{
    char name[32];
    if (nbd->durable_fd < 0) {
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        nbd->durable_fd = open(name, O_RDWR | O_CLOEXEC | (fcntl(fd, F_GETFL) & O_DIRECT));
    }
    return nbd->durable_fd;
}

static int write_run(struct native_nbd *nbd, int fd, int flags)
{
    struct native_nbd_request *request = &nbd->request;
    struct native_integrity *area = area_of(nbd);
    if (flags && (fd = durable_file(nbd, fd)) < 0)
        return errno;
    return area ? native_integrity_write(area, fd, nbd->data, nbd->checked ? nbd->sums : NULL,
                                         request->length, request->offset, flags, &nbd->bad)
                : native_write_exactly(fd, nbd->data, request->length, request->offset, flags);
}

static int beyond(struct native_nbd *nbd, const struct native_nbd_request *request)
{
    uint64_t size = atomic_load(&nbd->export->size_bytes);
    return request->offset > size || request->length > size - request->offset;
}

/* Offset and length of the request suit a back end that demands alignment. */
static int is_aligned(struct native_nbd *nbd, const struct native_nbd_request *request)
{
    return !((request->offset | request->length) & (atomic_load(&nbd->export->alignment) - 1));
}

/* The data of a WRITE as the back end wants it. 0 without memory. */
static int align_data(struct native_nbd *nbd)
{
    uintptr_t mask = atomic_load(&nbd->export->alignment) - 1;
    if (!((uintptr_t)nbd->data & mask))
        return 1;
    if (!nbd->aligned && !(nbd->aligned = map_memory(NBD_RECEIVE_BYTES)))
        return 0;
    nbd->data = memcpy(nbd->aligned, nbd->data, nbd->request.length);
    return 1;
}

static void count_read(struct native_nbd *nbd)
{
    atomic_fetch_add(&nbd->export->reads, 1);
    atomic_fetch_add(&nbd->export->read_bytes, nbd->request.length);
}

/* The end of the data, or of the hole, that begins at `offset`; at most `end`. */
static uint64_t run_end(int fd, uint64_t offset, uint64_t end, int *hole)
{
    off_t data = lseek(fd, (off_t)offset, SEEK_DATA);
    if (data < 0 && errno != ENXIO) { /* no such thing here: all is data */
        *hole = 0;
        return end;
    }
    *hole = data < 0 || (uint64_t)data > offset;
    off_t next = *hole ? data : lseek(fd, (off_t)offset, SEEK_HOLE);
    /* Not after `offset`: somebody has punched it out in between. */
    return next <= (off_t)offset || (uint64_t)next > end ? end : (uint64_t)next;
}

/* The file has a hole there; with an integrity area its blocks must have been zeroes. */
static int is_hole(struct native_nbd *nbd, uint64_t offset, uint64_t length)
{
    struct native_integrity *area = area_of(nbd);
    return length >= HOLE_BYTES_MIN &&
           (!area || (!((offset | length) % INTEGRITY_BLOCK_BYTES) &&
                      native_integrity_zeroes(area, offset, length)));
}

/* A structured READ without DF: holes travel as such. */
static int read_with_holes(struct native_nbd *nbd, int fd, uint8_t *room)
{
    struct native_nbd_request *request = &nbd->request;
    uint64_t at = request->offset, end = at + request->length;
    int error = 0;
    for (int run = 0; at < end && !error; run++) {
        int hole = 0;
        uint64_t next = run < RUNS_MAX ? run_end(fd, at, end, &hole) : end;
        size_t length = (size_t)(next - at);
        if (hole && is_hole(nbd, at, length))
            nbd_reply_hole(nbd, request->cookie, at, (uint32_t)length, next == end);
        else if (!(error = read_run(nbd, fd, room, length, at)))
            nbd_reply_data(nbd, request->cookie, at, room, length, next == end);
        room += length;
        at = next;
    }
    return error;
}

/* The data of a READ, and the trailer behind it. */
static void reply_read(struct native_nbd *nbd)
{
    struct native_nbd_request *request = &nbd->request;
    size_t length = request->length, trailer = nbd->checked ? nbd_trailer_bytes(nbd) : 0;
    for (size_t at = 0; at < trailer; at += sizeof(uint32_t)) {
        uint32_t wire = htobe32(nbd->sums[at / sizeof wire]);
        memcpy((uint8_t *)nbd->data + length + at, &wire, sizeof wire);
    }
    nbd_reply_read(nbd, request->cookie, request->offset, nbd->data, length + trailer);
}

static int read_plainly(struct native_nbd *nbd, int fd)
{
    int error = read_run(nbd, fd, nbd->data, nbd->request.length, nbd->request.offset);
    if (!error)
        reply_read(nbd);
    return error;
}

/* The error of a READ or WRITE that may not be, or 0. */
static uint32_t mistake(struct native_nbd *nbd, uint16_t known_flags, uint32_t beyond_error)
{
    struct native_nbd_request *request = &nbd->request;
    if (request->flags & ~known_flags)
        return because(nbd, WIRE_EINVAL, "unknown flags");
    if (request->length > NBD_PAYLOAD_MAX)
        return because(nbd, WIRE_EINVAL, "longer than 64 MiB");
    if (!is_aligned(nbd, request))
        return because(nbd, WIRE_EINVAL, "not a multiple of the minimum block size");
    return beyond(nbd, request) ? because(nbd, beyond_error, "beyond the end of the export") : 0;
}

static int execute_read(struct native_nbd *nbd)
{
    struct native_nbd_request *request = &nbd->request;
    uint16_t known = NBD_FLAG_FUA | (nbd->structured ? NBD_FLAG_DF : 0);
    uint32_t wrong = mistake(nbd, known, WIRE_EINVAL);
    size_t trailer = nbd->checked && !wrong ? nbd_trailer_bytes(nbd) : 0;
    uint8_t *room = wrong ? NULL : nbd_room(nbd, request->length + trailer); /* may send */
    uint32_t error;
    int result = check(nbd, ACCESS_READ, &error);
    if (result != GO_ON)
        return result;
    if (!error)
        error = wrong || room ? wrong : because(nbd, ENOMEM, NO_MEMORY);
    if (error) {
        nbd_reply(nbd, request->cookie, error);
        return GO_ON;
    }
    int fd = atomic_load(&nbd->export->fd);
    nbd->data = room;
    request->kind = NBD_READ;
    if (fd < 0)
        return NBD_REQUEST;
    int sparse = nbd->structured && !(request->flags & NBD_FLAG_DF) &&
                 request->length >= HOLE_BYTES_MIN;
    int failed = sparse ? read_with_holes(nbd, fd, room) : read_plainly(nbd, fd);
    if (failed)
        nbd_reply(nbd, request->cookie, wire_error(nbd, failed));
    else
        count_read(nbd);
    return GO_ON;
}

/* What was sent is what was meant: nothing else is written. 0 or an error. */
static uint32_t check_trailer(struct native_nbd *nbd)
{
    struct native_nbd_request *request = &nbd->request;
    size_t trailer = nbd_trailer_bytes(nbd);
    integrity_sums(nbd->data, request->length, request->offset, nbd->sums);
    for (size_t at = 0; at < trailer; at += sizeof(uint32_t)) {
        uint32_t wire;
        memcpy(&wire, nbd->trailer + at, sizeof wire);
        if (be32toh(wire) != nbd->sums[at / sizeof wire])
            return because(nbd, WIRE_EBADMSG, "checksum mismatch in what was received");
    }
    return 0;
}

static int execute_write(struct native_nbd *nbd)
{
    struct native_nbd_request *request = &nbd->request;
    uint32_t error;
    int result = check(nbd, ACCESS_WRITE, &error);
    if (result != GO_ON)
        return result;
    if (!error)
        error = atomic_load(&nbd->export->read_only)
                    ? because(nbd, WIRE_EPERM, "the export is read-only")
                    : mistake(nbd, NBD_FLAG_FUA, WIRE_ENOSPC);
    if (!error && !(nbd->data && align_data(nbd)))
        error = because(nbd, ENOMEM, NO_MEMORY);
    if (!error && nbd->checked)
        error = check_trailer(nbd);
    if (error) {
        nbd_reply(nbd, request->cookie, error);
        return GO_ON;
    }
    int fd = atomic_load(&nbd->export->fd);
    request->kind = NBD_WRITE;
    if (fd < 0)
        return NBD_REQUEST;
    int durable = request->flags & NBD_FLAG_FUA;
    int failed = write_run(nbd, fd, durable ? RWF_DSYNC : 0);
    if (failed && failed != EBADMSG && durable) {
        request->error = wire_error(nbd, failed);
        return NBD_FAILED;
    }
    if (!failed && !durable && nbd->logged_in && request->length >= EARLY_BYTES_MIN)
        sync_file_range(fd, (off_t)request->offset, (off_t)request->length,
                        SYNC_FILE_RANGE_WRITE);
    native_nbd_done(nbd, failed ? wire_error(nbd, failed) : 0);
    return GO_ON;
}

static uint32_t compare_mistake(struct native_nbd *nbd)
{
    struct native_nbd_request range = nbd->request;
    range.length /= 2;
    if (atomic_load(&nbd->export->read_only))
        return because(nbd, WIRE_EPERM, "the export is read-only");
    if (range.flags & ~NBD_FLAG_FUA)
        return because(nbd, WIRE_EINVAL, "unknown flags");
    if (nbd->request.length & 1 || range.length > NBD_COMPARE_MAX)
        return because(nbd, WIRE_EINVAL, "not twice a length up to 64 KiB");
    if (!is_aligned(nbd, &range))
        return because(nbd, WIRE_EINVAL, "not a multiple of the minimum block size");
    return beyond(nbd, &range) ? because(nbd, WIRE_ENOSPC, "beyond the end of the export") : 0;
}

/* COMPARE AND WRITE: Python executes it, and is alone until the answer is made. */
static int execute_compare(struct native_nbd *nbd)
{
    uint32_t error;
    native_nbd_leave(nbd);
    nbd_begin_alone(nbd->export);
    nbd->alone = 1;
    int result = check(nbd, ACCESS_WRITE, &error);
    if (result != GO_ON) {
        native_nbd_leave(nbd);
        return result;
    }
    if (!error && !(error = compare_mistake(nbd)))
        return NBD_REQUEST;
    native_nbd_done(nbd, error);
    return GO_ON;
}

/* What Python executes: with the access checked where one table row says which. */
static int hand_over(struct native_nbd *nbd)
{
    static const uint8_t wanted[] = {
        [NBD_FLUSH] = ACCESS_WRITE, [NBD_TRIM] = ACCESS_WRITE, [NBD_ZERO] = ACCESS_WRITE,
        [NBD_CACHE] = ACCESS_READ,  [NBD_STATUS] = ACCESS_READ,
    };
    struct native_nbd_request *request = &nbd->request;
    uint32_t error = 0;
    if (request->kind < sizeof wanted) {
        int result = check(nbd, wanted[request->kind], &error);
        if (result != GO_ON)
            return result;
    } else
        native_nbd_leave(nbd);
    if (!error)
        return NBD_REQUEST;
    native_nbd_done(nbd, error);
    return GO_ON;
}

/* The reply to `request`, which READ and WRITE of Python's come to as well. */
void native_nbd_done(struct native_nbd *nbd, uint32_t error)
{
    struct native_nbd_request *request = &nbd->request;
    if (request->kind == NBD_READ && !error) {
        if (nbd->checked)
            integrity_sums(nbd->data, request->length, request->offset, nbd->sums);
        reply_read(nbd);
        count_read(nbd);
        return;
    }
    if ((request->kind == NBD_WRITE || nbd->alone) && !error) {
        atomic_fetch_add(&nbd->export->writes, 1);
        atomic_fetch_add(&nbd->export->written_bytes, request->length / (nbd->alone ? 2 : 1));
    }
    if (request->kind == NBD_FLUSH)
        atomic_fetch_add(&nbd->export->flushes, 1);
    nbd_reply(nbd, request->cookie, error);
    if (nbd->alone)
        native_nbd_leave(nbd);
}

static int execute(struct native_nbd *nbd)
{
    if (nbd_has_payload(nbd)) {
        if (nbd->request.kind != NBD_WRITE &&
            !(nbd->request.kind == NBD_COMPARE && nbd->logged_in)) { /* it was taken, no more */
            native_nbd_why(nbd, "this command has no payload");
            nbd_reply(nbd, nbd->request.cookie, WIRE_EINVAL);
            return GO_ON;
        }
        nbd->request.flags &= ~NBD_FLAG_PAYLOAD;
    }
    uint16_t kind = nbd->request.kind;
    nbd->checked = kind == NBD_READ_CHECKED || kind == NBD_WRITE_CHECKED;
    if (nbd->checked && (!nbd->logged_in || nbd->structured)) {
        native_nbd_why(nbd, "only after LOGIN, with simple replies");
        nbd_reply(nbd, nbd->request.cookie, WIRE_EINVAL);
        return GO_ON;
    }
    switch (kind) {
    case NBD_READ:
    case NBD_READ_CHECKED:
        return execute_read(nbd);
    case NBD_WRITE:
    case NBD_WRITE_CHECKED:
        return execute_write(nbd);
    case NBD_COMPARE:
        return nbd->logged_in ? execute_compare(nbd) : hand_over(nbd);
    case NBD_DISC:
        native_nbd_send(nbd);
        return NBD_ENDED;
    default:
        return hand_over(nbd);
    }
}

int native_nbd_run(struct native_nbd *nbd)
{
    for (;;) {
        if (!nbd->pending) {
            nbd_memory_free(&nbd->payload);
            int taken = nbd_take(nbd);
            if (taken < 0)
                return NBD_ENDED;
            if (!taken) {
                if (!nbd_receive(nbd))
                    return NBD_ENDED;
                continue;
            }
        }
        nbd_make_room(nbd);
        int result = execute(nbd);
        nbd->pending = result == NBD_GATE;
        if (result != GO_ON)
            return result;
    }
}

static void count_refused(struct native_nbd *nbd)
{
    uint32_t kind = nbd->request.kind;
    atomic_fetch_add(&nbd->export->refused, 1);
    if (kind == NBD_WRITE || kind == NBD_WRITE_CHECKED || kind == NBD_FLUSH || kind == NBD_TRIM ||
        kind == NBD_ZERO || kind == NBD_COMPARE)
        atomic_fetch_add(&nbd->export->refused_writes, 1);
}

/* The peer is barred: count what it still sends, and execute nothing of it, until it closes or is
 * silent for so long. */
void native_nbd_count_late(struct native_nbd *nbd, uint32_t seconds)
{
    struct timeval limit = {.tv_sec = seconds};
    native_nbd_leave(nbd);
    setsockopt(nbd->sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (nbd->refused)
        count_refused(nbd);
    for (;;) {
        nbd_memory_free(&nbd->payload);
        int taken = nbd_take(nbd);
        if (taken < 0)
            return;
        if (taken)
            count_refused(nbd);
        else if (!nbd_receive_more(nbd))
            return;
    }
}

void *native_nbd_request_of(struct native_nbd *nbd)
{
    return &nbd->request;
}

void *native_nbd_data_of(struct native_nbd *nbd)
{
    return nbd->data;
}

void native_nbd_export_set(struct native_nbd_export *export, int fd, uint64_t size_bytes,
                           int read_only, uint32_t alignment)
{
    atomic_store(&export->alignment, alignment);
    atomic_store(&export->size_bytes, size_bytes);
    atomic_store(&export->read_only, (uint32_t)read_only);
    atomic_store(&export->fd, fd);
}

/* From the next request on; NULL: no sums. */
void native_nbd_export_protect(struct native_nbd_export *export, struct native_integrity *area)
{
    atomic_store(&export->integrity, area);
}

/* reads, writes, flushes, read_bytes, written_bytes, refused, refused_writes */
void native_nbd_counters(struct native_nbd_export *export, uint64_t *out)
{
    out[0] = atomic_load(&export->reads);
    out[1] = atomic_load(&export->writes);
    out[2] = atomic_load(&export->flushes);
    out[3] = atomic_load(&export->read_bytes);
    out[4] = atomic_load(&export->written_bytes);
    out[5] = atomic_load(&export->refused);
    out[6] = atomic_load(&export->refused_writes);
}
