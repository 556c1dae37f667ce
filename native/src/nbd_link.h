/* The client's side of one NBD connection in transmission; what it is for stands in native/link.py.
 *
 * nbd_link.c         requests that are under way, and sending them
 * nbd_link_receive.c replies: taken from many bytes at once, data moved straight to its place
 *
 * A link belongs to one thread, and nothing here blocks. Memory that a request names (its data, its
 * checksums) is the caller's, and must stay until the request is done, moved elsewhere
 * (native_link_move), or the link is freed: nothing touches it later.
 */
#ifndef NATIVE_NBD_LINK_H
#define NATIVE_NBD_LINK_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define LINK_REQUESTS_MAX 1024 /* under way; a power of two */
#define LINK_BUFFER_BYTES ((size_t)256 << 10)
#define LINK_SHORT_BYTES 65536u /* a READ up to this may pass through the buffer */
#define LINK_PARTS_MAX 512
#define LINK_HEADER_BYTES 28
#define LINK_REPLY_BYTES 16
#define LINK_BLOCK_BYTES 4096u /* what one checksum covers */

/* How data travels. */
enum {
    LINK_NO_DATA = 0,
    LINK_SENDS = 1,    /* behind the request */
    LINK_RECEIVES = 2, /* behind the reply, unless that is an error */
    LINK_TRAILER = 4,  /* the checksums follow the data, big endian */
    LINK_COMPARES = 8, /* the error LINK_MISMATCH is followed by the place (u64), which is dropped */
};
enum { LINK_FREE, LINK_POSTED, LINK_SENT }; /* state of a request; the last one: whole */
#define LINK_PLACE_BYTES 8u
#define LINK_MISMATCH 84u /* EILSEQ: the data of a READ is not what its trailer says; of a request
                             that compares: something else is there */

/* What native_link_receive returns besides a number of replies. */
enum {
    LINK_ENDED = -1, /* by the peer, or broken */
    LINK_WRONG = -2, /* a reply that nobody waits for: out of step */
};

struct link_request {
    uint64_t cookie;  /* on the wire; the lowest bits are the place in the table */
    uint64_t tag;     /* the caller's name for it */
    uint64_t sent_ns; /* when it was posted */
    uint8_t *data;
    uint32_t *sums;   /* CRC-32C of each block of `data`, or NULL */
    uint32_t length;  /* of `data` */
    uint32_t trailer_length; /* of `sums`, if they travel */
    uint16_t next, previous; /* in the order of posting */
    uint8_t state, ways;
    uint8_t header[LINK_HEADER_BYTES];
};

struct native_link {
    int sock;
    uint64_t serial;
    struct link_request *requests; /* LINK_REQUESTS_MAX and one: the head of the list */
    uint16_t free_list; /* linked by `next` */
    uint16_t unsent;    /* the first request that is not sent whole; the head: none */
    size_t sent;        /* bytes of it that are sent */

    uint8_t *buffer; /* received, not yet taken: [start, end) */
    size_t start, end;
    struct link_request *current; /* whose data comes now */
    size_t have, summed;          /* of its data and trailer; bytes of data with a checksum */
    size_t dropped;               /* so many bytes that come next are nobody's */

    int done_count;
    uint64_t *done_tags;
    uint32_t *done_errors;
    uint64_t service_ns; /* from post to reply, averaged over the last dozen or so */
    uint64_t replies, failures, read_bytes, written_bytes;
};

/* nbd_link.c */
struct link_request *link_find(struct native_link *link, uint64_t cookie);
void link_done(struct native_link *link, struct link_request *request, uint32_t error);
uint64_t link_now_ns(void);

/* For Python. */
struct native_link *native_link_open(int sock, const uint8_t *first, size_t length);
void native_link_free(struct native_link *link);
/* The place of the request in the table; -1 if that is full. `sums` may be NULL without a trailer;
 * those of a request that sends are computed here. */
int native_link_post(struct native_link *link, uint64_t tag, uint32_t kind, uint32_t flags,
                     uint64_t offset, uint32_t length, int ways, void *data, uint32_t *sums);
/* The memory of a request that is still under way is elsewhere from now on; what has been received
 * of its data comes along, what has been of its checksums must be there. 0 if it is not. */
int native_link_move(struct native_link *link, int place, uint64_t tag, void *data, uint32_t *sums);
/* 1: something is left, because the socket takes no more now; 0: nothing; LINK_ENDED. */
int native_link_send(struct native_link *link);
/* How many replies came: tags and errors are in the arrays until the next call. */
int native_link_receive(struct native_link *link);
uint64_t *native_link_tags(struct native_link *link);
uint32_t *native_link_errors(struct native_link *link);
/* service_ns, replies, failures, read_bytes, written_bytes */
void native_link_counters(struct native_link *link, uint64_t *out);
#endif
