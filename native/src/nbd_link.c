/* Requests under way on a client's connection, and sending them (see nbd_link.h).
 *
 * Requests are sent in the order in which they were posted, and only what is sent whole can be
 * answered: so one list has both, and `unsent` says where in it sending goes on.
 */
#define _GNU_SOURCE
#include "nbd_link.h"

#include "crc32c.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define REQUEST_MAGIC 0x25609513u
#define HEAD LINK_REQUESTS_MAX /* of the list */
#define SENDS_MAX 16           /* calls in one native_link_send */

struct wire_request {
    uint32_t magic;
    uint16_t flags, kind;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));

_Static_assert(sizeof(struct wire_request) == LINK_HEADER_BYTES, "the header of a request");

/* NULL without memory. `first` was received behind the handshake. */
struct native_link *native_link_open(int sock, const uint8_t *first, size_t length)
{
    struct native_link *link = calloc(1, sizeof *link);
    if (!link)
        return NULL;
    link->sock = sock;
    link->requests = calloc(LINK_REQUESTS_MAX + 1, sizeof *link->requests);
    link->buffer = malloc(LINK_BUFFER_BYTES);
    link->done_tags = calloc(LINK_REQUESTS_MAX, sizeof *link->done_tags);
    link->done_errors = calloc(LINK_REQUESTS_MAX, sizeof *link->done_errors);
    if (!link->requests || !link->buffer || !link->done_tags || !link->done_errors ||
        length > LINK_BUFFER_BYTES) {
        native_link_free(link);
        return NULL;
    }
    for (uint16_t place = 0; place < LINK_REQUESTS_MAX; place++)
        link->requests[place].next = place + 1;
    link->requests[HEAD].next = link->requests[HEAD].previous = link->unsent = HEAD;
    if (length)
        memcpy(link->buffer, first, length);
    link->end = length;
    return link;
}

void native_link_free(struct native_link *link)
{
    free(link->requests);
    free(link->buffer);
    free(link->done_tags);
    free(link->done_errors);
    free(link);
}

uint64_t link_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void append(struct native_link *link, uint16_t place)
{
    struct link_request *head = &link->requests[HEAD], *request = &link->requests[place];
    request->next = HEAD;
    request->previous = head->previous;
    link->requests[head->previous].next = place;
    head->previous = place;
    if (link->unsent == HEAD) {
        link->unsent = place;
        link->sent = 0;
    }
}

static uint32_t link_blocks(uint32_t length)
{
    return length / LINK_BLOCK_BYTES + !!(length % LINK_BLOCK_BYTES);
}

/* Between the byte order of the wire and ours, if it travels. */
static void swap_trailer(struct link_request *request)
{
    for (uint32_t i = 0; request->sums && i < request->trailer_length / 4; i++)
        request->sums[i] = htobe32(request->sums[i]);
}

int native_link_post(struct native_link *link, uint64_t tag, uint32_t kind, uint32_t flags,
                     uint64_t offset, uint32_t length, int ways, void *data, uint32_t *sums)
{
    uint16_t place = link->free_list;
    if (place == HEAD)
        return -1;
    struct link_request *request = &link->requests[place];
    link->free_list = request->next;
    int has_data = ways & (LINK_SENDS | LINK_RECEIVES);
    *request = (struct link_request){
        .cookie = ++link->serial * LINK_REQUESTS_MAX + place, .tag = tag, .data = data,
        .sent_ns = link_now_ns(), .length = has_data ? length : 0, .state = LINK_POSTED,
        .ways = (uint8_t)ways, .sums = sums,
        .trailer_length = ways & LINK_TRAILER ? link_blocks(length) * 4 : 0,
    };
    struct wire_request wire = {
        htobe32(REQUEST_MAGIC), htobe16((uint16_t)flags), htobe16((uint16_t)kind),
        htobe64(request->cookie), htobe64(offset), htobe32(length),
    };
    memcpy(request->header, &wire, sizeof wire);
    if (sums && ways & LINK_SENDS) {
        native_crc32c_blocks(data, length, LINK_BLOCK_BYTES, sums);
        swap_trailer(request);
    }
    append(link, place);
    return place;
}

