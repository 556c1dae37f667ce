/* Replies: gathered while requests execute, sent in one call (see nbd.h).
 *
 * Sending leaves the gate: a client that does not read must not keep a revocation waiting. So
 * nothing is sent between the look at the access word and the deed: room is made before.
 * The memory of a READ's data is used again only when nothing at all waits to be sent.
 */
#define _GNU_SOURCE
#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu
#define EXTENDED_MAGIC 0x6e8a278cu
enum { CHUNK_DONE = 1 };
enum { CHUNK_NONE, CHUNK_OFFSET_DATA = 1, CHUNK_OFFSET_HOLE = 2, CHUNK_ERROR = 0x8001 };

struct simple_reply {
    uint32_t magic, error;
    uint64_t cookie;
} __attribute__((packed));

struct chunk {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie;
    uint32_t length;
} __attribute__((packed));

struct extended_chunk {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset, length;
} __attribute__((packed));

static void add_part(struct native_nbd *nbd, void *data, size_t length)
{
    struct iovec *last = nbd->part_count ? &nbd->parts[nbd->part_count - 1] : NULL;
    nbd->out_bytes += length;
    if (last && (uint8_t *)last->iov_base + last->iov_len == data)
        last->iov_len += length;
    else
        nbd->parts[nbd->part_count++] = (struct iovec){data, length};
}

void nbd_make_room(struct native_nbd *nbd)
{
    if (nbd->part_count + NBD_PARTS_OF_ONE > NBD_PARTS_MAX || nbd->out_bytes >= NBD_ARENA_BYTES ||
        nbd->headers_used + NBD_PARTS_OF_ONE * NBD_HEADER_BYTES > NBD_PARTS_MAX * NBD_HEADER_BYTES)
        native_nbd_send(nbd);
}

void nbd_release(struct native_nbd *nbd)
{
    if (nbd->part_count)
        return;
    nbd->arena_used = 0;
    nbd_memory_free(&nbd->large);
}

static void add_header(struct native_nbd *nbd, const void *data, size_t length)
{
    uint8_t *to = nbd->headers + nbd->headers_used;
    memcpy(to, data, length);
    nbd->headers_used += length;
    add_part(nbd, to, length);
}

/* A chunk's header and the start of its payload. */
static void add_chunk(struct native_nbd *nbd, int last, int type, uint64_t cookie,
                      const void *payload, size_t payload_length, size_t more)
{
    uint8_t bytes[NBD_HEADER_BYTES];
    uint16_t flags = htobe16(last ? CHUNK_DONE : 0), wire_type = htobe16((uint16_t)type);
    struct chunk chunk = {
        htobe32(CHUNK_MAGIC), flags, wire_type, htobe64(cookie),
        htobe32((uint32_t)(payload_length + more)),
    };
    struct extended_chunk extended = {
        htobe32(EXTENDED_MAGIC), flags, wire_type, htobe64(cookie),
        htobe64(nbd->request.offset), htobe64(payload_length + more),
    };
    size_t length = nbd->extended ? sizeof extended : sizeof chunk;
    memcpy(bytes, nbd->extended ? (void *)&extended : (void *)&chunk, length);
    if (payload_length)
        memcpy(bytes + length, payload, payload_length);
    add_header(nbd, bytes, length + payload_length);
}

uint8_t *nbd_room(struct native_nbd *nbd, size_t length)
{
    size_t alignment = atomic_load(&nbd->export->alignment);
    nbd->arena_used = (nbd->arena_used + alignment - 1) & ~(alignment - 1);
    if (nbd->arena_used + length > NBD_ARENA_BYTES)
        native_nbd_send(nbd);
    nbd_release(nbd);
    if (length > NBD_ARENA_BYTES) { /* all has been sent */
        nbd_memory_take(&nbd->large, length);
        return nbd->large.data;
    }
    uint8_t *room = nbd->arena + nbd->arena_used;
    nbd->arena_used += length;
    return room;
}

