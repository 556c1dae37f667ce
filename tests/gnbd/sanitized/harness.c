/* The C transmission under sanitizers: made-up and mutated streams of requests.
 *
 * An input (inputs.h): the setting, then what the client sends. The client is a thread
 * that sends in pieces and takes the replies; the main thread does what Python does for a request.
 * Replies with a length in their header are checked to be whole. Every second input is for a disk
 * with an integrity area, whose sums must all be right whenever they are looked at.
 */
#define _GNU_SOURCE
#include "../../../native/src/nbd.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define INPUT_BYTES_MAX ((size_t)8 << 20)
#include "inputs.h"

#define DISK_BYTES ((uint64_t)16 << 20)

enum { STYLE, LOGGED_IN, VARIANT, PIECE, HANG_UP, GATES, FAILS, STATUS_ROWS }; /* of the setting */
enum { BARE, PYTHON, ALIGNED, READ_ONLY, VARIANTS };

/* ---- making inputs ---- */

static void put(const void *data, size_t length)
{
    if (input_length + length > INPUT_BYTES_MAX)
        return;
    if (data)
        memcpy(input + input_length, data, length);
    else
        for (size_t i = 0; i < length; i++)
            input[input_length + i] = (uint8_t)(i + length);
    input_length += length;
}

static uint64_t some_number(void)
{
    static const uint64_t edges[] = {0, 1, 511, 512, 4095, 4096, 65536, DISK_BYTES - 1, DISK_BYTES,
                                     DISK_BYTES + 1, UINT32_MAX, 1ull << 32, 1ull << 63, UINT64_MAX};
    uint64_t kind = draw(4);
    return kind == 0 ? edges[draw(sizeof edges / sizeof *edges)]
           : kind == 1 ? draw(DISK_BYTES)
                       : draw(DISK_BYTES / 4096) * 4096;
}

static uint64_t some_length(void)
{
    static const uint64_t sizes[] = {0, 1, 511, 512, 4096, 4096, 8192, 20000, 200000};
    uint64_t kind = draw(2048);
    return kind < 4 ? some_number() : kind == 4 ? draw(6 << 20) : sizes[draw(9)];
}

/* Of the last `length` bytes; now and then it is wrong. */
static void put_trailer(uint64_t offset, size_t length)
{
    static uint32_t sums[2048];
    size_t count = length ? (offset % 4096 + length + 4095) / 4096 : 0;
    assert(count <= sizeof sums / sizeof *sums);
    if (length && input_length >= length)
        integrity_sums(input + input_length - length, length, offset, sums);
    for (size_t i = 0; i < count; i++) {
        uint32_t wire = htobe32(draw(200) ? sums[i] : 1);
        put(&wire, sizeof wire);
    }
}

static void make_request(void)
{
    static const uint16_t kinds[] = {0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 0x4301, 0x4303, 99,
                                     NBD_WRITE_CHECKED, NBD_WRITE_CHECKED, NBD_READ_CHECKED,
                                     NBD_READ_CHECKED, NBD_COMPARE};
    uint16_t kind = draw(200) ? kinds[draw(sizeof kinds / sizeof *kinds)] : NBD_DISC;
    uint16_t flags = draw(4) ? 0 : (uint16_t)draw(draw(2) ? 64 : 65536);
    uint64_t offset = some_number(), length = some_length(), cookie = draw(0);
    int extended = input[STYLE] % 3 == NBD_EXTENDED;
    if (kind == NBD_WRITE || kind == NBD_WRITE_CHECKED || kind == NBD_COMPARE) {
        length = length > (5 << 20) || length == 200000 ? 4096 : length;
        flags |= extended && draw(8) ? NBD_FLAG_PAYLOAD : 0;
    }
    struct {
        uint32_t magic;
        uint16_t flags, kind;
        uint64_t cookie, offset, length;
    } __attribute__((packed)) wire = {
        htobe32(extended ? 0x21e41c71 : 0x25609513), htobe16(flags), htobe16(kind),
        htobe64(cookie), htobe64(offset), htobe64(length),
    };
    if (!extended) {
        uint32_t compact = htobe32((uint32_t)length);
        memcpy(&wire.length, &compact, sizeof compact);
    }
    put(&wire, extended ? 32 : 28);
    int has_data = kind == NBD_WRITE || kind == NBD_WRITE_CHECKED ||
                   (kind == NBD_COMPARE && input[LOGGED_IN] % 2);
    if (has_data || (extended && flags & NBD_FLAG_PAYLOAD && length < 70000))
        put(NULL, length);
    if (kind == NBD_WRITE_CHECKED)
        put_trailer(offset, length);
}

