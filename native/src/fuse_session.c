/* The session below pyfuse3: fuse_session_new is ours, and so are its read and writev (see fuse.h).
 *
 * libfuse is used as it is; its answer to INIT is edited on the way out, so bits that it does not
 * know can be set as well. Operations that pyfuse3 or libfuse lack never reach them: fuse_divert.c.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 314
#include "fuse.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Headers from 3.17 on make it a macro or inline function. */
#undef fuse_session_new

#define INTERPOSED __attribute__((visibility("default")))
#define INIT_FLAGS2 ((uint64_t)1 << 30)

struct libfuse_version;

static struct {
    uint64_t set, clear;
    uint32_t max_background, congestion_threshold, max_readahead, time_granularity;
} settings;

/* native.fuse.SessionInfo unpacks it, behind the two words. */
static struct {
    uint64_t offered, agreed;
    uint32_t kernel_minor, max_background, congestion_threshold, max_readahead, max_write,
        time_granularity;
} info;

static struct fuse_session *session;
static int interposed, placeholder = -1;
static uint64_t init_unique;

static void note_init(const void *message, size_t length)
{
    struct fuse_in_header header;
    struct fuse_init_in init;
    memset(&init, 0, sizeof init);
    memcpy(&header, message, sizeof header);
    if (header.opcode != FUSE_INIT)
        return;
    length -= sizeof header;
    memcpy(&init, (const char *)message + sizeof header,
           length < sizeof init ? length : sizeof init);
    init_unique = header.unique;
    info.kernel_minor = init.minor;
    info.max_readahead = init.max_readahead;
    info.offered = init.flags;
    if (init.flags & INIT_FLAGS2)
        info.offered |= (uint64_t)init.flags2 << 32;
}

ssize_t session_receive(void *buffer, size_t length, const struct fuse_current **request)
{
    if (!session) {
        errno = ENODEV;
        return -1;
    }
    int fd = fuse_session_fd(session);
    if (placeholder >= 0) { /* the first read: libfuse put the mounted descriptor in its place */
        close(placeholder);
        placeholder = -1;
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    }
    requests_reading();
    ssize_t result = read(fd, buffer, length);
    int error = errno;
    if (result >= (ssize_t)sizeof(struct fuse_in_header)) {
        if (!info.agreed)
            note_init(buffer, (size_t)result);
        *request = requests_arrived(buffer, (size_t)result);
    }
    requests_reading();
    errno = error;
    return result;
}

static ssize_t session_read(int fd, void *buffer, size_t length, void *userdata)
{
    return divert_read(buffer, length);
}

/* Put the settings into libfuse's answer to INIT. */
static void edit_init(struct fuse_init_out *out)
{
    uint64_t flags = out->flags;
    if (flags & INIT_FLAGS2)
        flags |= (uint64_t)out->flags2 << 32;
    flags = (flags | (settings.set & info.offered)) & ~settings.clear;
    if (flags >> 32 && !(info.offered & INIT_FLAGS2))
        flags &= UINT32_MAX;
    if (info.offered & INIT_FLAGS2)
        flags |= INIT_FLAGS2;
    out->flags = (uint32_t)flags;
    out->flags2 = (uint32_t)(flags >> 32);
    if (settings.max_background)
        out->max_background = (uint16_t)settings.max_background;
    if (settings.congestion_threshold)
        out->congestion_threshold = (uint16_t)settings.congestion_threshold;
    if (settings.max_readahead && settings.max_readahead < out->max_readahead)
        out->max_readahead = settings.max_readahead;
    if (settings.time_granularity)
        out->time_gran = settings.time_granularity;
    info.agreed = flags;
    info.max_background = out->max_background;
    info.congestion_threshold = out->congestion_threshold;
    info.max_readahead = out->max_readahead;
    info.max_write = out->max_write;
    info.time_granularity = out->time_gran;
}

static ssize_t session_writev(int fd, struct iovec *iov, int count, void *userdata)
{
    const struct fuse_out_header *header = iov[0].iov_base;
    if (init_unique && header->unique == init_unique) {
        if (!header->error && count == 2 && iov[1].iov_len >= sizeof(struct fuse_init_out))
            edit_init(iov[1].iov_base);
        init_unique = 0;
    }
    return gate_writev(fd, iov, count);
}

