/*
 * The kernels' working memory: one 64-byte aligned allocation a call, handed out piece by piece. How much all calls
 * together hold is counted, because no profiler of torch's sees it.
 */
#ifndef CHARRNN_SCRATCH_H
#define CHARRNN_SCRATCH_H

#include <stddef.h>
#include <stdint.h>

/* A first pass of takes with base NULL counts, arena_open allocates, a second pass hands out. */
typedef struct {
    char *base;
    size_t used;
} arena;

static inline void *take(arena *a, int64_t count, size_t size) {
    void *piece = a->base ? a->base + a->used : 0;
    a->used += ((size_t)count * size + 63) / 64 * 64;
    return piece;
}

/* Returns 0, or 1 where there is no memory. */
int arena_open(arena *a);
void arena_close(arena *a);

/* The most bytes held at once since the last call of this function. */
int64_t scratch_peak(void);

#endif