void native_nbd_why(struct native_nbd *nbd, const char *text)
{
    snprintf(nbd->why, sizeof nbd->why, "%s", text);
}

void nbd_reply(struct native_nbd *nbd, uint64_t cookie, uint32_t error)
{
    struct simple_reply reply = {htobe32(SIMPLE_MAGIC), htobe32(error), htobe64(cookie)};
    if (nbd->extended && !error)
        add_chunk(nbd, 1, CHUNK_NONE, cookie, NULL, 0, 0);
    else if (nbd->structured && error) {
        size_t length = strlen(nbd->why);
        struct {
            uint32_t error;
            uint16_t length;
            char text[NBD_WHY_BYTES];
        } __attribute__((packed)) payload = {htobe32(error), htobe16((uint16_t)length), {0}};
        memcpy(payload.text, nbd->why, length);
        add_chunk(nbd, 1, CHUNK_ERROR, cookie, &payload, 6 + length, 0);
    } else
        add_header(nbd, &reply, sizeof reply);
    nbd->why[0] = 0;
}

void nbd_reply_data(struct native_nbd *nbd, uint64_t cookie, uint64_t offset, uint8_t *data,
                    size_t length, int last)
{
    uint64_t wire = htobe64(offset);
    add_chunk(nbd, last, CHUNK_OFFSET_DATA, cookie, &wire, sizeof wire, length);
    add_part(nbd, data, length);
}

void nbd_reply_hole(struct native_nbd *nbd, uint64_t cookie, uint64_t offset, uint32_t length,
                    int last)
{
    struct {
        uint64_t offset;
        uint32_t length;
    } __attribute__((packed)) hole = {htobe64(offset), htobe32(length)};
    add_chunk(nbd, last, CHUNK_OFFSET_HOLE, cookie, &hole, sizeof hole, 0);
}

void nbd_reply_read(struct native_nbd *nbd, uint64_t cookie, uint64_t offset, uint8_t *data,
                    size_t length)
{
    if (nbd->structured && length) {
        nbd_reply_data(nbd, cookie, offset, data, length, 1);
        return;
    }
    if (nbd->structured) { /* nothing to read: an empty final chunk */
        add_chunk(nbd, 1, CHUNK_NONE, cookie, NULL, 0, 0);
        return;
    }
    struct simple_reply reply = {htobe32(SIMPLE_MAGIC), 0, htobe64(cookie)};
    add_header(nbd, &reply, sizeof reply);
    if (length)
        add_part(nbd, data, length);
}

static void send_all(struct native_nbd *nbd)
{
    struct msghdr message = {.msg_iov = nbd->parts, .msg_iovlen = (size_t)nbd->part_count};
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(nbd->sock, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            nbd->broken = 1;
            return;
        }
        while (message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= (size_t)sent;
        }
    }
}

void native_nbd_send(struct native_nbd *nbd)
{
    native_nbd_leave(nbd);
    if (nbd->part_count && !nbd->broken)
        send_all(nbd);
    nbd->part_count = 0;
    nbd->headers_used = nbd->out_bytes = 0;
}

/* One chunk of the reply to `request`, made by Python. */
void native_nbd_chunk(struct native_nbd *nbd, int type, int last, const uint8_t *data,
                      size_t length)
{
    nbd_make_room(nbd);
    add_chunk(nbd, last, type, nbd->request.cookie, NULL, 0, length);
    native_nbd_put(nbd, data, length);
}

/* Bytes that Python has made: any length. */
void native_nbd_put(struct native_nbd *nbd, const uint8_t *data, size_t length)
{
    while (length) {
        size_t part = length < NBD_HEADER_BYTES ? length : NBD_HEADER_BYTES;
        nbd_make_room(nbd);
        add_header(nbd, data, part);
        data += part;
        length -= part;
    }
}
