/* The transmission phase of one NBD connection; what it is for stands in native/nbd.py.
 *
 * nbd_access.c  the access word of a nexus (rule R5)
 * nbd_alone.c   one request alone on its export
 * nbd_receive.c takes requests from what was received
 * nbd_serve.c   executes them
 * nbd_reply.c   gathers replies and sends them
 * nbd_memory.c  memory for long requests, bounded in total
 * nbd_integrity*.c checksums of what is on the disk (integrity.h)
 *
 * A connection belongs to one thread, which runs without the GIL. The export and the access word
 * are shared between threads.
 */
#ifndef NATIVE_NBD_H
#define NATIVE_NBD_H

#include "integrity.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define NBD_RECEIVE_BYTES (((size_t)4 << 20) + 12288) /* 4 MiB and their checksums need no more */
#define NBD_PIECE_BYTES (((size_t)1 << 20) + 28) /* of one receive: what is executed is warm */
#define NBD_ARENA_BYTES ((size_t)4 << 20)
#define NBD_PAYLOAD_MAX ((uint32_t)64 << 20)
#define NBD_SUMS_MAX (NBD_PAYLOAD_MAX / INTEGRITY_BLOCK_BYTES + 1) /* of one request */
#define NBD_COMPARE_MAX ((uint32_t)64 << 10) /* bytes that are compared */
#define NBD_ALIGNMENT_MAX 4096
#define NBD_PARTS_MAX 512
#define NBD_PARTS_OF_ONE 64 /* that the replies to one request may take */
#define NBD_HEADER_BYTES 128 /* of one reply, at most */
#define NBD_WHY_BYTES 80

enum { NBD_READ, NBD_WRITE, NBD_DISC, NBD_FLUSH, NBD_TRIM, NBD_CACHE, NBD_ZERO, NBD_STATUS };
/* As READ and WRITE, with a trailer: the CRC-32C (u32, big endian) of each piece of the data, which
 * is cut at multiples of 4096 of the disk. After LOGIN, with simple replies. */
enum { NBD_WRITE_CHECKED = 0x4305, NBD_READ_CHECKED = 0x4306 };
enum { NBD_COMPARE = 0x4307 }; /* its data is what must be there, then what to write */
enum { NBD_FLAG_FUA = 1, NBD_FLAG_DF = 4, NBD_FLAG_PAYLOAD = 32 };
enum { ACCESS_READ = 1, ACCESS_WRITE = 2, ACCESS_STALE = 4, ACCESS_CLOSED = 8 };
enum { WIRE_EPERM = 1, WIRE_EIO = 5, WIRE_EINVAL = 22, WIRE_ENOSPC = 28 };
enum { WIRE_EBADMSG = 74, WIRE_ESTALE = 116 }; /* known to our own client only */

/* What native_nbd_run returns. */
enum {
    NBD_ENDED,   /* the connection is over */
    NBD_GATE,    /* the access word was replaced: give the new one, run again */
    NBD_REQUEST, /* Python executes `request`, then calls native_nbd_done */
    NBD_FAILED,  /* a durable WRITE failed with `request.error`; as NBD_REQUEST */
};

struct native_access {
    _Atomic uint32_t word, in_flight;
};

struct native_nbd_export {
    _Atomic uint64_t size_bytes, reads, writes, flushes, read_bytes, written_bytes;
    _Atomic uint64_t refused, refused_writes; /* that came after the bar of their sender */
    _Atomic int32_t fd; /* -1: Python executes everything */
    _Atomic uint32_t read_only;
    _Atomic uint32_t alignment; /* of offsets, lengths and memory; a power of two */
    _Atomic(struct native_integrity *) integrity; /* NULL: none */

    _Atomic uint32_t inside, alone; /* requests that execute; whether one wants to alone */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t turn, waiting, passing; /* of those that had to wait, under the lock */
};

/* native.nbd.Request unpacks it. */
struct native_nbd_request {
    uint64_t cookie, offset, length;
    uint32_t error;
    uint16_t kind, flags;
};

struct nbd_memory {
    uint8_t *data; /* NULL: nothing */
    size_t length;
};

struct native_nbd {
    int sock;
    _Atomic int closing;
    int logged_in, structured, extended, entered, broken; /* extended ones are structured too */
    int refused; /* `request` was taken, and is not executed because all is over */
    int pending; /* `request` was taken and waits for a new access word */
    int alone;   /* `request` executes alone on the export */
    struct native_nbd_export *export;
    struct native_access *access;
    struct native_nbd_request request;
    char why[NBD_WHY_BYTES]; /* `request` fails; for people */
    uint64_t bad; /* address of the block that failed its checksum */
    void *data; /* of `request`: the payload of a WRITE, room for a READ and its trailer */
    const uint8_t *trailer; /* of a WRITE_CHECKED */
    int checked;            /* `request` was one of those with a trailer */
    uint32_t sums[NBD_SUMS_MAX]; /* its finished checksums */

