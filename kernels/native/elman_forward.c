/*
 * The Elman recurrence over all time steps, forward:  h_t = f(x_t + h_{t-1} W^T).
 *
 * W is packed once and stays in cache. The state of MAX_ROWS rows lives in a block (simd.h), two of them in turn.
 * Either the rows are split over the threads, which then never wait for each other, or the columns are, with one
 * barrier a step.
 */
#ifndef ISA

#include "kernels.h"
#include "threads.h"

#define TARGET_FILE "elman_forward.c"
#include "targets.h"

const kernel elman_forward_kernels[ISA_COUNT][2] = KERNEL_TABLE(elman_forward);

#else

#include "simd.h"

#include "elman.h"

typedef struct {
    const elman_forward_args *p;
    cut c;
    real *packed, *states, *tiles;
    _Atomic int64_t next_item;
} NAME(forward_job);

/* h = f(x + sums) for one vector of columns of all rows, to out and to the state; fetches the next step's input. */
INLINE void NAME(forward_rows)(const int relu, const int full, int width, int rows, const real *const *x, int64_t j,
                               int64_t x_ahead, const real *sums, real *out, int64_t out_row, int64_t out_ahead,
                               real *states) {
    for (int i = 0; i < rows; i++, sums += PANEL, out += out_row, states += LANES) {
        vec h = (full ? NAME(load)(x[i] + j) : NAME(load_some)(x[i] + j, width)) + NAME(load)(sums);
        PREFETCH(x[i] + j + x_ahead, 0);
        PREFETCH(out + out_ahead, 1);
        h = relu ? NAME(vrelu)(h) : NAME(vtanh)(h);
        NAME(store)(states, h);
        if (full)
            NAME(store)(out, h);
        else
            NAME(store_some)(out, h, width);
    }
}

/* One step of one block for panels first..last-1: the product, the input, f, the stores. */
static void NAME(forward_step)(const NAME(forward_job) *job, int d, int64_t step, int64_t b0, int rows, int64_t first,
                               int64_t last, const real *now, real *next, real *tile) {
    const elman_forward_args *p = job->p;
    const elman_shape *s = &p->s;
    int64_t t = walk(s, d, step), after = step + 1 < s->T ? walk(s, d, step + 1) : t;
    int64_t x_at = s->tokens ? 0 : position(s, t, b0, p->x_t, p->x_b);
    int64_t x_ahead = s->tokens ? 0 : position(s, after, b0, p->x_t, p->x_b) - x_at;
    int64_t out_at = position(s, t, b0, s->out_t, s->out_b);
    int64_t out_ahead = position(s, after, b0, s->out_t, s->out_b) - out_at;
    int64_t token_at = position(s, t, b0, s->tokens_t, s->tokens_b);
    real *out = (real *)s->out + out_at + d * s->H;
    const real *x[MAX_ROWS];
    for (int i = 0; i < rows; i++, x_at += p->x_b, token_at += s->tokens_b)
        x[i] = (const real *)p->x + (s->tokens ? s->tokens[token_at] * p->x_b : x_at) + d * s->H;
    const real *weight = job->packed + d * job->c.panels * job->c.panel_size;
    int backwards = reads_backwards(s, step), count;
    for (int64_t left = last - first; left > 0; left -= count) {
        count = NAME(at_once)(rows, left);
        int64_t panel = backwards ? first + left - count : last - left;
        NAME(multiply_at)(rows, count, backwards, s->H, now, weight + panel * job->c.panel_size, job->c.panel_size,
                          tile);
        for (int q = 0; q < count; q++, panel++)
            for (int v = 0; v < 2; v++) {
                int64_t j = panel * PANEL + v * LANES;
                if (j >= s->H)
                    break;
                int width = (int)MIN(LANES, s->H - j);
                const real *sums = tile + q * rows * PANEL + v * LANES;
                real *states = next + NAME(at)(0, j);
                if (s->relu)
                    NAME(forward_rows)(1, 0, width, rows, x, j, x_ahead, sums, out + j, s->out_b, out_ahead, states);
                else if (width == LANES)
                    NAME(forward_rows)(0, 1, width, rows, x, j, x_ahead, sums, out + j, s->out_b, out_ahead, states);
                else
                    NAME(forward_rows)(0, 0, width, rows, x, j, x_ahead, sums, out + j, s->out_b, out_ahead, states);
            }
    }
}

static void NAME(forward_init)(const NAME(forward_job) *job, int d, int64_t block, real *now, real *next) {
    const elman_shape *s = &job->p->s;
    memset(now, 0, (size_t)job->c.state_size * sizeof(real));
    for (int64_t i = 0; s->h0 && i < job->c.rows && block * job->c.rows + i < s->B; i++)
        NAME(block_load)(now, i, s->H, (const real *)s->h0 + d * s->h0_d + (block * job->c.rows + i) * s->h0_b);
    memcpy(next, now, (size_t)job->c.state_size * sizeof(real));
}

