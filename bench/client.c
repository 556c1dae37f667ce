/* What the benchmarks run on a node: loops over system calls and nothing else, so that what is
 * measured is the file system. `client VERB ARGUMENTS`; prints one line of JSON.
 *
 *   create|stat|rename|unlink DIRECTORY PREFIX COUNT   one operation on each of COUNT names
 *   again DIRECTORY PREFIX COUNT ROUNDS                stat of COUNT names, ROUNDS times
 *   fsync FILE COUNT overwrite|append                  write 4 KiB, fsync
 *   change FILE COUNT FIFO data|size|name              change something, say so through FIFO, and
 *                                                      wait for the answer in FIFO-back
 *   watch FILE COUNT FIFO data|size|name               told of a change, look until it is seen
 *   pingpong FILE PROCESSES SECONDS locks|data         byte-range locks handed round, as ping_pong
 *                                                      of ctdb does; one of PROCESSES such programs
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, PAUSE_NS = 5000000, OVERWRITTEN = 256 };

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void fail(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void report(int64_t *samples, long count, double seconds)
{
    qsort(samples, (size_t)count, sizeof *samples, compare);
    printf("{\"rate\": %.1f, \"seconds\": %.4f, \"p50_us\": %.1f, \"p99_us\": %.1f, "
           "\"max_us\": %.1f}\n",
           (double)count / seconds, seconds, (double)samples[count / 2] / 1e3,
           (double)samples[count * 99 / 100] / 1e3, (double)samples[count - 1] / 1e3);
}

static void one(const char *verb, int directory, const char *prefix, long number)
{
    char name[64], other[64];
    struct stat info;
    int error = 0;
    snprintf(name, sizeof name, "%s%ld", prefix, number);
    if (!strcmp(verb, "create")) {
        int fd = openat(directory, name, O_CREAT | O_EXCL | O_WRONLY, 0644);
        error = fd < 0 || close(fd);
    } else if (!strcmp(verb, "rename")) {
        snprintf(other, sizeof other, "r%s%ld", prefix, number);
        error = renameat(directory, name, directory, other);
    } else if (!strcmp(verb, "unlink")) {
        error = unlinkat(directory, name, 0);
    } else {
        error = fstatat(directory, name, &info, 0);
    }
    if (error)
        fail(verb);
}

static void names(const char *verb, char **arguments)
{
    long count = atol(arguments[2]);
    int64_t *samples = calloc((size_t)count, sizeof *samples);
    int directory = open(arguments[0], O_PATH | O_DIRECTORY);
    if (directory < 0)
        fail(arguments[0]);
    int64_t begin = now_ns(), last = begin;
    for (long i = 0; i < count; i++) {
        one(verb, directory, arguments[1], i);
        int64_t now = now_ns();
        samples[i] = now - last;
        last = now;
    }
    report(samples, count, (double)(last - begin) / 1e9);
}

static void again(char **arguments)
{
    long count = atol(arguments[2]), rounds = atol(arguments[3]);
    char(*paths)[64] = calloc((size_t)count, sizeof *paths);
    struct stat info;
    int directory = open(arguments[0], O_PATH | O_DIRECTORY);
    if (directory < 0)
        fail(arguments[0]);
    for (long i = 0; i < count; i++)
        snprintf(paths[i], sizeof paths[i], "%s%ld", arguments[1], i);
    int64_t begin = now_ns();
    for (long round = 0; round < rounds; round++)
        for (long i = 0; i < count; i++)
            if (fstatat(directory, paths[i], &info, 0))
                fail(paths[i]);
    double seconds = (double)(now_ns() - begin) / 1e9;
    printf("{\"rate\": %.1f, \"seconds\": %.4f}\n", (double)(count * rounds) / seconds, seconds);
}

static void synced(char **arguments)
{
    long count = atol(arguments[1]);
    int append = !strcmp(arguments[2], "append");
    int64_t *samples = calloc((size_t)count, sizeof *samples);
    char block[BLOCK];
    memset(block, 'x', sizeof block);
    int fd = open(arguments[0], O_CREAT | O_WRONLY, 0644);
    if (fd < 0)
        fail(arguments[0]);
    for (long i = 0; i < OVERWRITTEN && !append; i++)
        if (pwrite(fd, block, BLOCK, i * BLOCK) != BLOCK)
            fail("write");
    if (fsync(fd))
        fail("fsync");
    int64_t begin = now_ns(), last = begin;
    for (long i = 0; i < count; i++) {
        memcpy(block, &i, sizeof i);
        long at = append ? i : i * 7 % OVERWRITTEN;
        if (pwrite(fd, block, BLOCK, at * BLOCK) != BLOCK)
            fail("write");
        if (fsync(fd))
            fail("fsync");
        int64_t now = now_ns();
        samples[i] = now - last;
        last = now;
    }
    report(samples, count, (double)(last - begin) / 1e9);
}

/* Each message in the FIFO: the number of the change and when the system call had returned. */
struct message {
    int64_t number, at_ns;
};

/* Change number `number` of the file: its first bytes, its size, or a new name beside it. */
static void make_change(int fd, const char *path, char way, int64_t number)
{
    char name[256];
    if (way == 'd') {
        if (pwrite(fd, &number, sizeof number, 0) != sizeof number)
            fail("write");
    } else if (way == 's') {
        if (ftruncate(fd, number))
            fail("truncate");
    } else {
        snprintf(name, sizeof name, "%s-%ld", path, (long)number);
        int made = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (made < 0 || close(made))
            fail(name);
    }
}

