/* Replies: taken from many bytes at once, data moved straight to its place (see nbd_link.h).
 *
 * One receive fills the rest of the data that is coming and the buffer behind it. Servers answer
 * mostly in order: while a long READ is the oldest request, the buffer takes no more than a header,
 * so that the data, too, is received where it belongs. What is in the buffer is taken at once, up
 * to a header that is not whole.
 */
#define _GNU_SOURCE
#include "nbd_link.h"

#include "crc32c.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#define REPLY_MAGIC 0x67446698u
#define RECEIVES_MAX 16 /* calls in one native_link_receive: others want to go on as well */
#define PARTS 3         /* data, trailer, buffer */

struct wire_reply {
    uint32_t magic, error;
    uint64_t cookie;
} __attribute__((packed));

_Static_assert(sizeof(struct wire_reply) == LINK_REPLY_BYTES, "the header of a reply");

/* Where data of the current request goes next, then its trailer; how much of it is to come. */
static size_t next_part(struct native_link *link, size_t have, uint8_t **to)
{
    struct link_request *request = link->current;
    if (have < request->length) {
        *to = request->data + have;
        return request->length - have;
    }
    have -= request->length;
    *to = (uint8_t *)request->sums + have;
    return request->trailer_length - have;
}

/* Checksums of the blocks that have come whole, while they are warm. */
static void checksum(struct native_link *link)
{
    struct link_request *request = link->current;
    if (!request->sums || request->trailer_length)
        return;
    size_t to = link->have < request->length ? link->have & ~(size_t)(LINK_BLOCK_BYTES - 1)
                                             : request->length;
    if (to > link->summed) {
        native_crc32c_blocks(request->data + link->summed, to - link->summed, LINK_BLOCK_BYTES,
                             request->sums + link->summed / LINK_BLOCK_BYTES);
        link->summed = to;
    }
}

static void done(struct native_link *link, struct link_request *request, uint32_t error,
                 uint64_t now)
{
    int64_t took = (int64_t)(now - request->sent_ns), known = (int64_t)link->service_ns;
    link->service_ns = (uint64_t)(known ? known + (took - known) / 8 : took);
    link_done(link, request, error);
}

/* So many bytes of the current request's data or trailer have come. */
static void came(struct native_link *link, size_t count, uint64_t now)
{
    struct link_request *request = link->current;
    link->have += count;
    checksum(link);
    if (link->have < (size_t)request->length + request->trailer_length)
        return;
    link->current = NULL;
    done(link, request, 0, now);
}

/* From the buffer to where it belongs. */
static void take_data(struct native_link *link, uint64_t now)
{
    uint8_t *to;
    size_t length = next_part(link, link->have, &to), have = link->end - link->start;
    length = length < have ? length : have;
    memcpy(to, link->buffer + link->start, length);
    link->start += length;
    came(link, length, now);
}

/* 0: out of step. */
static int take_header(struct native_link *link, uint64_t now)
{
    struct wire_reply wire;
    memcpy(&wire, link->buffer + link->start, sizeof wire);
    struct link_request *request = link_find(link, be64toh(wire.cookie));
    if (be32toh(wire.magic) != REPLY_MAGIC || !request)
        return 0;
    link->start += sizeof wire;
    uint32_t error = be32toh(wire.error);
    if (!error && request->ways & LINK_RECEIVES && request->length) {
        link->current = request;
        link->have = link->summed = 0;
    } else {
        if (error == LINK_MISMATCH && request->ways & LINK_COMPARES)
            link->dropped = LINK_PLACE_BYTES;
        done(link, request, error, now);
    }
    return 1;
}

/* All that is in the buffer; 0: out of step. */
static int take(struct native_link *link)
{
    uint64_t now = link_now_ns();
    while (link->end > link->start) {
        if (link->dropped) {
            size_t have = link->end - link->start;
            size_t count = link->dropped < have ? link->dropped : have;
            link->start += count;
            link->dropped -= count;
        } else if (link->current)
            take_data(link, now);
        else if (link->end - link->start < LINK_REPLY_BYTES)
            break;
        else if (!take_header(link, now))
            return 0;
    }
    size_t rest = link->end - link->start;
    memmove(link->buffer, link->buffer + link->start, rest);
    link->start = 0;
    link->end = rest;
    return 1;
}

/* How much the buffer shall take behind the data that is coming. */
static size_t room(struct native_link *link)
{
    uint16_t oldest = link->requests[LINK_REQUESTS_MAX].next;
    if (link->current && oldest == link->current - link->requests)
        oldest = link->current->next;
    struct link_request *request = &link->requests[oldest];
    int is_long = oldest != LINK_REQUESTS_MAX && request->ways & LINK_RECEIVES &&
                  request->length > LINK_SHORT_BYTES;
    return (is_long ? LINK_REPLY_BYTES : LINK_BUFFER_BYTES) - link->end;
}

/* 1: go on, more may have come; 0: that was all for now; or what receive returns. */
static int receive_once(struct native_link *link)
{
    struct iovec parts[PARTS];
    size_t count = 0, have = link->have, length;
    uint8_t *to;
    while (link->current && (length = next_part(link, have, &to))) {
        parts[count++] = (struct iovec){to, length};
        have += length;
    }
    parts[count++] = (struct iovec){link->buffer + link->end, room(link)};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
    ssize_t got = recvmsg(link->sock, &message, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR)
        return 1;
    if (got < 0 && errno == EAGAIN)
        return 0;
    if (got <= 0)
        return LINK_ENDED;
    size_t left = (size_t)got;
    uint64_t now = link_now_ns();
    while (left && link->current) {
        length = next_part(link, link->have, &to);
        length = length < left ? length : left;
        left -= length;
        came(link, length, now);
    }
    link->end += left;
    return take(link) ? 1 : LINK_WRONG;
}

int native_link_receive(struct native_link *link)
{
    link->done_count = 0;
    int result = take(link) ? 1 : LINK_WRONG; /* from behind the handshake */
    for (int call = 0; call < RECEIVES_MAX && result > 0; call++)
        result = receive_once(link);
    return link->done_count || result >= 0 ? link->done_count : result;
}