static void NAME(forward_last)(const NAME(forward_job) *job, int d, int64_t block, const real *now) {
    const elman_shape *s = &job->p->s;
    for (int64_t i = 0, b = block * job->c.rows; i < job->c.rows && b < s->B; i++, b++)
        NAME(block_save)(now, i, s->H, (real *)job->p->h_n + (d * s->B + b) * s->H);
}

/* All steps of one block: the way of the row split. */
static void NAME(forward_block)(const NAME(forward_job) *job, int d, int64_t block, real *now, real *next,
                                real *tile) {
    const elman_shape *s = &job->p->s;
    int64_t b0 = block * job->c.rows;
    int rows = (int)MIN(job->c.rows, s->B - b0), before = 0;
    NAME(forward_init)(job, d, block, now, next);
    for (int64_t step = 0; step < s->T; step++) {
        int active = active_rows(s, walk(s, d, step), b0, rows);
        NAME(state_keep)(&job->c, active, before, 0, job->c.panels, now, next);
        if (active)
            NAME(forward_step)(job, d, step, b0, active, 0, job->c.panels, now, next, tile);
        before = active;
        real *swap = now;
        now = next;
        next = swap;
    }
    NAME(forward_last)(job, d, block, now);
}

/* All steps of this thread's panels, every block, in step with the team. */
static void NAME(forward_columns)(const NAME(forward_job) *job, team *self, real *tile) {
    const elman_shape *s = &job->p->s;
    int64_t begin, end, size = job->c.state_size;
    team_share(self, s->D * job->c.panels, &begin, &end);
    for (int64_t step = 0; step < s->T; step++) {
        for (int64_t item = 0; item < s->D * job->c.blocks; item++) {
            int d = (int)(item / job->c.blocks);
            int64_t first = MAX(begin - d * job->c.panels, 0), last = MIN(end - d * job->c.panels, job->c.panels);
            if (first >= last)
                continue;
            int64_t b0 = item % job->c.blocks * job->c.rows;
            int rows = (int)MIN(job->c.rows, s->B - b0), active = active_rows(s, walk(s, d, step), b0, rows);
            int before = step ? active_rows(s, walk(s, d, step - 1), b0, rows) : 0;
            real *now = job->states + (2 * item + step % 2) * size,
                 *next = job->states + (2 * item + 1 - step % 2) * size;
            NAME(state_keep)(&job->c, active, before, first, last, now, next);
            if (active)
                NAME(forward_step)(job, d, step, b0, active, first, last, now, next, tile);
        }
        team_barrier(self);
    }
}

static void NAME(forward_team)(void *argument, team *self) {
    NAME(forward_job) *job = argument;
    const elman_shape *s = &job->p->s;
    int64_t begin, end, items = s->D * job->c.blocks, size = job->c.state_size;
    team_share(self, s->D * job->c.panels, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        int64_t d = i / job->c.panels;
        NAME(pack_panel)(s->weight[d], s->weight_row[d], 1, s->H, s->H, i % job->c.panels,
                         job->packed + i * job->c.panel_size);
    }
    real *tile = job->tiles + self->rank * 4 * MAX_ROWS * PANEL;
    if (!s->columns) {
        team_barrier(self);
        real *now = job->states + self->rank * 2 * size;
        for (int64_t item; (item = job->next_item++) < items;)
            NAME(forward_block)(job, (int)(item / job->c.blocks), item % job->c.blocks, now, now + size, tile);
        return;
    }
    team_share(self, items, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        NAME(forward_init)(job, (int)(i / job->c.blocks), i % job->c.blocks, job->states + 2 * i * size,
                           job->states + (2 * i + 1) * size);
    team_barrier(self);
    NAME(forward_columns)(job, self, tile);
    for (int64_t i = begin; i < end; i++)
        NAME(forward_last)(job, (int)(i / job->c.blocks), i % job->c.blocks, job->states + (2 * i + s->T % 2) * size);
}

static void NAME(forward_scratch)(NAME(forward_job) *job, arena *memory) {
    const elman_shape *s = &job->p->s;
    job->packed = take(memory, s->D * job->c.panels * job->c.panel_size, sizeof(real));
    job->states = take(memory, 2 * job->c.state_size * (s->columns ? s->D * job->c.blocks : s->threads), sizeof(real));
    job->tiles = take(memory, s->threads * 4 * MAX_ROWS * PANEL, sizeof(real));
}

static int NAME(elman_forward)(const void *args) {
    const elman_forward_args *p = args;
    NAME(forward_job) job = {.p = p, .c = NAME(make_cut)(&p->s, 1)};
    if (!tokens_in_range(&p->s))
        return STATUS_BAD_TOKEN;
    arena memory = {0};
    NAME(forward_scratch)(&job, &memory);
    if (arena_open(&memory))
        return STATUS_NO_MEMORY;
    NAME(forward_scratch)(&job, &memory);
    team_run(p->s.threads, NAME(forward_team), &job);
    arena_close(&memory);
    return STATUS_OK;
}

#endif
