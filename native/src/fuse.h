/* The session extension below pyfuse3; what it is for stands in native/fuse.py.
 *
 * fuse_session.c   interposes fuse_session_new, owns the session's read and writev, edits INIT
 * fuse_requests.c  parses requests, the shared table of unanswered ones, interrupts
 * fuse_divert.c    requests that Python answers past libfuse; the one place that reads messages
 * fuse_gate.c      answers that fill a kernel cache or grant a lock pass the lease gate or are kept
 *
 * The reader is one thread; answers and the functions for Python may come from any.
 */
#ifndef NATIVE_FUSE_H
#define NATIVE_FUSE_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "gate.h"

#define PENDING_MAX 65536u
#define GATED_BYTES_MAX ((size_t)512 << 20)

/* The request being dispatched; native.fuse.Request unpacks it. */
struct fuse_current {
    uint64_t unique, inode, handle, offset, lock_owner;
    uint32_t opcode, size, flags, operation_flags, uid, gid, pid, padding;
};

/* A row of the table of unanswered requests; the layout stands in native/requests.py. */
struct pending_row {
    _Atomic uint64_t unique;
    uint64_t inode, handle, offset, start_ns;
    uint32_t size, opcode, operation_flags, pid;
    _Atomic uint32_t state;
    uint32_t zero;
};

_Static_assert(sizeof(struct pending_row) == 64, "the layout is shared between processes");

enum { STATE_INTERRUPTED = 1, STATE_ANSWERED = 2 };

/* fuse_requests.c */
int requests_reset(void);
/* Before a message is read, and again when it is listed. */
void requests_reading(void);
/* Parses a message and lists it; the result stays valid until the next one. */
const struct fuse_current *requests_arrived(const void *message, size_t length);
/* Both are 0 for an unknown unique. */
uint32_t requests_opcode(uint64_t unique, uint32_t *operation_flags);
void requests_mark_answered(uint64_t unique);
void requests_finished(uint64_t unique);

/* fuse_session.c */
/* As read(2) of the session; `request`: what was read, if it is a whole message. */
ssize_t session_receive(void *buffer, size_t length, const struct fuse_current **request);

/* fuse_divert.c */
void divert_reset(void);
/* What libfuse reads: EINTR if there is nothing for it. */
ssize_t divert_read(void *buffer, size_t size);

/* fuse_gate.c */
void gate_reset(void);
/* As writev(2), for an answer or a notification. */
ssize_t gate_writev(int fd, struct iovec *iov, int count);

/* For Python. */
void native_fuse_configure(uint64_t set, uint64_t clear, uint32_t max_background,
                           uint32_t congestion_threshold, uint32_t max_readahead,
                           uint32_t time_granularity);
int native_fuse_interposed(void);
int native_fuse_session_fd(void);
void native_fuse_info(void *out);
void *native_fuse_current(void);
int native_fuse_table_fd(void);
int native_fuse_interrupt_fd(void);
size_t native_fuse_take_interrupts(uint64_t *out, size_t max);
uint32_t native_fuse_request_state(uint64_t unique);
uint32_t native_fuse_request_pid(uint64_t unique);
void native_fuse_divert(uint64_t opcodes);
void *native_fuse_message(void);
ssize_t native_fuse_read(void);
int native_fuse_reply(uint64_t unique, int error, const void *data, size_t size);
int native_fuse_reply_pieces(uint64_t unique, void **data, const size_t *sizes, int count);
void native_fuse_set_gate(void *gate);
size_t native_fuse_gate_flush(void);
int native_fuse_gate_abandon(uint64_t unique, int error);
void native_fuse_gate_queue(uint64_t *out);
#endif
