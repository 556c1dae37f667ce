/* Requests that Python answers itself, past libfuse (see fuse.h).
 *
 * They are taken out where the session reads: libfuse is told that its read was interrupted. Only
 * the reader adds and takes, so the queue needs no lock; it is emptied after each read.
 */
#define _GNU_SOURCE
#include "fuse.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct diverted {
    struct diverted *next;
    struct fuse_current request;
    size_t length;
    char body[];
};

static struct diverted *first, **last = &first;
static uint64_t opcodes;

void divert_reset(void)
{
    while (first) {
        struct diverted *entry = first;
        first = entry->next;
        free(entry);
    }
    last = &first;
}

int divert_message(const struct fuse_current *request, const void *body, size_t length)
{
    if (request->opcode > 63 || !(opcodes >> request->opcode & 1))
        return 0;
    struct diverted *entry = malloc(sizeof *entry + length);
    if (!entry) {
        native_fuse_reply(request->unique, ENOMEM, NULL, 0);
        return 1;
    }
    *entry = (struct diverted){.request = *request, .length = length};
    memcpy(entry->body, body, length);
    *last = entry;
    last = &entry->next;
    return 1;
}

void native_fuse_divert(uint64_t wanted)
{
    opcodes = wanted;
}

/* The length of the first one's body; -1: there is none. */
ssize_t native_fuse_diverted(void)
{
    return first ? (ssize_t)first->length : -1;
}

/* Take the first one; `body` has room for its length. */
void native_fuse_take_diverted(void *request, void *body)
{
    struct diverted *entry = first;
    memcpy(request, &entry->request, sizeof entry->request);
    memcpy(body, entry->body, entry->length);
    first = entry->next;
    if (!first)
        last = &first;
    free(entry);
}

/* Answer a request; 0 or an errno (ENOENT: nobody waits for it any more). */
int native_fuse_reply(uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header header = {(uint32_t)(sizeof header + length), -error, unique};
    struct iovec iov[2] = {{&header, sizeof header}, {(void *)data, length}};
    return gate_writev(native_fuse_session_fd(), iov, length ? 2 : 1) < 0 ? errno : 0;
}