static void mutate(void)
{
    size_t at = SETTING_BYTES + draw(input_length - SETTING_BYTES + 1);
    size_t rest = input_length - at, part = draw(64);
    part = part > rest ? rest : part;
    switch (draw(5)) {
    case 0:
        if (rest)
            input[at] ^= (uint8_t)(1 << draw(8));
        break;
    case 1:
        if (rest)
            input[at] = (uint8_t)draw(256);
        break;
    case 2:
        input_length = at;
        break;
    case 3:
        memmove(input + at, input + at + part, rest - part);
        input_length -= part;
        break;
    default:
        for (size_t i = 0; i < part; i++)
            input[at + i] = (uint8_t)draw(256);
    }
}

static void make_input(void)
{
    input_length = 0;
    for (int i = 0; i < SETTING_BYTES; i++)
        put(&(uint8_t){(uint8_t)draw(256)}, 1);
    for (uint64_t left = 1 + draw(draw(64) ? 30 : 700); left; left--)
        make_request();
    for (uint64_t left = draw(2) ? 0 : draw(6); left; left--)
        mutate();
}

/* ---- the client ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int client_sock = -1;
static uint8_t *replies;
static size_t reply_length, reply_room;
static int hung_up;

static void take_replies(int sock, int *open)
{
    if (reply_room - reply_length < 65536) {
        reply_room = reply_room * 2 + (1 << 20);
        replies = realloc(replies, reply_room);
        assert(replies);
    }
    ssize_t count = recv(sock, replies + reply_length, reply_room - reply_length, MSG_DONTWAIT);
    if (count > 0)
        reply_length += (size_t)count;
    else if (!count || (errno != EAGAIN && errno != EINTR))
        *open = 0;
}

static void talk(int sock)
{
    size_t at = SETTING_BYTES, piece = INPUT_BYTES_MAX;
    size_t patience = input[HANG_UP] % 8 ? SIZE_MAX : input[HANG_UP] * 83;
    if (input[PIECE] % 4 == 0)
        piece = 1 + input[PIECE] / 4 * (1 + input_length / 1024);
    int open = 1;
    if (at == input_length)
        shutdown(sock, SHUT_WR);
    while (open) {
        struct pollfd wait = {sock, (short)(POLLIN | (at < input_length ? POLLOUT : 0)), 0};
        poll(&wait, 1, -1);
        if (at < input_length && wait.revents & (POLLOUT | POLLHUP | POLLERR)) {
            size_t length = input_length - at < piece ? input_length - at : piece;
            ssize_t count = send(sock, input + at, length, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (count > 0)
                at += (size_t)count;
            else if (errno != EAGAIN && errno != EINTR)
                at = input_length;
            if (at == input_length)
                shutdown(sock, SHUT_WR);
        }
        if (wait.revents & (POLLIN | POLLHUP | POLLERR))
            take_replies(sock, &open);
        if (reply_length > patience) {
            hung_up = 1;
            break;
        }
    }
    close(sock);
}

static void *client(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (client_sock < 0)
            pthread_cond_wait(&changed, &lock);
        int sock = client_sock;
        pthread_mutex_unlock(&lock);
        talk(sock);
        pthread_mutex_lock(&lock);
        client_sock = -1;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static void give_client(int sock)
{
    reply_length = 0;
    hung_up = 0;
    pthread_mutex_lock(&lock);
    client_sock = sock;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void await_client(void)
{
    pthread_mutex_lock(&lock);
    while (client_sock >= 0)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* Each reply with a length of its own is whole, and nothing stands between them. */
