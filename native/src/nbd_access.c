/* The access word of one nexus on one export, checked when a request executes (rule R5).
 *
 * Enter: count in, then load the word. Revoke: store the word, then wait for zero. One of the two
 * sees the other. A closed word never opens again, so its count only falls.
 */
#define _GNU_SOURCE
#include "nbd.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

uint32_t native_access_enter(struct native_access *access)
{
    atomic_fetch_add(&access->in_flight, 1);
    return atomic_load(&access->word);
}

void native_access_leave(struct native_access *access)
{
    if (atomic_fetch_sub(&access->in_flight, 1) == 1 &&
        atomic_load(&access->word) & ACCESS_CLOSED)
        syscall(SYS_futex, &access->in_flight, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

uint32_t native_access_word(struct native_access *access)
{
    return atomic_load(&access->word);
}

void native_access_set(struct native_access *access, uint32_t word)
{
    atomic_store(&access->word, word);
}

uint32_t native_access_in_flight(struct native_access *access)
{
    return atomic_load(&access->in_flight);
}

void native_access_wait_idle(struct native_access *access)
{
    uint32_t count;
    while ((count = atomic_load(&access->in_flight)))
        syscall(SYS_futex, &access->in_flight, FUTEX_WAIT_PRIVATE, count, NULL, NULL, 0);
}
