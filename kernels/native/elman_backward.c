/*
 * The Elman recurrence, backward:
 *
 *   g_t = (grad_out_t + g_{t+1} W) f'(h_t),   f' = 1 - h^2 or [h > 0]
 *   grad_x = g,   grad_W = sum_t g_t^T h_{t-1},   grad_table[v] = sum of g_t where token_t = v,   grad_h0 = g_first W
 *
 * Cut like the forward pass. The sums over rows run either while the recurrence does, one partial sum for each few
 * blocks (fused: small H), or afterwards from the stored g, each thread with its own rows or columns of the result.
 */
#ifndef ISA

#include "kernels.h"
#include "threads.h"

#define TARGET_FILE "elman_backward.c"
#include "targets.h"

const kernel elman_backward_kernels[ISA_COUNT][2] = KERNEL_TABLE(elman_backward);

#else

#include "simd.h"

#include "elman.h"
#include "outer.h"

#ifndef CHARRNN_ELMAN_BACKWARD_ONCE
#define CHARRNN_ELMAN_BACKWARD_ONCE
/* Partial sums of the fused weight gradient, at most. */
enum { MAX_CHUNKS = 32 };
#endif

typedef struct {
    const elman_backward_args *p;
    cut c;
    int64_t chunks; /* partial sums of one direction, fused only */
    real *packed, *states, *tiles;
    real *gathers;     /* per thread */
    real *weight_sums; /* [D][chunks][H][H], fused only */
    real *table_sums;  /* [D][chunks][V][H], fused only */
    _Atomic int64_t next_item;
} NAME(backward_job);

/* g = (grad_out + sums) f'(h) for one vector of columns of all rows, to grad_x and to the state. */
INLINE void NAME(backward_rows)(const int relu, const int full, int width, int rows, const real *sums, real *states,
                                const real *out, int64_t out_row, int64_t out_ahead, const real *grad_out,
                                int64_t grad_out_row, int64_t grad_out_ahead, real *grad_x, int64_t grad_x_row) {
    for (int i = 0; i < rows; i++, sums += PANEL, states += LANES, out += out_row) {
        vec g = NAME(load)(sums), h = full ? NAME(load)(out) : NAME(load_some)(out, width);
        PREFETCH(out + out_ahead, 0);
        if (grad_out) {
            g += full ? NAME(load)(grad_out) : NAME(load_some)(grad_out, width);
            PREFETCH(grad_out + grad_out_ahead, 0);
            grad_out += grad_out_row;
        }
        if (relu)
            g = NAME(select)(h <= (vec){0}, (vec){0}, g); /* NaN passes it on, as in torch */
        else
            g *= FMA(-h, h, SPLAT(1));
        NAME(store)(states, g);
        if (!grad_x)
            continue;
        if (full)
            NAME(store)(grad_x, g);
        else
            NAME(store_some)(grad_x, g, width);
        grad_x += grad_x_row;
    }
}

/* One step of one block for panels first..last-1; rows `before` and up begin here, with the gradient of h_n. */
static void NAME(backward_step)(const NAME(backward_job) *job, int d, int64_t step, int64_t b0, int before, int rows,
                                int64_t first, int64_t last, const real *now, real *next, real *tile) {
    const elman_backward_args *p = job->p;
    const elman_shape *s = &p->s;
    int64_t t = walk(s, d, step), after = step > 0 ? walk(s, d, step - 1) : t;
    int64_t out_at = position(s, t, b0, s->out_t, s->out_b);
    int64_t out_ahead = position(s, after, b0, s->out_t, s->out_b) - out_at;
    int64_t grad_out_at = position(s, t, b0, p->grad_out_t, p->grad_out_b);
    int64_t grad_out_ahead = position(s, after, b0, p->grad_out_t, p->grad_out_b) - grad_out_at;
    const real *out = (const real *)s->out + out_at + d * s->H;
    const real *grad_out = p->grad_out ? (const real *)p->grad_out + grad_out_at + d * s->H : 0;
    real *grad_x = p->grad_x ? (real *)p->grad_x + position(s, t, b0, p->grad_x_t, p->grad_x_b) + d * s->H : 0;
    const real *grad_last = p->grad_h_n ? (const real *)p->grad_h_n + d * p->grad_h_n_d + b0 * p->grad_h_n_b : 0;
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
                real *sums = tile + q * rows * PANEL + v * LANES, *states = next + NAME(at)(0, j);
                for (int i = before; grad_last && i < rows; i++)
                    *(vec *)(sums + i * PANEL) += NAME(load_some)(grad_last + i * p->grad_h_n_b + j, width);
                const real *grads = grad_out ? grad_out + j : 0;
                real *target = grad_x ? grad_x + j : 0;
                if (s->relu)
                    NAME(backward_rows)(1, 0, width, rows, sums, states, out + j, s->out_b, out_ahead, grads,
                                        p->grad_out_b, grad_out_ahead, target, p->grad_x_b);
                else if (width == LANES)
                    NAME(backward_rows)(0, 1, width, rows, sums, states, out + j, s->out_b, out_ahead, grads,
                                        p->grad_out_b, grad_out_ahead, target, p->grad_x_b);
                else
                    NAME(backward_rows)(0, 0, width, rows, sums, states, out + j, s->out_b, out_ahead, grads,
                                        p->grad_out_b, grad_out_ahead, target, p->grad_x_b);
            }
    }
}