    uint8_t *buffer; /* received, not yet executed: [start, end) */
    size_t start, end;
    int lookers_max; /* connections that may look for more at the same time: a processor is left */
    uint32_t sleeps; /* so often wait for more without looking first */
    struct nbd_memory payload; /* of a request that does not fit into the buffer */
    uint8_t *aligned;          /* where the data of a WRITE is moved that must be aligned */
    int durable_fd; /* the disk as an open file of this connection's, once it is needed; else -1 */

    uint8_t *arena; /* data of READs that wait to be sent */
    struct nbd_memory large; /* of one that does not fit into the arena */
    size_t arena_used;
    uint8_t *headers;
    size_t headers_used, out_bytes;
    struct iovec parts[NBD_PARTS_MAX];
    int part_count;
};

/* nbd_access.c */
uint32_t native_access_enter(struct native_access *access);
void native_access_leave(struct native_access *access);
uint32_t native_access_word(struct native_access *access);
void native_access_set(struct native_access *access, uint32_t word);
uint32_t native_access_in_flight(struct native_access *access);
void native_access_wait_idle(struct native_access *access);

/* nbd_alone.c */
void nbd_join(struct native_nbd_export *export);
void nbd_part(struct native_nbd_export *export);
void nbd_begin_alone(struct native_nbd_export *export); /* inside of nothing */
void nbd_end_alone(struct native_nbd_export *export);

/* nbd_memory.c */
/* Nothing may be held, and the gate must be left: it may wait. `data` is NULL without memory. */
void nbd_memory_take(struct nbd_memory *memory, size_t length);
void nbd_memory_free(struct nbd_memory *memory);
void native_nbd_set_memory_max(uint64_t bytes, uint32_t wait_ms);
uint64_t native_nbd_memory_used(void);

/* nbd_receive.c */
/* Take the next request into `request`: 1 taken, 0 more bytes are needed, -1 the connection is
 * over. */
int nbd_take(struct native_nbd *nbd);
/* Bytes of the trailer of `request`, were it one with a trailer. */
size_t nbd_trailer_bytes(struct native_nbd *nbd);
/* Data comes with `request`. */
int nbd_has_data(struct native_nbd *nbd);
/* It was said to come by a flag of extended headers. */
int nbd_has_payload(struct native_nbd *nbd);
/* Answer what is done, wait for more bytes; 0 when the connection is over. */
int nbd_receive(struct native_nbd *nbd);
/* The same without answering. */
int nbd_receive_more(struct native_nbd *nbd);

/* nbd_reply.c */
/* Send what is in the way of the replies to one more request. */
void nbd_make_room(struct native_nbd *nbd);
/* Memory for the data of one READ, or NULL; sends first what is in the way. */
uint8_t *nbd_room(struct native_nbd *nbd, size_t length);
/* Nothing waits to be sent any more: its memory may be used again. */
void nbd_release(struct native_nbd *nbd);
/* An error says why, where the client has agreed on replies that can. */
void nbd_reply(struct native_nbd *nbd, uint64_t cookie, uint32_t error);
void nbd_reply_read(struct native_nbd *nbd, uint64_t cookie, uint64_t offset, uint8_t *data,
                    size_t length);
void nbd_reply_hole(struct native_nbd *nbd, uint64_t cookie, uint64_t offset, uint32_t length,
                    int last);
void nbd_reply_data(struct native_nbd *nbd, uint64_t cookie, uint64_t offset, uint8_t *data,
                    size_t length, int last);

/* For Python. */
enum { NBD_SIMPLE, NBD_STRUCTURED, NBD_EXTENDED }; /* style of headers */
struct native_nbd *native_nbd_open(int sock, struct native_nbd_export *export, int logged_in,
                                   int style, const uint8_t *first, size_t length);
void native_nbd_free(struct native_nbd *nbd);
void native_nbd_set_access(struct native_nbd *nbd, struct native_access *access);
int native_nbd_run(struct native_nbd *nbd);
void native_nbd_count_late(struct native_nbd *nbd, uint32_t seconds);
void *native_nbd_request_of(struct native_nbd *nbd);
void *native_nbd_data_of(struct native_nbd *nbd);
void native_nbd_why(struct native_nbd *nbd, const char *text);
void native_nbd_done(struct native_nbd *nbd, uint32_t error);
void native_nbd_chunk(struct native_nbd *nbd, int type, int last, const uint8_t *data,
                      size_t length);
void native_nbd_put(struct native_nbd *nbd, const uint8_t *data, size_t length);
void native_nbd_leave(struct native_nbd *nbd);
void native_nbd_send(struct native_nbd *nbd);
void native_nbd_close(struct native_nbd *nbd);
void native_nbd_export_init(struct native_nbd_export *export);
void native_nbd_export_set(struct native_nbd_export *export, int fd, uint64_t size_bytes,
                           int read_only, uint32_t alignment);
void native_nbd_export_protect(struct native_nbd_export *export, struct native_integrity *area);
void native_nbd_counters(struct native_nbd_export *export, uint64_t *out);
#endif