static const struct fuse_custom_io session_io = {
    .read = session_read,
    .writev = session_writev,
};

/* Take the new session over; libfuse replaces the descriptor when it mounts. */
static struct fuse_session *adopt(struct fuse_session *created)
{
    if (!created)
        return NULL;
    placeholder = eventfd(0, EFD_CLOEXEC);
    memset(&info, 0, sizeof info);
    init_unique = 0;
    gate_reset();
    divert_reset();
    int error = requests_reset();
    if (!error && !fuse_session_custom_io(created, &session_io, placeholder)) {
        session = created;
        interposed = 1;
    } else {
        session = NULL;
        interposed = 0;
    }
    return created;
}

static void *real(const char *name, const char *version)
{
    void *library = dlopen("libfuse3.so.3", RTLD_NOW | RTLD_NOLOAD);
    if (!library)
        library = dlopen("libfuse3.so.4", RTLD_NOW | RTLD_NOLOAD);
    if (!library)
        return NULL;
    void *function = dlvsym(library, name, version);
    return function ? function : dlsym(library, name);
}

static void extend(struct fuse_lowlevel_ops *operations, const struct fuse_lowlevel_ops *given,
                   size_t size)
{
    memset(operations, 0, sizeof *operations);
    memcpy(operations, given, size < sizeof *operations ? size : sizeof *operations);
}

INTERPOSED struct fuse_session *fuse_session_new(struct fuse_args *args,
                                                 const struct fuse_lowlevel_ops *given,
                                                 size_t size, void *userdata)
{
    struct fuse_session *(*function)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                     void *);
    struct fuse_lowlevel_ops operations;
    *(void **)&function = real("fuse_session_new", "FUSE_3.0");
    if (!function)
        return NULL;
    extend(&operations, given, size);
    return adopt(function(args, &operations, sizeof operations, userdata));
}

/* Where newer headers route fuse_session_new to. */
INTERPOSED struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
                                                           const struct fuse_lowlevel_ops *given,
                                                           size_t size,
                                                           struct libfuse_version *version,
                                                           void *userdata)
{
    struct fuse_session *(*function)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                     struct libfuse_version *, void *);
    struct fuse_lowlevel_ops operations;
    *(void **)&function = real("fuse_session_new_versioned", "FUSE_3.17");
    if (!function)
        return NULL;
    extend(&operations, given, size);
    return adopt(function(args, &operations, sizeof operations, version, userdata));
}

/* pyfuse3.close: nothing may be written to a descriptor number that is no longer ours. */
static void abandon(const struct fuse_session *ended)
{
    if (ended != session)
        return;
    session = NULL;
    placeholder = -1;
    gate_reset();
}

INTERPOSED void fuse_session_unmount(struct fuse_session *ended)
{
    void (*function)(struct fuse_session *);
    *(void **)&function = real("fuse_session_unmount", "FUSE_3.0");
    abandon(ended);
    if (function)
        function(ended);
}

INTERPOSED void fuse_session_destroy(struct fuse_session *ended)
{
    void (*function)(struct fuse_session *);
    *(void **)&function = real("fuse_session_destroy", "FUSE_3.0");
    abandon(ended);
    if (function)
        function(ended);
}

void native_fuse_configure(uint64_t set, uint64_t clear, uint32_t max_background,
                           uint32_t congestion_threshold, uint32_t max_readahead,
                           uint32_t time_granularity)
{
    settings.set = set;
    settings.clear = clear;
    settings.max_background = max_background;
    settings.congestion_threshold = congestion_threshold;
    settings.max_readahead = max_readahead;
    settings.time_granularity = time_granularity;
}

int native_fuse_interposed(void)
{
    return interposed;
}

int native_fuse_session_fd(void)
{
    int fd = session ? fuse_session_fd(session) : -1;
    return fd == placeholder ? -1 : fd;
}

void native_fuse_info(void *out)
{
    memcpy(out, &info, sizeof info);
}