/* grad_h0 = g W of each row's first step, whose g the state has kept. */
static void NAME(backward_first)(const NAME(backward_job) *job, int d, int64_t block, int64_t first, int64_t last,
                                 const real *now, real *tile) {
    const elman_shape *s = &job->p->s;
    const real *weight = job->packed + d * job->c.panels * job->c.panel_size;
    int64_t b0 = block * job->c.rows;
    int rows = (int)MIN(job->c.rows, s->B - b0);
    for (int64_t panel = first; panel < last; panel++) {
        NAME(narrow_tiles)[rows](s->H, now, weight + panel * job->c.panel_size, 0, tile);
        int64_t width = MIN(PANEL, s->H - panel * PANEL);
        for (int i = 0; i < rows; i++)
            memcpy((real *)job->p->grad_h0 + (d * s->B + b0 + i) * s->H + panel * PANEL, tile + i * PANEL,
                   (size_t)width * sizeof(real));
    }
}

/* grad_W += g^T h_{t-1} for rows b0.. of step t, g in vectors `g_step` elements apart and rows `g_row` apart. */
static void NAME(gather_step)(NAME(outer) *sum, const elman_shape *s, int d, int64_t t, int64_t b0, int64_t rows,
                              const real *g, int64_t g_step, int64_t g_row) {
    int64_t before = s->reverse[d] ? t + 1 : t - 1, inside = 0;
    if (before >= 0 && before < s->T) {
        inside = s->batch_sizes ? MAX(0, MIN(rows, s->batch_sizes[before] - b0)) : rows;
        const real *h = (const real *)s->out + position(s, before, b0, s->out_t, s->out_b) + d * s->H;
        if (s->H % LANES == 0)
            for (int64_t i = 0; i < inside; i++)
                NAME(outer_row)(sum, 1, 1, g + i * g_row, g_step, h + i * s->out_b);
        else
            for (int64_t i = 0; i < inside; i++)
                NAME(outer_row)(sum, 0, 0, g + i * g_row, g_step, h + i * s->out_b);
    }
    for (int64_t i = inside; s->h0 && i < rows; i++)
        NAME(outer_row)(sum, 0, 0, g + i * g_row, g_step, (const real *)s->h0 + d * s->h0_d + (b0 + i) * s->h0_b);
}

/* grad_table += g for rows b0.. of step t, while g is at hand in the state. */
static void NAME(table_step)(const elman_shape *s, int64_t t, int64_t b0, int rows, const real *state, real *table) {
    int64_t token_at = position(s, t, b0, s->tokens_t, s->tokens_b);
    for (int i = 0; i < rows; i++, state += LANES, token_at += s->tokens_b) {
        real *row = table + s->tokens[token_at] * s->H;
        int64_t j = 0;
        for (; j + LANES <= s->H; j += LANES)
            NAME(store)(row + j, NAME(load)(row + j) + NAME(load)(state + NAME(at)(0, j)));
        if (j < s->H)
            NAME(store_some)(row + j, NAME(load_some)(row + j, (int)(s->H - j)) + NAME(load)(state + NAME(at)(0, j)),
                             (int)(s->H - j));
    }
}

/* All steps of one block: the way of the row split. */
static void NAME(backward_block)(const NAME(backward_job) *job, int d, int64_t block, real *now, real *next,
                                 real *tile, NAME(outer) *sum, real *table) {
    const elman_shape *s = &job->p->s;
    int64_t b0 = block * job->c.rows;
    int rows = (int)MIN(job->c.rows, s->B - b0), before = 0;
    memset(now, 0, (size_t)job->c.state_size * sizeof(real));
    memset(next, 0, (size_t)job->c.state_size * sizeof(real));
    for (int64_t step = s->T - 1; step >= 0; step--) {
        int64_t t = walk(s, d, step);
        int active = active_rows(s, t, b0, rows);
        NAME(state_keep)(&job->c, active, before, 0, job->c.panels, now, next);
        if (active)
            NAME(backward_step)(job, d, step, b0, before, active, 0, job->c.panels, now, next, tile);
        if (active && sum && sum->target)
            NAME(gather_step)(sum, s, d, t, b0, active, next, MAX_ROWS * LANES, LANES);
        if (active && table)
            NAME(table_step)(s, t, b0, active, next, table);
        before = active;
        real *swap = now;
        now = next;
        next = swap;
    }
    NAME(backward_first)(job, d, block, 0, job->c.panels, now, tile);
}

