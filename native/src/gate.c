/* The gate for Python; C fast paths use the inline functions of gate.h. */
#include "gate.h"

int native_gate_enter(struct native_gate *gate)
{
    return native_gate_pass(gate);
}

void native_gate_leave(struct native_gate *gate)
{
    native_gate_passed(gate);
}

int native_gate_is_open(struct native_gate *gate)
{
    return native_gate_passable(gate);
}

uint32_t native_gate_word(struct native_gate *gate)
{
    return atomic_load(&gate->word);
}

/* BARRED is final. */
void native_gate_set_word(struct native_gate *gate, uint32_t word)
{
    uint32_t old = atomic_load(&gate->word);
    do {
        if (old == word || old == GATE_BARRED)
            return;
    } while (!atomic_compare_exchange_weak(&gate->word, &old, word));
    atomic_fetch_add(&gate->generation, 1);
}

uint64_t native_gate_lease_end(struct native_gate *gate)
{
    return atomic_load(&gate->lease_end_ns);
}

void native_gate_set_lease_end(struct native_gate *gate, uint64_t end_ns)
{
    atomic_store(&gate->lease_end_ns, end_ns);
}

uint32_t native_gate_in_flight(struct native_gate *gate)
{
    return atomic_load(&gate->in_flight);
}

void native_gate_stamp(struct native_gate *gate)
{
    atomic_store(&gate->progress_ns, native_boottime_ns());
}

uint64_t native_gate_progress(struct native_gate *gate)
{
    return atomic_load(&gate->progress_ns);
}

uint64_t native_gate_generation(struct native_gate *gate)
{
    return atomic_load(&gate->generation);
}
