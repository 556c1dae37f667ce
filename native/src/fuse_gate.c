/* The gate of rule G2 in front of every answer that may fill a kernel cache or grant a lock (see
 * fuse.h): what it tells is true only as long as the lease lasts.
 *
 * Invariants: such an answer is written only between count-in and count-out of an open
 * gate; each answer is written once, as it was given or as an error; kept bytes are bounded.
 * Answers are kept in order; there is no order between answers, so others may pass them.
 */
#define _GNU_SOURCE
#include "fuse.h"

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* Newer than some headers. */
enum { OPCODE_SYNCFS = 50, OPCODE_TMPFILE = 51, OPCODE_STATX = 52 };

struct kept {
    struct kept *next;
    int fd;
    size_t length;
    char data[];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct kept *first, **last = &first;
static _Atomic uint64_t kept_count;
static uint64_t kept_bytes, kept_total, sent_total, refused_total;
static struct native_gate *_Atomic gate;

void gate_reset(void)
{
    pthread_mutex_lock(&lock);
    while (first) {
        struct kept *entry = first;
        first = entry->next;
        free(entry);
    }
    last = &first;
    atomic_store(&kept_count, 0);
    kept_bytes = kept_total = sent_total = refused_total = 0;
    pthread_mutex_unlock(&lock);
}

/* All else passes at any time: a caller must not wait for nothing, and a purge waits for laundered
 * WRITEs. What we do not know is taken to fill a cache. */
static int needs_a_lease(const struct fuse_out_header *header)
{
    uint32_t operation_flags;
    if (!header->unique || header->error)
        return 0;
    switch (requests_opcode(header->unique, &operation_flags)) {
    case FUSE_WRITE:
        return !(operation_flags & FUSE_WRITE_CACHE);
    case FUSE_INIT:
    case FUSE_DESTROY:
    case FUSE_OPEN:
    case FUSE_OPENDIR:
    case FUSE_FLUSH:
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR:
    case FUSE_STATFS:
    case FUSE_ACCESS:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_RENAME:
    case FUSE_RENAME2:
    case FUSE_SETXATTR:
    case FUSE_REMOVEXATTR:
    case FUSE_FALLOCATE:
    case FUSE_POLL:
    case FUSE_BMAP:
    case OPCODE_SYNCFS:
        return 0;
    default:
        return 1;
    }
}

static ssize_t write_answer(int fd, const struct iovec *iov, int count, uint64_t unique)
{
    ssize_t result;
    do
        result = writev(fd, iov, count);
    while (result < 0 && errno == EINTR);
    int error = errno;
    requests_finished(unique);
    errno = error;
    return result;
}

static void write_error(int fd, uint64_t unique, int error)
{
    struct fuse_out_header header = {sizeof header, -error, unique};
    struct iovec iov = {&header, sizeof header};
    write_answer(fd, &iov, 1, unique);
}

static uint64_t unique_of(const struct kept *entry)
{
    struct fuse_out_header header;
    memcpy(&header, entry->data, sizeof header);
    return header.unique;
}

/* Unlink and free `*link` (locked). */
static void drop(struct kept **link)
{
    struct kept *entry = *link;
    *link = entry->next;
    if (last == &entry->next)
        last = link;
    kept_count--;
    kept_bytes -= entry->length;
    free(entry);
}

/* Send or refuse what is kept, as far as the gate allows (locked). */
static void flush_kept(void)
{
    struct native_gate *page = atomic_load(&gate);
    while (first) {
        int barred = page && atomic_load(&page->word) == GATE_BARRED;
        if (!barred && page && !native_gate_pass(page))
            return;
        if (barred) {
            write_error(first->fd, unique_of(first), ENOTCONN);
            refused_total++;
        } else {
            struct iovec iov = {first->data, first->length};
            write_answer(first->fd, &iov, 1, unique_of(first));
            sent_total++;
            if (page)
                native_gate_passed(page);
        }
        drop(&first);
    }
}

static void distrust_entry(char *at)
{
    struct fuse_entry_out entry;
    memcpy(&entry, at, sizeof entry);
    entry.entry_valid = entry.attr_valid = 0;
    entry.entry_valid_nsec = entry.attr_valid_nsec = 0;
    memcpy(at, &entry, sizeof entry);
}

static void distrust_listing(char *at, size_t length)
{
    struct fuse_dirent name;
    size_t head = sizeof(struct fuse_entry_out) + offsetof(struct fuse_dirent, name);
    while (length >= head) {
        memcpy(&name, at + sizeof(struct fuse_entry_out), offsetof(struct fuse_dirent, name));
        distrust_entry(at);
        size_t size = FUSE_DIRENT_ALIGN(head + name.namelen);
        if (size >= length)
            return;
        at += size;
        length -= size;
    }
}

/* Names and attributes may change elsewhere while their answer is kept, and the kernel cannot be
 * told of an inode that it does not know yet. So a kept answer is good for its caller only. */
static void distrust(char *data, size_t length)
{
    struct fuse_out_header header;
    uint32_t operation_flags;
    memcpy(&header, data, sizeof header);
    char *body = data + sizeof header;
    length -= sizeof header;
    switch (requests_opcode(header.unique, &operation_flags)) {
    case FUSE_LOOKUP:
    case FUSE_CREATE:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_SYMLINK:
    case FUSE_LINK:
    case OPCODE_TMPFILE:
        if (length >= sizeof(struct fuse_entry_out))
            distrust_entry(body);
        return;
    case FUSE_GETATTR:
    case FUSE_SETATTR:
    case OPCODE_STATX: /* begins as the others do: seconds, nanoseconds */
        if (length >= offsetof(struct fuse_attr_out, dummy))
            memset(body, 0, offsetof(struct fuse_attr_out, dummy));
        return;
    case FUSE_READDIRPLUS:
        distrust_listing(body, length);
        return;
    }
}

/* Copy an answer to the queue (locked); 0 if there is no room. */
static int keep(int fd, const struct iovec *iov, int count, size_t length)
{
    if (kept_bytes + length > GATED_BYTES_MAX || kept_count >= PENDING_MAX)
        return 0;
    struct kept *entry = malloc(sizeof *entry + length);
    if (!entry)
        return 0;
    *entry = (struct kept){.fd = fd, .length = length};
    size_t at = 0;
    for (int i = 0; i < count; at += iov[i++].iov_len)
        memcpy(entry->data + at, iov[i].iov_base, iov[i].iov_len);
    distrust(entry->data, length);
    *last = entry;
    last = &entry->next;
    kept_count++;
    kept_total++;
    kept_bytes += length;
    requests_mark_answered(unique_of(entry));
    return 1;
}

static ssize_t keep_or_refuse(int fd, struct iovec *iov, int count, uint64_t unique)
{
    struct native_gate *page = atomic_load(&gate);
    size_t length = 0;
    for (int i = 0; i < count; i++)
        length += iov[i].iov_len;
    pthread_mutex_lock(&lock);
    int barred = page && atomic_load(&page->word) == GATE_BARRED;
    if (barred || !keep(fd, iov, count, length)) {
        write_error(fd, unique, barred ? ENOTCONN : EIO);
        refused_total++;
    }
    pthread_mutex_unlock(&lock);
    return (ssize_t)length;
}

ssize_t gate_writev(int fd, struct iovec *iov, int count)
{
    struct fuse_out_header header;
    memcpy(&header, iov[0].iov_base, sizeof header);
    struct native_gate *page = atomic_load(&gate);
    if (!page || !needs_a_lease(&header))
        return write_answer(fd, iov, count, header.unique);
    if (!native_gate_pass(page))
        return keep_or_refuse(fd, iov, count, header.unique);
    ssize_t result = write_answer(fd, iov, count, header.unique);
    int error = errno;
    native_gate_passed(page);
    if (atomic_load(&kept_count))
        native_fuse_gate_flush();
    errno = error;
    return result;
}

void native_fuse_set_gate(void *address)
{
    atomic_store(&gate, address);
    native_fuse_gate_flush();
}

size_t native_fuse_gate_flush(void)
{
    pthread_mutex_lock(&lock);
    flush_kept();
    size_t remaining = kept_count;
    pthread_mutex_unlock(&lock);
    return remaining;
}

/* What the answer counts - lookups, a handle - is counted by the daemon already, so the kernel must
 * learn of it to give it back. A kept answer of this kind is not believed afterwards. */
static int is_counted(uint64_t unique)
{
    uint32_t operation_flags;
    switch (requests_opcode(unique, &operation_flags)) {
    case FUSE_LOOKUP:
    case FUSE_CREATE:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_SYMLINK:
    case FUSE_LINK:
        return 1;
    default:
        return 0;
    }
}

int native_fuse_gate_abandon(uint64_t unique, int error)
{
    int found = 0;
    pthread_mutex_lock(&lock);
    for (struct kept **link = &first; *link && !found; link = &(*link)->next)
        if (unique_of(*link) == unique) {
            if (is_counted(unique)) {
                struct iovec iov = {(*link)->data, (*link)->length};
                write_answer((*link)->fd, &iov, 1, unique);
                sent_total++;
            } else {
                write_error((*link)->fd, unique, error);
                refused_total++;
            }
            drop(link);
            found = 1;
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

/* answers, bytes, kept_total, sent_total, refused_total */
void native_fuse_gate_queue(uint64_t *out)
{
    pthread_mutex_lock(&lock);
    out[0] = kept_count;
    out[1] = kept_bytes;
    out[2] = kept_total;
    out[3] = sent_total;
    out[4] = refused_total;
    pthread_mutex_unlock(&lock);
}
