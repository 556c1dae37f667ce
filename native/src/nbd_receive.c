/* Requests as they come: many taken from one receive (see nbd.h). */
#define _GNU_SOURCE
#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define REQUEST_MAGIC 0x25609513u
#define EXTENDED_MAGIC 0x21e41c71u
#define LOOK_NS 50000 /* for the next request, before sleeping */
#define SLEEPS 32 /* after having looked in vain */

struct wire_request {
    uint32_t magic;
    uint16_t flags, kind;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));

struct wire_extended {
    uint32_t magic;
    uint16_t flags, kind;
    uint64_t cookie, offset, length;
} __attribute__((packed));

/* `length` more bytes into `to`; 0 when the connection is over. */
static int receive_exactly(struct native_nbd *nbd, uint8_t *to, size_t length)
{
    while (length) {
        ssize_t count = recv(nbd->sock, to, length, 0);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return 0;
        to += count;
        length -= (size_t)count;
    }
    return 1;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static _Atomic int lookers;

/* recv for a moment; -1: nothing came. */
static ssize_t look(struct native_nbd *nbd, uint8_t *to, size_t length)
{
    uint64_t end = now_ns() + LOOK_NS;
    ssize_t count = -1;
    if (atomic_fetch_add(&lookers, 1) < nbd->lookers_max)
        do
            count = recv(nbd->sock, to, length, MSG_DONTWAIT);
        while (count < 0 && errno == EAGAIN && now_ns() < end);
    atomic_fetch_sub(&lookers, 1);
    return count;
}

/* recv. A client with one request under way sends the next one as soon as it has its answer: sooner
 * than a processor falls asleep and is woken. So look for a moment before sleeping, but not again
 * for a while where that was in vain: the client thinks longer, or others need the processor. */
static ssize_t receive(struct native_nbd *nbd, uint8_t *to, size_t length)
{
    if (nbd->sleeps)
        nbd->sleeps--;
    else {
        ssize_t count = look(nbd, to, length);
        if (count >= 0)
            return count;
        nbd->sleeps = SLEEPS;
    }
    return recv(nbd->sock, to, length, 0);
}

/* Make room, wait for more bytes; 0 when the connection is over. */
int nbd_receive_more(struct native_nbd *nbd)
{
    size_t rest = nbd->end - nbd->start;
    if (nbd->start && (!rest || nbd->end == NBD_RECEIVE_BYTES)) {
        memmove(nbd->buffer, nbd->buffer + nbd->start, rest);
        nbd->start = 0;
        nbd->end = rest;
    }
    size_t room = NBD_RECEIVE_BYTES - nbd->end;
    ssize_t count;
    do
        count = receive(nbd, nbd->buffer + nbd->end,
                        room < NBD_PIECE_BYTES ? room : NBD_PIECE_BYTES);
    while (count < 0 && errno == EINTR);
    if (count <= 0)
        return 0;
    nbd->end += (size_t)count;
    return 1;
}

/* Answer what is done, wait for more bytes; 0 when the connection is over. */
int nbd_receive(struct native_nbd *nbd)
{
    native_nbd_send(nbd);
    nbd_release(nbd);
    if (nbd->broken || atomic_load(&nbd->closing))
        return 0;
    return nbd_receive_more(nbd);
}

static int receive_nothing(struct native_nbd *nbd, size_t length)
{
    while (length) {
        size_t part = length < NBD_RECEIVE_BYTES ? length : NBD_RECEIVE_BYTES;
        if (!receive_exactly(nbd, nbd->buffer, part))
            return 0;
        length -= part;
    }
    return 1;
}

/* A WRITE that is longer than the receive buffer gets a buffer of its own, if there is memory. */
static int receive_long(struct native_nbd *nbd, size_t header, size_t length)
{
    size_t have = nbd->end - nbd->start - header;
    native_nbd_send(nbd);
    nbd_release(nbd);
    nbd_memory_take(&nbd->payload, length);
    uint8_t *data = nbd->data = nbd->payload.data;
    if (data)
        memcpy(data, nbd->buffer + nbd->start + header, have);
    nbd->start = nbd->end = 0;
    return data ? receive_exactly(nbd, data + have, length - have)
                : receive_nothing(nbd, length - have);
}

/* 0: out of step. */
static int parse(struct native_nbd *nbd, const uint8_t *bytes)
{
    struct wire_request compact;
    struct wire_extended wire;
    if (nbd->extended)
        memcpy(&wire, bytes, sizeof wire);
    else {
        memcpy(&compact, bytes, sizeof compact);
        memcpy(&wire, &compact, offsetof(struct wire_extended, length));
        wire.length = htobe64(be32toh(compact.length));
    }
    nbd->request = (struct native_nbd_request){
        .cookie = be64toh(wire.cookie), .offset = be64toh(wire.offset),
        .length = be64toh(wire.length), .kind = be16toh(wire.kind), .flags = be16toh(wire.flags),
    };
    return be32toh(wire.magic) == (nbd->extended ? EXTENDED_MAGIC : REQUEST_MAGIC);
}

/* Extended headers say it by a flag; a WRITE has data anyway. */
int nbd_has_payload(struct native_nbd *nbd)
{
    return nbd->extended && nbd->request.flags & NBD_FLAG_PAYLOAD;
}

size_t nbd_trailer_bytes(struct native_nbd *nbd)
{
    size_t within = nbd->request.offset % INTEGRITY_BLOCK_BYTES;
    size_t end = within + nbd->request.length + INTEGRITY_BLOCK_BYTES - 1;
    return nbd->request.length ? end / INTEGRITY_BLOCK_BYTES * sizeof(uint32_t) : 0;
}

int nbd_has_data(struct native_nbd *nbd)
{
    uint16_t kind = nbd->request.kind;
    return kind == NBD_WRITE || kind == NBD_WRITE_CHECKED ||
           (kind == NBD_COMPARE && nbd->logged_in) || nbd_has_payload(nbd);
}

/* Take the next request: 1 taken, 0 more bytes are needed, -1 the connection is over. */
int nbd_take(struct native_nbd *nbd)
{
    struct native_nbd_request *request = &nbd->request;
    size_t have = nbd->end - nbd->start;
    size_t header = nbd->extended ? sizeof(struct wire_extended) : sizeof(struct wire_request);
    if (have < header)
        return 0;
    if (!parse(nbd, nbd->buffer + nbd->start))
        return -1;
    nbd->data = NULL;
    int checked = request->kind == NBD_WRITE_CHECKED;
    if (!nbd_has_data(nbd)) {
        nbd->start += header;
        return 1;
    }
    if (request->length > NBD_PAYLOAD_MAX)
        return -1;
    size_t body = request->length + (checked ? nbd_trailer_bytes(nbd) : 0);
    if (header + body > NBD_RECEIVE_BYTES) {
        if (!receive_long(nbd, header, body))
            return -1;
        nbd->trailer = nbd->data ? (uint8_t *)nbd->data + request->length : NULL;
        return 1;
    }
    if (have < header + body) {
        if (nbd->start + header + body > NBD_RECEIVE_BYTES) {
            native_nbd_send(nbd);
            memmove(nbd->buffer, nbd->buffer + nbd->start, have);
            nbd->start = 0;
            nbd->end = have;
        }
        return 0;
    }
    nbd->data = nbd->buffer + nbd->start + header;
    nbd->trailer = nbd->buffer + nbd->start + header + request->length;
    nbd->start += header + body;
    return 1;
}
