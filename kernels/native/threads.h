/*
 * A team of threads for one call. OpenMP starts it: torch's wheel carries the same runtime, so the pool is shared with
 * torch's own. Inside a team, threads meet at a barrier that spins, because one time step may last less than a
 * microsecond.
 */
#ifndef CHARRNN_THREADS_H
#define CHARRNN_THREADS_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    int size, rank;
    atomic_uint *arrived; /* counts every arrival of the call; shared by the team */
    unsigned phase;       /* barriers passed by this thread */
} team;

typedef void (*team_job)(void *job, team *self);

/* Runs job on at most `threads` threads, the caller among them, and returns when all have finished. */
void team_run(int64_t threads, team_job job, void *argument);

static inline void cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Waits for the whole team. A thread that waits long gives up its core: there may be fewer cores than threads. */
static inline void team_barrier(team *self) {
    if (self->size == 1)
        return;
    unsigned target = ++self->phase * (unsigned)self->size;
    atomic_fetch_add_explicit(self->arrived, 1, memory_order_acq_rel);
    for (int spins = 0; (int)(atomic_load_explicit(self->arrived, memory_order_acquire) - target) < 0; spins++) {
        if (spins < 2048)
            cpu_pause();
        else
            sched_yield();
    }
}

/* The part of 0..count-1 that belongs to this thread: contiguous, sizes differing by at most one. */
static inline void team_share(const team *self, int64_t count, int64_t *begin, int64_t *end) {
    *begin = count * self->rank / self->size;
    *end = count * (self->rank + 1) / self->size;
}

#endif
