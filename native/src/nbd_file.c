/* Whole reads and writes of files (see integrity.h). */
#define _GNU_SOURCE
#include "integrity.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

int native_read_exactly(int fd, uint8_t *data, size_t length, uint64_t offset)
{
    while (length) {
        ssize_t count = pread(fd, data, length, (off_t)offset);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (!count) {
            memset(data, 0, length);
            return 0;
        }
        data += count;
        length -= (size_t)count;
        offset += (uint64_t)count;
    }
    return 0;
}

int native_write_exactly(int fd, const uint8_t *data, size_t length, uint64_t offset, int flags)
{
    while (length) {
        struct iovec part = {(void *)data, length};
        ssize_t count = pwritev2(fd, &part, 1, (off_t)offset, flags);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        data += count;
        length -= (size_t)count;
        offset += (uint64_t)count;
    }
    return 0;
}
