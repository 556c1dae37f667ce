/* The lease page of rules R5 and G2; the layout stands in native/gate.py. */
#ifndef NATIVE_GATE_H
#define NATIVE_GATE_H

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum native_gate_word { GATE_CLOSED = 0, GATE_OPEN = 1, GATE_LAPSED = 2, GATE_BARRED = 3 };

struct native_gate {
    _Atomic uint64_t lease_end_ns;
    _Atomic uint32_t word;
    _Atomic uint32_t in_flight;
    _Atomic uint64_t progress_ns;
    _Atomic uint64_t generation;
};

_Static_assert(sizeof(struct native_gate) == 32, "the layout is shared between processes");

static inline uint64_t native_boottime_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline int native_gate_passable(const struct native_gate *gate)
{
    return atomic_load(&gate->word) == GATE_OPEN &&
           native_boottime_ns() < atomic_load(&gate->lease_end_ns);
}

/* Count in first, look second: a revoker stores the word first and looks at the count second, so
 * one of the two sees the other. */
static inline int native_gate_pass(struct native_gate *gate)
{
    atomic_fetch_add(&gate->in_flight, 1);
    if (native_gate_passable(gate))
        return 1;
    atomic_fetch_sub(&gate->in_flight, 1);
    return 0;
}

static inline void native_gate_passed(struct native_gate *gate)
{
    atomic_fetch_sub(&gate->in_flight, 1);
}

int native_gate_enter(struct native_gate *gate);
void native_gate_leave(struct native_gate *gate);
int native_gate_is_open(struct native_gate *gate);
uint32_t native_gate_word(struct native_gate *gate);
void native_gate_set_word(struct native_gate *gate, uint32_t word);
uint64_t native_gate_lease_end(struct native_gate *gate);
void native_gate_set_lease_end(struct native_gate *gate, uint64_t end_ns);
uint32_t native_gate_in_flight(struct native_gate *gate);
void native_gate_stamp(struct native_gate *gate);
uint64_t native_gate_progress(struct native_gate *gate);
uint64_t native_gate_generation(struct native_gate *gate);
#endif
