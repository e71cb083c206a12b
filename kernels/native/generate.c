/*
 * The whole decoding loop: warm up on the prompts, then append one id after the other.
 *
 *   h^l_t = f(input^l_t + h^l_{t-1} W_hh^T),   input^0 = table[id],   input^l = h^{l-1}_t W_ih^T + bias
 *   o_t = h^L_t W^T + b,   next id: argmax o, or the first whose cumulated q exceeds u * sum q, q = exp(alpha o / tau)
 *
 * Many sequences: blocks of rows are split over the threads, each block decoded on its own. Few: one block, the columns
 * of every layer split, one barrier a layer; head and choice are so short that each thread computes them for itself.
 */
#ifndef ISA

#include "kernels.h"
#include "threads.h"

#define TARGET_FILE "generate.c"
#include "targets.h"

const kernel generate_kernels[ISA_COUNT][2] = KERNEL_TABLE(generate);

#else

#include "simd.h"

typedef struct {
    const generate_args *p;
    int64_t rows, blocks; /* rows of a block */
    int64_t columns;      /* 1: one block, columns split */
    int64_t panels, head_panels, panel_size, state_size;
    real *weight_ih, *weight_hh; /* packed, [L][panels] */
    real *head;                  /* packed, [head_panels] */
    real *head_bias;             /* (head_panels * PANEL), -inf beyond V */
    real *states;                /* per thread, or shared by the team: [2][L] blocks */
    real *thread_memory;         /* per thread: tile, logits, order */
    int64_t thread_size;
    int64_t *tokens; /* per thread: [MAX_ROWS] */
    _Atomic int64_t next_block;
} NAME(decode_job);

/* One block on its way: its rows, the panels that are this thread's, its memory. */
typedef struct {
    int64_t b0, first, last;
    int rows;
    real *states, *tile, *logits, *order;
    int64_t *tokens;
    team *self;
} NAME(decoder);

static real *NAME(decoder_state)(const NAME(decode_job) *job, const NAME(decoder) *a, int64_t parity, int64_t layer) {
    return a->states + (parity * job->p->L + layer) * job->state_size;
}

/* next = f(input + now W_hh^T) for this thread's panels of one layer; `below` is the new state of the layer below. */
static void NAME(decode_layer)(const NAME(decode_job) *job, const NAME(decoder) *a, int64_t layer, const real *below,
                               const real *now, real *next) {
    const generate_args *p = job->p;
    real *input = a->tile + 4 * MAX_ROWS * PANEL;
    for (int64_t panel = a->first; panel < a->last;) {
        int64_t at = layer * job->panels + panel;
        int count = NAME(multiply)(a->rows, a->last - panel, p->H, now, job->weight_hh + at * job->panel_size,
                                   job->panel_size, a->tile);
        for (int q = 0; layer && q < count; q++)
            NAME(narrow_tiles)
            [a->rows](p->H, below, job->weight_ih + (at + q) * job->panel_size, 0, input + q * a->rows * PANEL);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->H; v += LANES, j += LANES)
                for (int i = 0; i < a->rows; i++) {
                    const real *add = layer ? p->bias[layer] : (const real *)p->table + a->tokens[i] * p->H;
                    vec h = NAME(load)(a->tile + (q * a->rows + i) * PANEL + v);
                    if (layer)
                        h += NAME(load)(input + (q * a->rows + i) * PANEL + v);
                    h += NAME(load_some)(add + j, (int)MIN(LANES, p->H - j));
                    NAME(store)(next + NAME(at)(i, j), p->relu ? NAME(vrelu)(h) : NAME(vtanh)(h));
                }
    }
}

static void NAME(decode_step)(const NAME(decode_job) *job, const NAME(decoder) *a, int64_t parity) {
    for (int64_t layer = 0; layer < job->p->L; layer++) {
        real *next = NAME(decoder_state)(job, a, 1 - parity, layer);
        const real *below = layer ? NAME(decoder_state)(job, a, 1 - parity, layer - 1) : 0;
        NAME(decode_layer)(job, a, layer, below, NAME(decoder_state)(job, a, parity, layer), next);
        team_barrier(a->self);
    }
}

/* logits [rows][head_panels * PANEL] of the top layer's state. */
static void NAME(decode_head)(const NAME(decode_job) *job, const NAME(decoder) *a, const real *top) {
    int64_t stride = job->head_panels * PANEL;
    for (int64_t panel = 0; panel < job->head_panels;) {
        int count = NAME(multiply)(a->rows, job->head_panels - panel, job->p->H, top,
                                   job->head + panel * job->panel_size, job->panel_size, a->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int i = 0; i < a->rows; i++)
                for (int v = 0; v < PANEL; v += LANES)
                    NAME(store)(a->logits + i * stride + panel * PANEL + v,
                                NAME(load)(a->tile + (q * a->rows + i) * PANEL + v) +
                                    NAME(load)(job->head_bias + panel * PANEL + v));
    }
}