static void check_replies(int style)
{
    size_t at = 0;
    while (style != NBD_SIMPLE && at < reply_length) {
        uint32_t magic, compact;
        uint64_t wide;
        assert(reply_length - at >= 16);
        memcpy(&magic, replies + at, 4);
        magic = be32toh(magic);
        if (magic == 0x67446698) {
            assert(style == NBD_STRUCTURED);
            at += 16;
            continue;
        }
        size_t header = style == NBD_EXTENDED ? 32 : 20;
        assert(magic == (style == NBD_EXTENDED ? 0x6e8a278c : 0x668e33ef));
        assert(reply_length - at >= header);
        memcpy(&compact, replies + at + 16, 4);
        memcpy(&wide, replies + at + header - 8, 8);
        uint64_t length = style == NBD_EXTENDED ? be64toh(wide) : be32toh(compact);
        assert(length <= reply_length - at - header);
        at += header + length;
    }
}

/* ---- the server ---- */

static int bare, protected, disk; /* one of the two */
static struct native_integrity *area, *in_use;
static struct native_nbd_export export;

/* `data` NULL: zeroes. */
static void python_writes(const uint8_t *data, uint64_t length, uint64_t offset)
{
    struct native_integrity_change change;
    uint64_t bad;
    if (in_use)
        assert(!native_integrity_begin(in_use, disk, &change, data, NULL, length, offset, &bad));
    if (data)
        assert(pwrite(disk, data, length, (off_t)offset) == (ssize_t)length);
    else
        assert(!fallocate(disk, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, (off_t)offset,
                          (off_t)length));
    if (in_use)
        assert(!native_integrity_end(in_use, disk, &change, INTEGRITY_DONE));
}

