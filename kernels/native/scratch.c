/* Allocation and its count: see scratch.h. */
#include "scratch.h"

#include <stdatomic.h>
#include <stdlib.h>

static _Atomic int64_t held, peak;

int arena_open(arena *a) {
    size_t size = a->used > 64 ? a->used : 64;
    void *base = 0;
    if (posix_memalign(&base, 64, size))
        return 1;
    int64_t now = atomic_fetch_add(&held, (int64_t)size) + (int64_t)size, most = atomic_load(&peak);
    while (now > most && !atomic_compare_exchange_weak(&peak, &most, now))
        ;
    a->base = base;
    a->used = 0;
    return 0;
}

void arena_close(arena *a) {
    atomic_fetch_sub(&held, (int64_t)(a->used > 64 ? a->used : 64));
    free(a->base);
}

int64_t scratch_peak(void) { return atomic_exchange(&peak, atomic_load(&held)); }
