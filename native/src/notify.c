/* See notify.h. The structures are written out because older kernel headers lack the newer ones. */
#include "notify.h"

#include <errno.h>
#include <sys/uio.h>

enum { INVAL_INODE = 2, INVAL_ENTRY = 3, DELETE = 6, INC_EPOCH = 8, PRUNE = 9 };

struct header {
    uint32_t length;
    int32_t code;
    uint64_t unique;
};

static int send(int fd, int code, struct iovec *iov, int count)
{
    struct header header = {.code = code};
    size_t length = sizeof header;
    iov[0] = (struct iovec){&header, sizeof header};
    for (int i = 1; i < count; i++)
        length += iov[i].iov_len;
    header.length = (uint32_t)length;
    while (writev(fd, iov, count) < 0)
        if (errno != EINTR)
            return errno;
    return 0;
}

int native_notify_inode(int fd, uint64_t inode, int64_t offset, int64_t length)
{
    struct {
        uint64_t inode;
        int64_t offset, length;
    } body = {inode, offset, length};
    struct iovec iov[2] = {{0}, {&body, sizeof body}};
    return send(fd, INVAL_INODE, iov, 2);
}

int native_notify_entry(int fd, uint64_t parent, const char *name, size_t length, uint32_t flags)
{
    struct {
        uint64_t parent;
        uint32_t length, flags;
    } body = {parent, (uint32_t)length, flags};
    struct iovec iov[4] = {{0}, {&body, sizeof body}, {(char *)name, length}, {"", 1}};
    return send(fd, INVAL_ENTRY, iov, 4);
}

int native_notify_delete(int fd, uint64_t parent, uint64_t child, const char *name, size_t length)
{
    struct {
        uint64_t parent, child;
        uint32_t length, zero;
    } body = {parent, child, (uint32_t)length, 0};
    struct iovec iov[4] = {{0}, {&body, sizeof body}, {(char *)name, length}, {"", 1}};
    return send(fd, DELETE, iov, 4);
}

int native_notify_epoch(int fd)
{
    struct iovec iov[1];
    return send(fd, INC_EPOCH, iov, 1);
}

int native_notify_prune(int fd, const uint64_t *inodes, size_t count)
{
    struct {
        uint32_t count, zero;
        uint64_t spare;
    } body = {(uint32_t)count, 0, 0};
    struct iovec iov[3] = {{0}, {&body, sizeof body}, {(void *)inodes, count * sizeof *inodes}};
    return send(fd, PRUNE, iov, 3);
}

int native_notify_sweep(int fd, const uint64_t *inodes, size_t count, struct native_sweep *sweep,
                        unsigned slot)
{
    int none = 0;
    if (slot >= SWEEP_SLOTS)
        return EINVAL;
    while (!atomic_load(&sweep->error)) {
        uint64_t index = atomic_fetch_add(&sweep->next, 1);
        if (index >= count)
            break;
        uint64_t inode = atomic_load_explicit((const _Atomic uint64_t *)&inodes[index],
                                              memory_order_relaxed);
        atomic_store(&sweep->at[slot], inode);
        int error = inode ? native_notify_inode(fd, inode, 0, 0) : 0;
        atomic_store(&sweep->at[slot], 0);
        if (error && error != ENOENT)
            atomic_compare_exchange_strong(&sweep->error, &none, error);
        else
            atomic_fetch_add(&sweep->done, 1);
    }
    return atomic_load(&sweep->error);
}

uint64_t native_notify_sweep_taken(struct native_sweep *sweep)
{
    return atomic_load(&sweep->next);
}

uint64_t native_notify_sweep_done(struct native_sweep *sweep)
{
    return atomic_load(&sweep->done);
}

uint64_t native_notify_sweep_at(struct native_sweep *sweep, unsigned slot)
{
    return slot < SWEEP_SLOTS ? atomic_load(&sweep->at[slot]) : 0;
}