int native_link_move(struct native_link *link, int place, uint64_t tag, void *data, uint32_t *sums)
{
    if (place < 0 || place >= LINK_REQUESTS_MAX)
        return 0;
    struct link_request *request = &link->requests[place];
    if (request->state == LINK_FREE || request->tag != tag)
        return 0;
    if (link->current == request)
        memcpy(data, request->data, link->have < request->length ? link->have : request->length);
    request->data = data;
    request->sums = sums;
    return 1;
}

/* ---- sending ---- */

static int add_part(struct iovec *parts, int count, const void *data, size_t length, size_t *skip)
{
    if (*skip >= length) {
        *skip -= length;
        return count;
    }
    parts[count] = (struct iovec){(uint8_t *)data + *skip, length - *skip};
    *skip = 0;
    return count + 1;
}

static size_t wire_length(const struct link_request *request)
{
    size_t behind = request->ways & LINK_SENDS ? request->length + request->trailer_length : 0;
    return LINK_HEADER_BYTES + behind;
}

/* What is to be sent next, as much as `parts` has room for. */
static int gather(struct native_link *link, struct iovec *parts)
{
    int count = 0;
    size_t skip = link->sent;
    for (uint16_t at = link->unsent; at != HEAD && count + 3 <= LINK_PARTS_MAX;
         at = link->requests[at].next) {
        struct link_request *request = &link->requests[at];
        count = add_part(parts, count, request->header, LINK_HEADER_BYTES, &skip);
        if (!(request->ways & LINK_SENDS))
            continue;
        count = add_part(parts, count, request->data, request->length, &skip);
        count = add_part(parts, count, request->sums, request->trailer_length, &skip);
    }
    return count;
}

static void advance(struct native_link *link, size_t count)
{
    link->sent += count;
    while (link->unsent != HEAD) {
        struct link_request *request = &link->requests[link->unsent];
        size_t length = wire_length(request);
        if (link->sent < length)
            return;
        link->sent -= length;
        request->state = LINK_SENT;
        link->unsent = request->next;
    }
}

int native_link_send(struct native_link *link)
{
    struct iovec parts[LINK_PARTS_MAX];
    for (int call = 0; call < SENDS_MAX && link->unsent != HEAD; call++) {
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)gather(link, parts)};
        ssize_t count = sendmsg(link->sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && errno != EAGAIN)
            return LINK_ENDED;
        if (count < 0)
            return 1;
        advance(link, (size_t)count);
    }
    return link->unsent != HEAD;
}

/* ---- for receiving ---- */

/* NULL: there is no such request, or it has not been asked yet. */
struct link_request *link_find(struct native_link *link, uint64_t cookie)
{
    struct link_request *request = &link->requests[cookie % LINK_REQUESTS_MAX];
    return request->state == LINK_SENT && request->cookie == cookie ? request : NULL;
}

/* `data` and `sums` are nobody's concern any more. */
void link_done(struct native_link *link, struct link_request *request, uint32_t error)
{
    swap_trailer(request);
    if (request->ways & LINK_RECEIVES && !error) {
        link->read_bytes += request->length;
        if (request->trailer_length &&
            native_crc32c_verify(request->data, request->length, LINK_BLOCK_BYTES,
                                 request->sums) >= 0)
            error = LINK_MISMATCH;
    }
    if (request->ways & LINK_SENDS && !error)
        link->written_bytes += request->length;
    link->requests[request->next].previous = request->previous;
    link->requests[request->previous].next = request->next;
    request->state = LINK_FREE;
    request->next = link->free_list;
    link->free_list = (uint16_t)(request - link->requests);
    link->done_tags[link->done_count] = request->tag;
    link->done_errors[link->done_count++] = error;
    link->replies++;
    link->failures += !!error;
}

uint64_t *native_link_tags(struct native_link *link)
{
    return link->done_tags;
}

uint32_t *native_link_errors(struct native_link *link)
{
    return link->done_errors;
}

void native_link_counters(struct native_link *link, uint64_t *out)
{
    out[0] = link->service_ns;
    out[1] = link->replies;
    out[2] = link->failures;
    out[3] = link->read_bytes;
    out[4] = link->written_bytes;
}