static int64_t NAME(argmax)(const real *logits, int64_t V) {
    int64_t best = 0;
    for (int64_t v = 1; v < V; v++)
        if (logits[v] > logits[best])
            best = v;
    return best;
}

/* The k-th largest logit, duplicates counted, by sinking each value into the k largest so far. */
static real NAME(kth_largest)(const real *logits, int64_t V, int64_t k, real *largest) {
    int64_t count = 0;
    for (int64_t v = 0; v < V; v++) {
        if (count == k && !(logits[v] > largest[k - 1]))
            continue;
        int64_t place = count < k ? count++ : k - 1;
        for (; place > 0 && largest[place - 1] < logits[v]; place--)
            largest[place] = largest[place - 1];
        largest[place] = logits[v];
    }
    return largest[k - 1];
}

/* The first id whose cumulated q exceeds uniform * sum q. Overwrites the logits, whose tail beyond V is -inf. */
static int64_t NAME(choose)(const NAME(decode_job) *job, real *logits, real *order, double uniform) {
    const generate_args *p = job->p;
    real least = -(real)INFINITY;
    if (p->top_k && p->top_k < p->V)
        least = NAME(kth_largest)(logits, p->V, p->top_k, order);
    real highest = logits[NAME(argmax)(logits, p->V)], sharpness = (real)*p->sharpness;
    double total = 0, reached = 0;
    for (int64_t v = 0; v < p->V; v += LANES) {
        vec o = NAME(load)(logits + v);
        vec q = NAME(vexp)((o - SPLAT(highest)) * SPLAT(sharpness));
        NAME(store)(logits + v, NAME(select)(o < SPLAT(least), (vec){0}, q));
    }
    for (int64_t v = 0; v < p->V; v++)
        total += logits[v];
    int64_t chosen = 0;
    for (int64_t v = 0; v < p->V; v++) {
        if (logits[v] > 0)
            chosen = v;
        reached += logits[v];
        if (reached > uniform * total)
            break;
    }
    return chosen;
}

static void NAME(decode_choose)(const NAME(decode_job) *job, const NAME(decoder) *a, int64_t n) {
    const generate_args *p = job->p;
    for (int i = 0; i < a->rows; i++) {
        real *logits = a->logits + i * job->head_panels * PANEL;
        int64_t b = a->b0 + i;
        a->tokens[i] =
            p->uniforms ? NAME(choose)(job, logits, a->order, p->uniforms[b * p->N + n]) : NAME(argmax)(logits, p->V);
        if (a->self->rank == 0 || !job->columns)
            p->ids[b * p->N + n] = a->tokens[i];
    }
}

/* The whole string of one block. Prompt and ids together are P + N - 1 steps: the last id is not read. */
static void NAME(decode_block)(const NAME(decode_job) *job, const NAME(decoder) *a) {
    const generate_args *p = job->p;
    for (int64_t step = 0; step < p->P + p->N - 1; step++) {
        for (int i = 0; step < p->P && i < a->rows; i++)
            a->tokens[i] = p->prompt[(a->b0 + i) * p->P + step];
        NAME(decode_step)(job, a, step % 2);
        if (step < p->P - 1)
            continue;
        NAME(decode_head)(job, a, NAME(decoder_state)(job, a, 1 - step % 2, p->L - 1));
        NAME(decode_choose)(job, a, step - (p->P - 1));
    }
}

static void NAME(decode_load)(const NAME(decode_job) *job, const NAME(decoder) *a) {
    const generate_args *p = job->p;
    for (int64_t layer = 0; layer < p->L; layer++)
        for (int i = 0; i < a->rows; i++)
            NAME(block_load)(NAME(decoder_state)(job, a, 0, layer), i, p->H,
                             (const real *)p->state + (layer * p->B + a->b0 + i) * p->H);
}

static void NAME(decode_save)(const NAME(decode_job) *job, const NAME(decoder) *a) {
    const generate_args *p = job->p;
    for (int64_t layer = 0; layer < p->L; layer++)
        for (int i = 0; i < a->rows; i++)
            NAME(block_save)(NAME(decoder_state)(job, a, (p->P + p->N - 1) % 2, layer), i, p->H,
                             (real *)p->state + (layer * p->B + a->b0 + i) * p->H);
}

