/* Notifications to the FUSE kernel module; the formats stand in native/notify.py.
 * All return 0 or an errno, and may block (see there).
 */
#ifndef NATIVE_NOTIFY_H
#define NATIVE_NOTIFY_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define SWEEP_SLOTS 64

/* Shared by the threads of one sweep. `at[slot]` is the inode that a thread is busy with, or 0. */
struct native_sweep {
    _Atomic uint64_t next, done;
    _Atomic uint64_t at[SWEEP_SLOTS];
    _Atomic int error;
};

int native_notify_inode(int fd, uint64_t inode, int64_t offset, int64_t length);
int native_notify_entry(int fd, uint64_t parent, const char *name, size_t length, uint32_t flags);
int native_notify_delete(int fd, uint64_t parent, uint64_t child, const char *name, size_t length);
int native_notify_epoch(int fd);
int native_notify_prune(int fd, const uint64_t *inodes, size_t count);
int native_notify_sweep(int fd, const uint64_t *inodes, size_t count, struct native_sweep *sweep,
                        unsigned slot);
uint64_t native_notify_sweep_taken(struct native_sweep *sweep);
uint64_t native_notify_sweep_done(struct native_sweep *sweep);
uint64_t native_notify_sweep_at(struct native_sweep *sweep, unsigned slot);
#endif
