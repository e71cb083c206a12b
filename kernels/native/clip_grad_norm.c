/*
 * Clipping by the global L2 norm, all tensors in one call:  g <- min(1, max_norm / (norm + 1e-6)) g.
 * Squares are summed in chunks that depend on the tensors' sizes alone, and the chunks' sums in order.
 */
#ifndef ISA

#include "kernels.h"
#include "threads.h"

#define TARGET_FILE "clip_grad_norm.c"
#include "targets.h"

const kernel clip_kernels[ISA_COUNT][2] = KERNEL_TABLE(clip);

#else

#include "simd.h"

#ifndef CHARRNN_CLIP_ONCE
#define CHARRNN_CLIP_ONCE

enum { CHUNK = 16384 };

typedef struct {
    const clip_args *p;
    int64_t chunks;
    double *sums; /* [chunks] */
} clip_job;

/* The tensor and the offset in it where chunk number `index` begins, walking on from the last answer. */
typedef struct {
    int64_t tensor, first;
} chunk_place;

static inline void chunk_find(const clip_args *p, int64_t index, chunk_place *place) {
    while (index - place->first >= CEIL_DIV(p->sizes[place->tensor], CHUNK)) {
        place->first += CEIL_DIV(p->sizes[place->tensor], CHUNK);
        place->tensor++;
    }
}

#endif

static double NAME(sum_squares)(const real *g, int64_t count) {
    vec sums[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int v = 0; v < 4; v++) {
            vec x = NAME(load)(g + i + v * LANES);
            sums[v] = FMA(x, x, sums[v]);
        }
    for (; i < count; i += LANES) {
        vec x = NAME(load_some)(g + i, (int)MIN(LANES, count - i));
        sums[0] = FMA(x, x, sums[0]);
    }
    return NAME(sum)((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static void NAME(clip_team)(void *argument, team *self) {
    clip_job *job = argument;
    const clip_args *p = job->p;
    int64_t begin, end;
    team_share(self, job->chunks, &begin, &end);
    chunk_place place = {0, 0};
    for (int64_t c = begin; c < end; c++) {
        chunk_find(p, c, &place);
        int64_t offset = (c - place.first) * CHUNK;
        job->sums[c] = NAME(sum_squares)((const real *)p->grads[place.tensor] + offset,
                                         MIN(CHUNK, p->sizes[place.tensor] - offset));
    }
    team_barrier(self);
    double total = 0;
    for (int64_t c = 0; c < job->chunks; c++)
        total += job->sums[c];
    real norm = (real)sqrt(total), scale = (real)*p->max_norm / (norm + (real)1e-6);
    if (self->rank == 0)
        *p->norm = norm;
    if (scale >= 1)
        return;
    place = (chunk_place){0, 0};
    for (int64_t c = begin; c < end; c++) {
        chunk_find(p, c, &place);
        int64_t offset = (c - place.first) * CHUNK, count = MIN(CHUNK, p->sizes[place.tensor] - offset);
        real *g = (real *)p->grads[place.tensor] + offset;
        for (int64_t i = 0; i < count; i++)
            g[i] *= scale;
    }
}

static int NAME(clip)(const void *args) {
    clip_job job = {.p = args};
    for (int64_t i = 0; i < job.p->count; i++)
        job.chunks += CEIL_DIV(job.p->sizes[i], CHUNK);
    job.sums = malloc((size_t)(job.chunks + 1) * sizeof(double));
    if (!job.sums)
        return STATUS_NO_MEMORY;
    team_run(MIN(job.p->threads, MAX(job.chunks / 4, 1)), NAME(clip_team), &job);
    free(job.sums);
    return STATUS_OK;
}

#endif