static int is_seen(int fd, const char *path, char way, int64_t number)
{
    int64_t value = 0;
    struct stat info;
    char name[256];
    if (way == 'd') {
        if (pread(fd, &value, sizeof value, 0) < 0)
            fail("read");
        return value >= number;
    }
    if (way == 's') {
        if (stat(path, &info))
            fail(path);
        return info.st_size >= number;
    }
    snprintf(name, sizeof name, "%s-%ld", path, (long)number);
    return !stat(name, &info);
}

static const char *back_of(const char *fifo)
{
    static char path[256];
    snprintf(path, sizeof path, "%s-back", fifo);
    return path;
}

static void change(char **arguments)
{
    long count = atol(arguments[1]);
    struct timespec pause = {0, PAUSE_NS};
    int fd = open(arguments[0], O_CREAT | O_WRONLY, 0644);
    int told = open(arguments[2], O_WRONLY), back = open(back_of(arguments[2]), O_RDONLY);
    if (fd < 0 || told < 0 || back < 0)
        fail(arguments[0]);
    for (struct message m = {1, 0}; m.number <= count; m.number++) {
        nanosleep(&pause, NULL);
        make_change(fd, arguments[0], arguments[3][0], m.number);
        m.at_ns = now_ns();
        if (write(told, &m, sizeof m) != sizeof m || read(back, &m, sizeof m) != sizeof m)
            fail("fifo");
    }
    puts("{}");
}

static void watch(char **arguments)
{
    long count = atol(arguments[1]);
    int64_t *samples = calloc((size_t)count, sizeof *samples);
    struct message m;
    int told = open(arguments[2], O_RDONLY), back = open(back_of(arguments[2]), O_WRONLY);
    int fd = open(arguments[0], O_RDONLY);
    if (fd < 0 || told < 0 || back < 0)
        fail(arguments[0]);
    int64_t begin = now_ns();
    for (long i = 0; i < count; i++) {
        if (read(told, &m, sizeof m) != sizeof m)
            fail("fifo");
        while (!is_seen(fd, arguments[0], arguments[3][0], m.number))
            ;
        samples[i] = now_ns() - m.at_ns;
        if (write(back, &m, sizeof m) != sizeof m)
            fail("fifo");
    }
    report(samples, count, (double)(now_ns() - begin) / 1e9);
}

static void range(int fd, short type, long at)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    if (fcntl(fd, F_SETLKW, &lock))
        fail("fcntl");
}

/* Add one to the counter of a place; less than it was when we left it is an old byte. */
static int add_one(int fd, long place, int64_t *last)
{
    int64_t value;
    if (pread(fd, &value, sizeof value, place * (long)sizeof value) != sizeof value)
        fail("read");
    int wrong = value < last[place];
    last[place] = ++value;
    if (pwrite(fd, &value, sizeof value, place * (long)sizeof value) != sizeof value)
        fail("write");
    return wrong;
}

/* The processes go round PROCESSES + 1 bytes, always in the same order: each locks the next byte,
 * then lets go of the one it has. So whoever gets a byte gets it from the process before it. With
 * `data` it adds one to the counter that belongs to the byte; the sum over the places, less the
 * sum over the processes, is what was lost. They begin when each has made the file a byte longer. */
static void ping_pong(char **arguments)
{
    long processes = atol(arguments[1]), places = processes + 1, count = 0, wrong = 0, at = 0;
    int64_t duration_ns = (int64_t)(atof(arguments[2]) * 1e9);
    int data = !strcmp(arguments[3], "data");
    int64_t last[256] = {0};
    struct stat info;
    int fd = open(arguments[0], O_RDWR), together = open(arguments[0], O_WRONLY | O_APPEND);
    if (fd < 0 || together < 0 || places > 256)
        fail(arguments[0]);
    if (write(together, "", 1) != 1)
        fail("append");
    do {
        usleep(1000);
        if (fstat(fd, &info))
            fail("stat");
    } while (info.st_size < places * (long)sizeof *last + processes);
    range(fd, F_WRLCK, 0);
    int64_t begin = now_ns(), now = begin;
    for (; now - begin < duration_ns; now = now_ns()) {
        long next = (at + 1) % places;
        range(fd, F_WRLCK, next);
        if (data)
            wrong += add_one(fd, next, last);
        range(fd, F_UNLCK, at);
        at = next;
        count++;
    }
    double seconds = (double)(now - begin) / 1e9;
    printf("{\"rate\": %.1f, \"seconds\": %.4f, \"count\": %ld, \"wrong\": %ld}\n",
           (double)count / seconds, seconds, count, wrong);
}

int main(int count, char **arguments)
{
    const char *verb = count > 1 ? arguments[1] : "";
    if (count == 6 && !strcmp(verb, "again"))
        again(arguments + 2);
    else if (count == 5 && !strcmp(verb, "fsync"))
        synced(arguments + 2);
    else if (count == 6 && !strcmp(verb, "change"))
        change(arguments + 2);
    else if (count == 6 && !strcmp(verb, "watch"))
        watch(arguments + 2);
    else if (count == 6 && !strcmp(verb, "pingpong"))
        ping_pong(arguments + 2);
    else if (count == 5)
        names(verb, arguments + 2);
    else {
        fputs("usage: see client.c\n", stderr);
        return 2;
    }
    return 0;
}