static void NAME(decode_pack)(const NAME(decode_job) *job, const team *self) {
    const generate_args *p = job->p;
    int64_t begin, end, size = job->panel_size;
    team_share(self, job->panels, &begin, &end);
    for (int64_t layer = 0; layer < p->L; layer++)
        for (int64_t i = begin; i < end; i++) {
            int64_t at = (layer * job->panels + i) * size;
            NAME(pack_panel)(p->weight_hh[layer], p->H, 1, p->H, p->H, i, job->weight_hh + at);
            if (layer)
                NAME(pack_panel)(p->weight_ih[layer], p->H, 1, p->H, p->H, i, job->weight_ih + at);
        }
    team_share(self, job->head_panels, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        NAME(pack_panel)(p->head_weight, p->H, 1, p->H, p->V, i, job->head + i * size);
}

static void NAME(decode_team)(void *argument, team *self) {
    NAME(decode_job) *job = argument;
    const generate_args *p = job->p;
    team alone = {1, 0, 0, 0};
    NAME(decoder) a = {.first = 0, .last = job->panels, .self = job->columns ? self : &alone};
    a.states = job->states + (job->columns ? 0 : self->rank * 2 * p->L * job->state_size);
    a.tile = job->thread_memory + self->rank * job->thread_size;
    a.logits = a.tile + 8 * MAX_ROWS * PANEL;
    a.order = a.logits + MAX_ROWS * job->head_panels * PANEL;
    a.tokens = job->tokens + self->rank * MAX_ROWS;
    NAME(decode_pack)(job, self);
    if (job->columns) {
        team_share(self, job->panels, &a.first, &a.last);
        a.rows = (int)p->B;
        if (self->rank == 0)
            NAME(decode_load)(job, &a);
        team_barrier(self);
        NAME(decode_block)(job, &a);
        if (self->rank == 0)
            NAME(decode_save)(job, &a);
        return;
    }
    team_barrier(self);
    for (int64_t block; (block = job->next_block++) < job->blocks;) {
        a.b0 = block * job->rows;
        a.rows = (int)MIN(job->rows, p->B - a.b0);
        NAME(decode_load)(job, &a);
        NAME(decode_block)(job, &a);
        NAME(decode_save)(job, &a);
    }
}

static void NAME(decode_scratch)(NAME(decode_job) *job, arena *memory) {
    const generate_args *p = job->p;
    int64_t weights = p->L * job->panels * job->panel_size, stride = job->head_panels * PANEL;
    job->weight_hh = take(memory, weights, sizeof(real));
    job->weight_ih = take(memory, p->L > 1 ? weights : 0, sizeof(real));
    job->head = take(memory, job->head_panels * job->panel_size, sizeof(real));
    job->head_bias = take(memory, stride, sizeof(real));
    job->states = take(memory, (job->columns ? 1 : p->threads) * 2 * p->L * job->state_size, sizeof(real));
    job->thread_size = CEIL_DIV(8 * MAX_ROWS * PANEL + MAX_ROWS * stride + p->V, 16) * 16;
    job->thread_memory = take(memory, p->threads * job->thread_size, sizeof(real));
    job->tokens = take(memory, p->threads * MAX_ROWS, sizeof(int64_t));
}

static int NAME(generate)(const void *args) {
    const generate_args *p = args;
    NAME(decode_job) job = {.p = p, .columns = p->threads > 1 && p->B < 4 * p->threads && p->B <= MAX_ROWS};
    job.blocks = CEIL_DIV(p->B, MAX_ROWS);
    if (!job.columns)
        job.blocks = MIN(p->B, CEIL_DIV(job.blocks, p->threads) * p->threads);
    job.rows = CEIL_DIV(p->B, job.blocks);
    job.blocks = CEIL_DIV(p->B, job.rows);
    job.panels = CEIL_DIV(p->H, PANEL);
    job.head_panels = CEIL_DIV(p->V, PANEL);
    job.panel_size = p->H * PANEL;
    job.state_size = NAME(block_size)(p->H);
    for (int64_t i = 0; i < p->B * p->P; i++)
        if ((uint64_t)p->prompt[i] >= (uint64_t)p->V)
            return STATUS_BAD_TOKEN;
    arena memory = {0};
    NAME(decode_scratch)(&job, &memory);
    if (arena_open(&memory))
        return STATUS_NO_MEMORY;
    NAME(decode_scratch)(&job, &memory);
    for (int64_t v = 0; v < job.head_panels * PANEL; v++)
        job.head_bias[v] = v >= p->V ? -(real)INFINITY : p->head_bias ? ((const real *)p->head_bias)[v] : 0;
    team_run(p->threads, NAME(decode_team), &job);
    arena_close(&memory);
    return STATUS_OK;
}

#endif