/* One chunk of blocks with its own partial sums, so that the sums' order does not depend on who computes them. */
static void NAME(backward_chunk)(const NAME(backward_job) *job, int d, int64_t chunk, real *now, real *next,
                                 real *tile, real *memory) {
    const elman_shape *s = &job->p->s;
    int64_t index = d * job->chunks + chunk;
    NAME(outer) sum = {0};
    real *table = job->p->grad_table ? job->table_sums + index * s->V * s->H : 0;
    if (job->p->grad_weight[d])
        sum = NAME(outer_open)(memory, tile, job->weight_sums + index * s->H * s->H, s->H, s->H, 0,
                               CEIL_DIV(s->H, OUTER_TILE));
    if (table)
        memset(table, 0, (size_t)(s->V * s->H) * sizeof(real));
    for (int64_t b = job->c.blocks * chunk / job->chunks; b < job->c.blocks * (chunk + 1) / job->chunks; b++)
        NAME(backward_block)(job, d, b, now, next, tile, &sum, table);
    if (sum.target)
        NAME(outer_flush)(&sum);
}

static void NAME(backward_fused)(NAME(backward_job) *job, team *self, real *now, real *tile, real *memory) {
    const elman_backward_args *p = job->p;
    const elman_shape *s = &p->s;
    for (int64_t item; (item = job->next_item++) < s->D * job->chunks;)
        NAME(backward_chunk)(job, (int)(item / job->chunks), item % job->chunks, now, now + job->c.state_size, tile,
                             memory);
    team_barrier(self);
    for (int64_t d = 0; d < s->D; d++) {
        if (p->grad_weight[d])
            NAME(add_parts)(self, 0, job->weight_sums + d * job->chunks * s->H * s->H, job->chunks, s->H, s->H,
                            p->grad_weight[d], s->H);
        if (p->grad_table)
            NAME(add_parts)(self, 0, job->table_sums + d * job->chunks * s->V * s->H, job->chunks, s->V, s->H,
                            (real *)p->grad_table + d * s->H, s->D * s->H);
    }
}

/* All steps of this thread's panels, every block, in step with the team. */
static void NAME(backward_columns)(const NAME(backward_job) *job, team *self, real *tile) {
    const elman_shape *s = &job->p->s;
    int64_t begin, end, size = job->c.state_size;
    team_share(self, s->D * job->c.panels, &begin, &end);
    for (int64_t done = 0; done <= s->T; done++) {
        for (int64_t item = 0; item < s->D * job->c.blocks; item++) {
            int d = (int)(item / job->c.blocks);
            int64_t first = MAX(begin - d * job->c.panels, 0), last = MIN(end - d * job->c.panels, job->c.panels);
            if (first >= last)
                continue;
            real *now = job->states + (2 * item + done % 2) * size,
                 *next = job->states + (2 * item + 1 - done % 2) * size;
            if (done == s->T) {
                NAME(backward_first)(job, d, item % job->c.blocks, first, last, now, tile);
                continue;
            }
            int64_t step = s->T - 1 - done, t = walk(s, d, step), b0 = item % job->c.blocks * job->c.rows;
            int rows = (int)MIN(job->c.rows, s->B - b0), active = active_rows(s, t, b0, rows);
            int before = done ? active_rows(s, walk(s, d, step + 1), b0, rows) : 0;
            NAME(state_keep)(&job->c, active, before, first, last, now, next);
            if (active)
                NAME(backward_step)(job, d, step, b0, before, active, first, last, now, next, tile);
        }
        team_barrier(self);
    }
}

/* The weight gradients from the stored g: each thread has its own rows of grad_W and reads all positions. */
static void NAME(weight_pass)(const NAME(backward_job) *job, team *self, real *tile, real *memory) {
    const elman_backward_args *p = job->p;
    const elman_shape *s = &p->s;
    int64_t begin, end, tiles = CEIL_DIV(s->H, OUTER_TILE);
    team_share(self, s->D * tiles, &begin, &end);
    for (int d = 0; d < s->D; d++) {
        int64_t first = MAX(begin - d * tiles, 0), last = MIN(end - d * tiles, tiles);
        if (!p->grad_weight[d] || first >= last)
            continue;
        NAME(outer) sum = NAME(outer_open)(memory, tile, p->grad_weight[d], s->H, s->H, first, last);
        for (int64_t t = 0; t < s->T; t++)
            NAME(gather_step)(&sum, s, d, t, 0, s->batch_sizes ? s->batch_sizes[t] : s->B,
                              (const real *)p->grad_x + position(s, t, 0, p->grad_x_t, p->grad_x_b) + d * s->H, LANES,
                              p->grad_x_b);
        NAME(outer_flush)(&sum);
    }
}

