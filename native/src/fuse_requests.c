/* Requests as they are read, and the table of those without an answer (see fuse.h).
 *
 * Rows live in a memfd that other processes map; the index from unique to row is private. A row is
 * published by storing its unique last and withdrawn by clearing it first.
 */
#define _GNU_SOURCE
#include "fuse.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define BUCKETS 65536u
#define NONE UINT32_MAX

struct table {
    _Atomic uint64_t rows_in_use, count, reads;
    uint64_t spare[5];
    struct pending_row rows[PENDING_MAX];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct table *table;
static int table_fd = -1, interrupt_fd = -1;
static uint32_t buckets[BUCKETS], next_row[PENDING_MAX], free_row;
/* Each unanswered request is in it at most once. */
static uint64_t interrupts[PENDING_MAX];
static uint32_t interrupt_count;
static struct fuse_current current;

static uint32_t bucket_of(uint64_t unique)
{
    return (uint32_t)((unique * 0x9E3779B97F4A7C15u) >> 48) % BUCKETS;
}

static struct pending_row *row_of(uint64_t unique)
{
    if (!table || !unique)
        return NULL;
    for (uint32_t at = buckets[bucket_of(unique)]; at != NONE; at = next_row[at])
        if (atomic_load_explicit(&table->rows[at].unique, memory_order_relaxed) == unique)
            return &table->rows[at];
    return NULL;
}

/* A new session: forget everything; 0 or an errno. */
int requests_reset(void)
{
    pthread_mutex_lock(&lock);
    int error = 0;
    if (table_fd < 0) {
        table_fd = memfd_create("fuse-requests", MFD_CLOEXEC);
        interrupt_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (table_fd < 0 || interrupt_fd < 0 || ftruncate(table_fd, sizeof(struct table)) < 0)
            error = errno;
        void *memory = mmap(NULL, sizeof(struct table), PROT_READ | PROT_WRITE, MAP_SHARED,
                            table_fd, 0);
        if (memory == MAP_FAILED)
            error = errno;
        else
            table = memory;
    }
    if (table) {
        uint64_t used = atomic_load(&table->rows_in_use);
        memset(table->rows, 0, used * sizeof(struct pending_row));
        atomic_store(&table->rows_in_use, 0);
        atomic_store(&table->count, 0);
    }
    memset(buckets, 0xFF, sizeof buckets);
    free_row = NONE;
    interrupt_count = 0;
    pthread_mutex_unlock(&lock);
    return error;
}

static void insert(const struct fuse_current *request)
{
    uint64_t used = atomic_load_explicit(&table->rows_in_use, memory_order_relaxed);
    uint32_t at = free_row;
    if (at != NONE)
        free_row = next_row[at];
    else if (used < PENDING_MAX)
        at = (uint32_t)used;
    else
        return; /* served, but not listed */
    struct pending_row *row = &table->rows[at];
    row->inode = request->inode;
    row->handle = request->handle;
    row->offset = request->offset;
    row->start_ns = native_boottime_ns();
    row->size = request->size;
    row->opcode = request->opcode;
    row->operation_flags = request->operation_flags;
    row->pid = request->pid;
    atomic_store_explicit(&row->state, 0, memory_order_relaxed);
    uint32_t bucket = bucket_of(request->unique);
    next_row[at] = buckets[bucket];
    buckets[bucket] = at;
    atomic_store(&row->unique, request->unique);
    if (at == used)
        atomic_store(&table->rows_in_use, used + 1);
    atomic_fetch_add(&table->count, 1);
}

static void interrupt(uint64_t unique)
{
    struct pending_row *row = row_of(unique);
    if (!row || atomic_fetch_or(&row->state, STATE_INTERRUPTED) & STATE_INTERRUPTED)
        return;
    interrupts[interrupt_count++] = unique;
    uint64_t one = 1;
    ssize_t ignored = write(interrupt_fd, &one, sizeof one);
    (void)ignored; /* EAGAIN: it is readable already */
}

union body {
    struct fuse_read_in read;
    struct fuse_write_in write;
    struct fuse_open_in open;
    struct fuse_create_in create;
    struct fuse_release_in release;
    struct fuse_flush_in flush;
    struct fuse_fsync_in fsync;
    struct fuse_getattr_in getattr;
    struct fuse_setattr_in setattr;
    struct fuse_rename2_in rename2;
    struct fuse_fallocate_in fallocate;
    struct fuse_lk_in lk;
};

/* Operations on data; 0 if it is none. */
static int parse_data(struct fuse_current *request, const union body *in)
{
    switch (request->opcode) {
    case FUSE_READ:
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
        request->handle = in->read.fh;
        request->offset = in->read.offset;
        request->size = in->read.size;
        request->operation_flags = in->read.read_flags;
        request->lock_owner = in->read.lock_owner;
        request->flags = in->read.flags;
        return 1;
    case FUSE_WRITE:
        request->handle = in->write.fh;
        request->offset = in->write.offset;
        request->size = in->write.size;
        request->operation_flags = in->write.write_flags;
        request->lock_owner = in->write.lock_owner;
        request->flags = in->write.flags;
        return 1;
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR:
        request->handle = in->fsync.fh;
        request->operation_flags = in->fsync.fsync_flags;
        return 1;
    case FUSE_FALLOCATE:
        request->handle = in->fallocate.fh;
        request->offset = in->fallocate.offset;
        request->flags = in->fallocate.mode;
        return 1;
    default:
        return 0;
    }
}

/* The fields of the operations whose handle, flags or ranges matter above. */
static void parse(struct fuse_current *request, const void *body, size_t length)
{
    union body in;
    memset(&in, 0, sizeof in);
    memcpy(&in, body, length < sizeof in ? length : sizeof in);
    if (parse_data(request, &in))
        return;
    switch (request->opcode) {
    case FUSE_OPEN:
    case FUSE_OPENDIR:
        request->flags = in.open.flags;
        request->operation_flags = in.open.open_flags;
        break;
    case FUSE_CREATE:
    case FUSE_TMPFILE:
        request->flags = in.create.flags;
        request->operation_flags = in.create.open_flags;
        break;
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
        request->handle = in.release.fh;
        request->flags = in.release.flags;
        request->operation_flags = in.release.release_flags;
        request->lock_owner = in.release.lock_owner;
        break;
    case FUSE_FLUSH:
        request->handle = in.flush.fh;
        request->lock_owner = in.flush.lock_owner;
        break;
    case FUSE_GETATTR:
        request->handle = in.getattr.getattr_flags & FUSE_GETATTR_FH ? in.getattr.fh : 0;
        request->operation_flags = in.getattr.getattr_flags;
        break;
    case FUSE_SETATTR:
        request->handle = in.setattr.valid & FATTR_FH ? in.setattr.fh : 0;
        request->operation_flags = in.setattr.valid;
        request->lock_owner = in.setattr.lock_owner;
        break;
    case FUSE_RENAME2:
        request->flags = in.rename2.flags;
        break;
    case FUSE_GETLK:
    case FUSE_SETLK:
    case FUSE_SETLKW:
        request->handle = in.lk.fh;
        request->lock_owner = in.lk.owner;
        request->operation_flags = in.lk.lk_flags;
        break;
    default:
        break;
    }
}

/* Around each read of a message: the number is odd while one may be read and not yet listed. */
void requests_reading(void)
{
    if (table)
        atomic_fetch_add(&table->reads, 1);
}

/* A whole message of the kernel was read. */
const struct fuse_current *requests_arrived(const void *message, size_t length)
{
    struct fuse_in_header header;
    memcpy(&header, message, sizeof header);
    const uint8_t *body = (const uint8_t *)message + sizeof header;
    length -= sizeof header;
    memset(&current, 0, sizeof current);
    current.unique = header.unique;
    current.inode = header.nodeid;
    current.opcode = header.opcode;
    current.uid = header.uid;
    current.gid = header.gid;
    current.pid = header.pid;
    parse(&current, body, length);
    pthread_mutex_lock(&lock);
    switch (header.opcode) {
    case FUSE_INTERRUPT: {
        uint64_t unique = 0;
        if (length >= sizeof unique)
            memcpy(&unique, body, sizeof unique);
        interrupt(unique);
        break;
    }
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_NOTIFY_REPLY:
        break; /* never answered */
    default:
        if (table)
            insert(&current);
    }
    pthread_mutex_unlock(&lock);
    return &current;
}

uint32_t requests_opcode(uint64_t unique, uint32_t *operation_flags)
{
    pthread_mutex_lock(&lock);
    struct pending_row *row = row_of(unique);
    uint32_t opcode = row ? row->opcode : 0;
    *operation_flags = row ? row->operation_flags : 0;
    pthread_mutex_unlock(&lock);
    return opcode;
}

void requests_mark_answered(uint64_t unique)
{
    pthread_mutex_lock(&lock);
    struct pending_row *row = row_of(unique);
    if (row)
        atomic_fetch_or(&row->state, STATE_ANSWERED);
    pthread_mutex_unlock(&lock);
}

void requests_finished(uint64_t unique)
{
    pthread_mutex_lock(&lock);
    struct pending_row *row = row_of(unique);
    if (row) {
        uint32_t at = (uint32_t)(row - table->rows), *link = &buckets[bucket_of(unique)];
        if (atomic_load(&row->state) & STATE_INTERRUPTED)
            for (uint32_t i = 0; i < interrupt_count; i++)
                if (interrupts[i] == unique) {
                    interrupts[i] = interrupts[--interrupt_count];
                    break;
                }
        atomic_store(&row->unique, 0);
        atomic_fetch_sub(&table->count, 1);
        while (*link != at)
            link = &next_row[*link];
        *link = next_row[at];
        next_row[at] = free_row;
        free_row = at;
    }
    pthread_mutex_unlock(&lock);
}

void *native_fuse_current(void)
{
    return &current;
}

int native_fuse_table_fd(void)
{
    return table_fd;
}

int native_fuse_interrupt_fd(void)
{
    return interrupt_fd;
}

size_t native_fuse_take_interrupts(uint64_t *out, size_t max)
{
    pthread_mutex_lock(&lock);
    size_t count = interrupt_count < max ? interrupt_count : max;
    interrupt_count -= (uint32_t)count;
    memcpy(out, interrupts + interrupt_count, count * sizeof *out);
    if (!interrupt_count && interrupt_fd >= 0) {
        uint64_t counter;
        ssize_t ignored = read(interrupt_fd, &counter, sizeof counter);
        (void)ignored;
    }
    pthread_mutex_unlock(&lock);
    return count;
}

uint32_t native_fuse_request_state(uint64_t unique)
{
    pthread_mutex_lock(&lock);
    struct pending_row *row = row_of(unique);
    uint32_t state = row ? atomic_load(&row->state) : 0;
    pthread_mutex_unlock(&lock);
    return state;
}

uint32_t native_fuse_request_pid(uint64_t unique)
{
    pthread_mutex_lock(&lock);
    struct pending_row *row = row_of(unique);
    uint32_t pid = row ? row->pid : 0;
    pthread_mutex_unlock(&lock);
    return pid;
}
