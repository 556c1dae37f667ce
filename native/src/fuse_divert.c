/* Who gets a message: Python at once, or libfuse (see fuse.h).
 *
 * Every message is read into one buffer, which has one of two takers: `native_fuse_read` for the
 * operations in `opcodes`, the session's read for all others, and for errors. There is one message at
 * a time, and one reader, so no lock is needed.
 */
#define _GNU_SOURCE
#include "fuse.h"

#include <errno.h>
#include <string.h>

#define MESSAGE_BYTES ((size_t)(1 << 20) + 4096) /* the most that is negotiated, and its headers */

enum { PIECES_MAX = 64 };
enum { NOTHING = -1, FOR_LIBFUSE = -2 }; /* native.fuse knows them too */

static enum { EMPTY, FOR_PYTHON, KEPT } state;
static unsigned char message[MESSAGE_BYTES] __attribute__((aligned(4096)));
static ssize_t length; /* or a negative errno */
static uint64_t opcodes;

void divert_reset(void)
{
    state = EMPTY;
}

static void receive(void)
{
    const struct fuse_current *request = NULL;
    length = session_receive(message, MESSAGE_BYTES, &request);
    if (length < 0) {
        /* EAGAIN: the request that made it readable was withdrawn. */
        if (errno == EAGAIN || errno == EINTR)
            return;
        length = -errno;
    }
    state = request && request->opcode < 64 && opcodes >> request->opcode & 1 ? FOR_PYTHON : KEPT;
}

ssize_t divert_read(void *buffer, size_t size)
{
    if (state == EMPTY)
        receive();
    if (state != KEPT) {
        errno = EINTR;
        return -1;
    }
    state = EMPTY;
    if (length < 0 || (size_t)length > size) {
        errno = length < 0 ? (int)-length : EIO;
        return -1;
    }
    memcpy(buffer, message, (size_t)length);
    return length;
}

void native_fuse_divert(uint64_t wanted)
{
    opcodes = wanted;
}

void *native_fuse_message(void)
{
    return message + sizeof(struct fuse_in_header);
}

/* Read a message. The length of its body if it is Python's (see native_fuse_current and
 * native_fuse_message; valid until the next call); NOTHING; or FOR_LIBFUSE, which reads it now. */
ssize_t native_fuse_read(void)
{
    if (state == EMPTY)
        receive();
    if (state != FOR_PYTHON)
        return state == EMPTY ? NOTHING : FOR_LIBFUSE;
    state = EMPTY;
    return length - (ssize_t)sizeof(struct fuse_in_header);
}

/* Answer a request; 0 or an errno (ENOENT: nobody waits for it any more). */
int native_fuse_reply(uint64_t unique, int error, const void *data, size_t size)
{
    struct fuse_out_header header = {(uint32_t)(sizeof header + size), -error, unique};
    struct iovec iov[2] = {{&header, sizeof header}, {(void *)data, size}};
    return gate_writev(native_fuse_session_fd(), iov, size ? 2 : 1) < 0 ? errno : 0;
}

/* As native_fuse_reply with data that lies in at most PIECES_MAX pieces. */
int native_fuse_reply_pieces(uint64_t unique, void **data, const size_t *sizes, int count)
{
    struct fuse_out_header header = {sizeof header, 0, unique};
    struct iovec iov[1 + PIECES_MAX] = {{&header, sizeof header}};
    for (int i = 0; i < count; i++) {
        iov[i + 1] = (struct iovec){data[i], sizes[i]};
        header.len += (uint32_t)sizes[i];
    }
    return gate_writev(native_fuse_session_fd(), iov, 1 + count) < 0 ? errno : 0;
}