/* The table's gradient from the stored g: each thread has its own columns and reads all positions. */
static void NAME(table_pass)(const NAME(backward_job) *job, team *self) {
    const elman_backward_args *p = job->p;
    const elman_shape *s = &p->s;
    int64_t begin, end, width = s->D * s->H;
    team_share(self, CEIL_DIV(width, LANES), &begin, &end);
    begin *= LANES;
    end = MIN(end * LANES, width);
    if (begin >= end)
        return;
    for (int64_t v = 0; v < s->V; v++)
        memset((real *)p->grad_table + v * width + begin, 0, (size_t)(end - begin) * sizeof(real));
    for (int64_t t = 0; t < s->T; t++) {
        int64_t rows = s->batch_sizes ? s->batch_sizes[t] : s->B;
        const int64_t *id = s->tokens + position(s, t, 0, s->tokens_t, s->tokens_b);
        const real *g = (const real *)p->grad_x + position(s, t, 0, p->grad_x_t, p->grad_x_b);
        for (int64_t b = 0; b < rows; b++, id += s->tokens_b, g += p->grad_x_b) {
            real *row = (real *)p->grad_table + *id * width;
            for (int64_t j = begin; j < end; j += LANES) {
                int n = (int)MIN(LANES, end - j);
                NAME(store_some)(row + j, NAME(load_some)(row + j, n) + NAME(load_some)(g + j, n), n);
            }
        }
    }
}

static void NAME(backward_team)(void *argument, team *self) {
    NAME(backward_job) *job = argument;
    const elman_backward_args *p = job->p;
    const elman_shape *s = &p->s;
    int64_t begin, end, items = s->D * job->c.blocks, size = job->c.state_size;
    team_share(self, s->D * job->c.panels, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        int64_t d = i / job->c.panels;
        NAME(pack_panel)(s->weight[d], s->weight_row[d], 0, s->H, s->H, i % job->c.panels,
                         job->packed + i * job->c.panel_size);
    }
    real *tile = job->tiles + self->rank * 4 * MAX_ROWS * PANEL;
    real *memory = job->gathers + self->rank * NAME(outer_size)(s->H, s->H);
    if (s->columns) {
        team_share(self, items, &begin, &end);
        memset(job->states + 2 * begin * size, 0, (size_t)(2 * (end - begin) * size) * sizeof(real));
        team_barrier(self);
        NAME(backward_columns)(job, self, tile);
    } else {
        team_barrier(self);
        real *now = job->states + self->rank * 2 * size;
        if (p->fused) {
            NAME(backward_fused)(job, self, now, tile, memory);
            return;
        }
        for (int64_t item; (item = job->next_item++) < items;)
            NAME(backward_block)(job, (int)(item / job->c.blocks), item % job->c.blocks, now, now + size, tile, 0, 0);
        team_barrier(self);
    }
    NAME(weight_pass)(job, self, tile, memory);
    if (p->grad_table)
        NAME(table_pass)(job, self);
}

static void NAME(backward_scratch)(NAME(backward_job) *job, arena *memory) {
    const elman_backward_args *p = job->p;
    const elman_shape *s = &p->s;
    job->packed = take(memory, s->D * job->c.panels * job->c.panel_size, sizeof(real));
    job->states = take(memory, 2 * job->c.state_size * (s->columns ? s->D * job->c.blocks : s->threads), sizeof(real));
    job->tiles = take(memory, s->threads * 4 * MAX_ROWS * PANEL, sizeof(real));
    int weights = p->grad_weight[0] || p->grad_weight[1];
    job->gathers = take(memory, weights ? s->threads * NAME(outer_size)(s->H, s->H) : 0, sizeof(real));
    job->weight_sums = take(memory, p->fused && weights ? s->D * job->chunks * s->H * s->H : 0, sizeof(real));
    job->table_sums = take(memory, p->fused && p->grad_table ? s->D * job->chunks * s->V * s->H : 0, sizeof(real));
}

static int NAME(elman_backward)(const void *args) {
    const elman_backward_args *p = args;
    NAME(backward_job) job = {.p = p, .c = NAME(make_cut)(&p->s, !p->fused)};
    job.chunks = MIN(MAX_CHUNKS, job.c.blocks);
    if (!tokens_in_range(&p->s))
        return STATUS_BAD_TOKEN;
    arena memory = {0};
    NAME(backward_scratch)(&job, &memory);
    if (arena_open(&memory))
        return STATUS_NO_MEMORY;
    NAME(backward_scratch)(&job, &memory);
    team_run(p->s.threads, NAME(backward_team), &job);
    arena_close(&memory);
    return STATUS_OK;
}

#endif