static void check_disk(void)
{
    static uint8_t memory[1 << 20] __attribute__((aligned(4096)));
    uint64_t bad[1], unreadable = 0, skipped = 0;
    for (uint64_t at = 0; at < DISK_BYTES; at += sizeof memory)
        assert(!native_integrity_check(area, protected, memory, sizeof memory, at, bad, 1,
                                       &unreadable, &skipped));
    assert(!unreadable && !skipped);
    native_integrity_pick(area, 1);
    assert(!native_integrity_clear(area, 1));
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* COMPARE AND WRITE; whether it differs is drawn, so that both happen. */
static void serve_compare(struct native_nbd *nbd, int style)
{
    struct native_nbd_request *request = native_nbd_request_of(nbd);
    const uint8_t *data = native_nbd_data_of(nbd);
    uint64_t length = request->length / 2, cookie = request->cookie;
    uint8_t error[] = {0, 0, 0, 84, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    assert(atomic_load(&export.alone) && !atomic_load(&export.inside));
    for (uint64_t i = 0, sum = 0; i < request->length; i++)
        sum += data[i];
    if (draw(2)) {
        if (length)
            python_writes(data + length, length, request->offset);
        native_nbd_done(nbd, 0);
    } else if (style == NBD_SIMPLE) {
        native_nbd_done(nbd, 84);
        native_nbd_put(nbd, (const uint8_t *)&cookie, 8);
    } else {
        native_nbd_chunk(nbd, 0x8002, 1, error, sizeof error);
        native_nbd_leave(nbd);
    }
    assert(!atomic_load(&export.alone));
}

/* What Python does (gnbd/server/transmission_io.py). */
static void serve_request(struct native_nbd *nbd, int style)
{
    struct native_nbd_request *request = native_nbd_request_of(nbd);
    uint8_t rows[4096] = {0};
    uint32_t error = input[FAILS] % 8 || draw(4) ? 0 : WIRE_EIO;
    switch (request->kind) {
    case NBD_READ:
        if (request->length)
            assert(pread(disk, native_nbd_data_of(nbd), request->length,
                         (off_t)request->offset) == (ssize_t)request->length);
        break;
    case NBD_WRITE:
        if (request->length)
            python_writes(native_nbd_data_of(nbd), request->length, request->offset);
        break;
    case NBD_STATUS:
        if (style != NBD_SIMPLE && !error) {
            native_nbd_chunk(nbd, 5, 0, rows, 12);
            native_nbd_chunk(nbd, 5, 1, rows, (size_t)input[STATUS_ROWS] * 16);
            return;
        }
        break;
    case NBD_TRIM:
    case NBD_ZERO:
        if (!error && request->offset < DISK_BYTES && request->length <= DISK_BYTES &&
            request->length)
            python_writes(NULL, smaller(request->length, DISK_BYTES - request->offset),
                          request->offset);
        break;
    case NBD_COMPARE:
        if (!(input[LOGGED_IN] % 2)) {
            error = WIRE_EINVAL;
            break;
        }
        if (!error) {
            serve_compare(nbd, style);
            return;
        }
        break;
    case 0x4303:
        native_nbd_leave(nbd);
        native_nbd_done(nbd, error);
        if (style == NBD_SIMPLE && !error)
            native_nbd_put(nbd, rows, 8);
        return;
    case 0x4301:
        native_nbd_leave(nbd);
        native_nbd_send(nbd);
    }
    native_nbd_done(nbd, error);
}

static void serve(int sock, int style)
{
    struct native_access accesses[64] = {0}, *access = accesses;
    uint32_t words[] = {ACCESS_READ | ACCESS_WRITE, ACCESS_READ | ACCESS_WRITE, ACCESS_READ,
                        ACCESS_STALE, 0};
    native_access_set(access, words[draw(16) ? 0 : draw(5)]);
    struct native_nbd *nbd =
        native_nbd_open(sock, &export, input[LOGGED_IN] % 2, style, input, 0);
    assert(nbd);
    native_nbd_set_access(nbd, access);
    int event;
    while ((event = native_nbd_run(nbd)) != NBD_ENDED) {
        if (event == NBD_FAILED) {
            native_nbd_done(nbd, WIRE_EIO);
            native_nbd_send(nbd);
            break;
        }
        if (event == NBD_REQUEST) {
            serve_request(nbd, style);
            if (input[GATES] % 8 == 0 && !draw(4) && access < accesses + 63)
                native_access_set(access, ACCESS_CLOSED);
            if (input[GATES] % 32 == 1 && !draw(4))
                native_nbd_close(nbd);
            continue;
        }
        assert(native_access_word(access) == ACCESS_CLOSED);
        native_nbd_leave(nbd);
        native_access_wait_idle(access);
        native_access_set(++access, words[draw(5)]);
        native_nbd_set_access(nbd, access);
    }
    if (input[GATES] % 16 == 2)
        native_nbd_count_late(nbd, 1);
    native_nbd_free(nbd);
    assert(!native_access_in_flight(access));
    assert(!native_nbd_memory_used());
    assert(!atomic_load(&export.alone) && !atomic_load(&export.inside));
}

static void run_input(void)
{
    int pair[2], style = input[STYLE] % 3, variant = input[VARIANT] % VARIANTS;
    assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    in_use = input[STATUS_ROWS] % 2 ? area : NULL;
    disk = in_use ? protected : bare;
    native_nbd_export_protect(&export, in_use);
    native_nbd_export_set(&export, variant == PYTHON ? -1 : disk, DISK_BYTES,
                          variant == READ_ONLY, variant == ALIGNED ? 512 : 1);
    native_nbd_set_memory_max(draw(4) ? (uint64_t)64 << 20 : 1 << 20, 1);
    give_client(pair[1]);
    serve(pair[0], style);
    close(pair[0]);
    await_client();
    if (!hung_up)
        check_replies(style);
    if (in_use && !draw(32))
        check_disk();
}

int main(int count, char **arguments)
{
    pthread_t thread;
    native_nbd_export_init(&export);
    int sums = memfd_create("sums", MFD_CLOEXEC), error;
    bare = memfd_create("disk", MFD_CLOEXEC);
    protected = memfd_create("protected", MFD_CLOEXEC);
    assert(!ftruncate(bare, (off_t)DISK_BYTES));
    assert(!ftruncate(protected, (off_t)DISK_BYTES) && !ftruncate(sums, (off_t)INTEGRITY_SUMS_AT));
    area = native_integrity_open(sums, DISK_BYTES, -1, &error);
    assert(area);
    assert(!pthread_create(&thread, NULL, client, NULL));
    int result = run_inputs(count, arguments);
    free(replies);
    return result;
}
