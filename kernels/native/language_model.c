/*
 * One training step of a one-layer character model in one pass: forward, loss and all gradients.
 *
 *   h_t = f(table[token_t] + h_{t-1} W^T),   o_t = h_t U^T + b,   loss = mean over (t, b) of -log softmax(o_t)[target_t]
 *   grad_o_t = (softmax(o_t) - onehot(target_t)) / count,   g_t = (g_{t+1} W + grad_o_t U) f'(h_t)
 *   [grad_W; grad_U] = sum_t [g_{t+1}, grad_o_t]^T h_t,   grad_table[v] = sum of g_t where token_t = v
 *
 * A block of MAX_ROWS rows goes through all steps and back with its states in level 2, so nothing of size (T, B, H) is
 * ever stored. g_{t+1} and grad_o_t lie side by side in one block: one product makes the gradient of h_t. Blocks are
 * cut into chunks by the shape alone; each chunk has its own sums, added in order at the end.
 */
#ifndef ISA

#include "kernels.h"
#include "threads.h"

#define TARGET_FILE "language_model.c"
#include "targets.h"

const kernel language_model_kernels[ISA_COUNT][2] = KERNEL_TABLE(language_model);

#else

#include "simd.h"

#include "outer.h"

#ifndef CHARRNN_LANGUAGE_MODEL_ONCE
#define CHARRNN_LANGUAGE_MODEL_ONCE
/* Partial sums, at most; steps whose outer products are summed in registers before they go to a partial sum. */
enum { STEP_CHUNKS = 32, RING = 8 };
#endif

typedef struct {
    const language_model_args *p;
    int64_t blocks, chunks;
    int64_t depth;       /* rows of [W; U], where U begins at a whole vector */
    int64_t state_size;  /* elements of one block of h, or of g */
    int64_t grads_size;  /* elements of one block of [g, grad_o] */
    real *weight, *head; /* packed W^T and U^T */
    real *both;          /* packed [W; U] */
    real *bias;          /* whole panels, -inf beyond V */
    real *thread_memory;
    int64_t thread_size;
    real *weight_sums, *head_sums, *table_sums, *bias_sums; /* [chunks] of (H, H), (V, H), (V, H), (V) */
    double *losses;                                         /* [chunks] */
    _Atomic int64_t next_chunk, counted, bad;
} NAME(step_job);

/*
 * This thread's memory: h_0 .. h_T, RING blocks [g_{t+1}, grad_o_t] at t % RING, a block of logits, a tile; and the
 * chunk's sums.
 */
typedef struct {
    real *states, *grads, *logits, *tile;
    real *weight_sum, *head_sum, *table_sum, *bias_sum;
    real factor; /* of every row's gradient */
    int64_t b0;
    int rows;
    double loss;
} NAME(step_memory);

static NAME(step_memory) NAME(step_memory_of)(const NAME(step_job) *job, int rank, int64_t *size) {
    NAME(step_memory) m = {.states = job->thread_memory + rank * job->thread_size};
    m.grads = m.states + (job->p->T + 1) * job->state_size;
    m.logits = m.grads + RING * job->grads_size;
    m.tile = m.logits + NAME(block_size)(job->p->V);
    *size = m.tile + 4 * MAX_ROWS * PANEL - m.states;
    return m;
}

/* h = f(table[token] + sums), one vector of columns of all rows. */
INLINE void NAME(step_states)(const int relu, int width, int rows, const real *const *x, int64_t j, const real *sums,
                              real *states) {
    for (int i = 0; i < rows; i++, sums += PANEL, states += LANES) {
        vec h = NAME(load_some)(x[i] + j, width) + NAME(load)(sums);
        NAME(store)(states, relu ? NAME(vrelu)(h) : NAME(vtanh)(h));
    }
}

static void NAME(step_forward)(const NAME(step_job) *job, int64_t t, const NAME(step_memory) *m) {
    const language_model_args *p = job->p;
    const real *now = m->states + t * job->state_size, *x[MAX_ROWS];
    real *next = m->states + (t + 1) * job->state_size;
    for (int i = 0; i < m->rows; i++)
        x[i] = (const real *)p->table + p->tokens[t * p->tokens_t + (m->b0 + i) * p->tokens_b] * p->table_row;
    int64_t panels = CEIL_DIV(p->H, PANEL), size = p->H * PANEL;
    for (int64_t panel = 0; panel < panels;) {
        int count = NAME(multiply)(m->rows, panels - panel, p->H, now, job->weight + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->H; v += LANES, j += LANES) {
                int width = (int)MIN(LANES, p->H - j);
                const real *sums = m->tile + q * m->rows * PANEL + v;
                if (p->relu)
                    NAME(step_states)(1, width, m->rows, x, j, sums, next + NAME(at)(0, j));
                else if (width == LANES)
                    NAME(step_states)(0, LANES, m->rows, x, j, sums, next + NAME(at)(0, j));
                else
                    NAME(step_states)(0, width, m->rows, x, j, sums, next + NAME(at)(0, j));
            }
    }
}

/* exp(logits - highest) of row i to grads; returns its sum. */
INLINE real NAME(step_exp)(const int64_t vectors, const real *logits, real *grads, real highest) {
    vec total = {0};
    for (int64_t v = 0; v < vectors; v++) {
        vec e = NAME(vexp)(NAME(load)(logits + v * MAX_ROWS * LANES) - SPLAT(highest));
        NAME(store)(grads + v * MAX_ROWS * LANES, e);
        total += e;
    }
    return NAME(sum)(total);
}

INLINE real NAME(step_highest)(const int64_t vectors, int rows, const real *logits) {
    vec high = NAME(load)(logits);
    for (int64_t v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++)
            high = NAME(vmax)(NAME(load)(logits + v * MAX_ROWS * LANES + i * LANES), high);
    return NAME(highest)(high);
}

/*
 * Loss and grad_o of step t from the logits. The block's highest logit stands for each row's own, which saves a
 * horizontal maximum per row, unless a row lies so far below it that its sum would lose digits.
 */
INLINE double NAME(step_rows)(const NAME(step_job) *job, const int64_t vectors, int64_t t, const NAME(step_memory) *m,
                              real *grads) {
    const language_model_args *p = job->p;
    const real common = NAME(step_highest)(vectors, m->rows, m->logits);
    real sums[MAX_ROWS];
    for (int i = 0; i < m->rows; i++)
        sums[i] = NAME(step_exp)(vectors, m->logits + i * LANES, grads + i * LANES, common);
    double loss = 0, product = 1; /* of at most 12 sums in 1e-20..V: one logarithm for them all */
    for (int i = 0; i < m->rows; i++) {
        real highest = common;
        if (!(sums[i] >= (real)1e-20)) {
            highest = NAME(step_highest)(vectors, 1, m->logits + i * LANES);
            sums[i] = NAME(step_exp)(vectors, m->logits + i * LANES, grads + i * LANES, highest);
        }
        int64_t target = p->targets[t * p->targets_t + (m->b0 + i) * p->targets_b];
        int counts = target != p->ignore_index;
        int64_t at = NAME(at)(i, counts ? target : 0);
        real factor = counts ? m->factor : 0;
        vec scale = SPLAT(factor / sums[i]);
        for (int64_t v = 0; v < vectors; v++) {
            real *grad = grads + v * MAX_ROWS * LANES + i * LANES;
            NAME(store)(grad, NAME(load)(grad) * scale);
        }
        grads[at] -= factor;
        loss += counts ? (double)highest - m->logits[at] : 0;
        product *= counts ? sums[i] : 1;
    }
    return loss + log(product);
}

static void NAME(step_loss)(const NAME(step_job) *job, int64_t t, NAME(step_memory) *m, const real *state,
                            real *grads) {
    const language_model_args *p = job->p;
    int64_t panels = CEIL_DIV(p->V, PANEL), vectors = CEIL_DIV(p->V, LANES), size = p->H * PANEL;
    for (int64_t panel = 0; panel < panels;) {
        int count = NAME(multiply)(m->rows, panels - panel, p->H, state, job->head + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->V; v += LANES, j += LANES) {
                vec bias = NAME(load)(job->bias + j);
                for (int i = 0; i < m->rows; i++)
                    NAME(store)(m->logits + NAME(at)(i, j), NAME(load)(m->tile + (q * m->rows + i) * PANEL + v) + bias);
            }
    }
    m->loss += vectors == 2 ? NAME(step_rows)(job, 2, t, m, grads) : NAME(step_rows)(job, vectors, t, m, grads);
    for (int64_t v = 0; m->bias_sum && v < p->V; v += LANES) {
        int width = (int)MIN(LANES, p->V - v);
        vec sum = NAME(load_some)(m->bias_sum + v, width);
        for (int i = 0; i < m->rows; i++)
            sum += NAME(load)(grads + NAME(at)(i, v));
        NAME(store_some)(m->bias_sum + v, sum, width);
    }
}

/* OUTER_TILE columns of g by `vectors` vectors of h, over all rows of `steps` blocks. */
INLINE void NAME(step_tile)(const int vectors, int rows, int64_t steps, const real *g, int64_t g_size, const real *h,
                            int64_t h_size, real *tile) {
    vec sums[OUTER_TILE][2];
    for (int i = 0; i < OUTER_TILE; i++)
        sums[i][0] = sums[i][1] = (vec){0};
    do {
        const real *a = g, *b = h, *end = h + rows * LANES;
        do {
            vec first = NAME(load)(b), second = vectors == 2 ? NAME(load)(b + MAX_ROWS * LANES) : (vec){0};
            for (int i = 0; i < OUTER_TILE; i++) {
                vec factor = NAME(splat)(a[i]);
                PIN(factor);
                sums[i][0] = FMA(factor, first, sums[i][0]);
                if (vectors == 2)
                    sums[i][1] = FMA(factor, second, sums[i][1]);
            }
            a += LANES;
            b += LANES;
        } while (b != end);
        g += g_size;
        h += h_size;
    } while (--steps);
    for (int i = 0; i < OUTER_TILE; i++)
        for (int v = 0; v < vectors; v++)
            NAME(store)(tile + i * PANEL + v * LANES, sums[i][v]);
}

/* target (G, H) += sum over the rows of `steps` blocks of g^T h. */
static void NAME(step_outer)(const NAME(step_job) *job, const NAME(step_memory) *m, int64_t steps, const real *g,
                             const real *h, int64_t G, real *target) {
    int64_t H = job->p->H;
    for (int64_t j = 0; j < H; j += PANEL)
        for (int64_t r = 0; r < G; r += OUTER_TILE) {
            const real *from = g + NAME(at)(0, r), *states = h + NAME(at)(0, j);
            if (H - j > LANES)
                NAME(step_tile)(2, m->rows, steps, from, job->grads_size, states, job->state_size, m->tile);
            else
                NAME(step_tile)(1, m->rows, steps, from, job->grads_size, states, job->state_size, m->tile);
            NAME(outer_add)(m->tile, target + r * H + j, MIN(OUTER_TILE, G - r), H, H - j);
        }
}

/* g = sums f'(h), one vector of columns of all rows. */
INLINE void NAME(step_grads)(const int relu, int rows, const real *sums, const real *states, real *grads) {
    for (int i = 0; i < rows; i++, sums += PANEL, states += LANES, grads += LANES) {
        vec g = NAME(load)(sums), h = NAME(load)(states);
        g = relu ? NAME(select)(h > (vec){0}, g, (vec){0}) : (vec)(g * FMA(-h, h, SPLAT(1)));
        NAME(store)(grads, g);
    }
}

/* grad_table += g of step t. */
static void NAME(step_table)(const NAME(step_job) *job, int64_t t, const NAME(step_memory) *m, const real *g) {
    const language_model_args *p = job->p;
    for (int i = 0; i < m->rows; i++, g += LANES) {
        real *row = m->table_sum + p->tokens[t * p->tokens_t + (m->b0 + i) * p->tokens_b] * p->H;
        int64_t j = 0;
        for (; j + LANES <= p->H; j += LANES)
            NAME(store)(row + j, NAME(load)(row + j) + NAME(load)(g + NAME(at)(0, j)));
        if (j < p->H)
            NAME(store_some)(row + j, NAME(load_some)(row + j, (int)(p->H - j)) + NAME(load)(g + NAME(at)(0, j)),
                             (int)(p->H - j));
    }
}

/* The gradient of h_t, t = T..0, and with it g of step t-1 or grad_h0. */
static void NAME(step_backward)(const NAME(step_job) *job, int64_t t, NAME(step_memory) *m) {
    const language_model_args *p = job->p;
    const real *state = m->states + t * job->state_size;
    real *grads = m->grads + t % RING * job->grads_size, *next = m->grads + (t + RING - 1) % RING * job->grads_size;
    if (t > 0)
        NAME(step_loss)(job, t - 1, m, state, grads + job->state_size);
    else
        memset(grads + job->state_size, 0, (size_t)(job->grads_size - job->state_size) * sizeof(real));
    if (t % RING == 0) {
        int64_t steps = MIN(RING, p->T + 1 - t);
        NAME(step_outer)(job, m, steps, grads, state, p->H, m->weight_sum);
        NAME(step_outer)(job, m, steps, grads + job->state_size, state, p->V, m->head_sum);
    }
    int64_t panels = CEIL_DIV(p->H, PANEL), size = job->depth * PANEL;
    for (int64_t panel = 0; panel < panels;) {
        int count = NAME(multiply)(m->rows, panels - panel, job->depth, grads, job->both + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->H; v += LANES, j += LANES) {
                const real *sums = m->tile + q * m->rows * PANEL + v;
                if (t > 0 && p->relu)
                    NAME(step_grads)(1, m->rows, sums, state + NAME(at)(0, j), next + NAME(at)(0, j));
                else if (t > 0)
                    NAME(step_grads)(0, m->rows, sums, state + NAME(at)(0, j), next + NAME(at)(0, j));
                for (int i = 0; t == 0 && i < m->rows; i++, sums += PANEL)
                    NAME(store_some)((real *)p->grad_h0 + (m->b0 + i) * p->H + j, NAME(load)(sums),
                                     (int)MIN(LANES, p->H - j));
            }
    }
    if (t > 0)
        NAME(step_table)(job, t - 1, m, next);
}

static void NAME(step_block)(const NAME(step_job) *job, int64_t block, NAME(step_memory) *m) {
    const language_model_args *p = job->p;
    m->b0 = block * MAX_ROWS;
    m->rows = (int)MIN(MAX_ROWS, p->B - m->b0);
    memset(m->states, 0, (size_t)job->state_size * sizeof(real));
    for (int i = 0; p->h0 && i < m->rows; i++)
        NAME(block_load)(m->states, i, p->H, (const real *)p->h0 + (m->b0 + i) * p->h0_row);
    for (int64_t t = 0; t < p->T; t++)
        NAME(step_forward)(job, t, m);
    for (int i = 0; i < m->rows; i++)
        NAME(block_save)(m->states + p->T * job->state_size, i, p->H, (real *)p->h_n + (m->b0 + i) * p->H);
    memset(m->grads + p->T % RING * job->grads_size, 0, (size_t)job->state_size * sizeof(real));
    for (int64_t t = p->T; t >= 0; t--)
        NAME(step_backward)(job, t, m);
}

static void NAME(step_chunk)(const NAME(step_job) *job, int64_t chunk, NAME(step_memory) *m) {
    const language_model_args *p = job->p;
    int64_t H = p->H, V = p->V;
    m->weight_sum = memset(job->weight_sums + chunk * H * H, 0, (size_t)(H * H) * sizeof(real));
    m->head_sum = memset(job->head_sums + chunk * V * H, 0, (size_t)(V * H) * sizeof(real));
    m->table_sum = memset(job->table_sums + chunk * V * H, 0, (size_t)(V * H) * sizeof(real));
    m->bias_sum = p->grad_bias ? memset(job->bias_sums + chunk * V, 0, (size_t)V * sizeof(real)) : 0;
    m->loss = 0;
    for (int64_t b = job->blocks * chunk / job->chunks; b < job->blocks * (chunk + 1) / job->chunks; b++)
        NAME(step_block)(job, b, m);
    job->losses[chunk] = m->loss;
}

/* Whether an id that is not `ignored` lies outside 0..V-1; adds how many there are to *counted. */
INLINE int NAME(step_bad)(const int64_t *id, int64_t count, const int64_t stride, int64_t V, int64_t ignored,
                          int64_t *counted) {
    int64_t bits = 0, left_out = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t skip = -(int64_t)(id[i * stride] == ignored);
        left_out -= skip;
        bits |= (id[i * stride] | (V - 1 - id[i * stride])) & ~skip;
    }
    *counted += count - left_out;
    return bits < 0;
}

/* Checks this thread's share of the ids (T, B), which reads along the shorter stride. */
static int64_t NAME(step_check)(NAME(step_job) *job, const team *self, const int64_t *id, int64_t stride_t,
                                int64_t stride_b, int64_t ignored) {
    const language_model_args *p = job->p;
    int along_t = stride_t < stride_b, bad = 0;
    int64_t begin, end, counted = 0, count = along_t ? p->T : p->B, stride = along_t ? stride_t : stride_b;
    team_share(self, along_t ? p->B : p->T, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t *line = id + i * (along_t ? stride_b : stride_t);
        bad |= stride == 1 ? NAME(step_bad)(line, count, 1, p->V, ignored, &counted)
                           : NAME(step_bad)(line, count, stride, p->V, ignored, &counted);
    }
    if (bad)
        job->bad = 1;
    return counted;
}

static void NAME(step_pack)(const NAME(step_job) *job, const team *self) {
    const language_model_args *p = job->p;
    int64_t begin, end, H = p->H, V = p->V, columns = CEIL_DIV(H, LANES) * LANES;
    team_share(self, CEIL_DIV(V, PANEL), &begin, &end);
    for (int64_t i = begin; i < end; i++)
        NAME(pack_panel)(p->head, p->head_row, 1, H, V, i, job->head + i * H * PANEL);
    team_share(self, CEIL_DIV(H, PANEL), &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        real *both = job->both + i * job->depth * PANEL;
        NAME(pack_panel)(p->weight, p->weight_row, 1, H, H, i, job->weight + i * H * PANEL);
        NAME(pack_panel)(p->weight, p->weight_row, 0, H, H, i, both);
        memset(both + H * PANEL, 0, (size_t)((columns - H) * PANEL) * sizeof(real));
        NAME(pack_panel)(p->head, p->head_row, 0, V, H, i, both + columns * PANEL);
    }
}

static void NAME(step_team)(void *argument, team *self) {
    NAME(step_job) *job = argument;
    const language_model_args *p = job->p;
    int64_t unused;
    NAME(step_check)(job, self, p->tokens, p->tokens_t, p->tokens_b, 0); /* 0 is in range anyway */
    job->counted += NAME(step_check)(job, self, p->targets, p->targets_t, p->targets_b, p->ignore_index);
    NAME(step_pack)(job, self);
    NAME(step_memory) memory = NAME(step_memory_of)(job, self->rank, &unused);
    team_barrier(self);
    if (job->bad)
        return;
    memory.factor = (real)(1 / (double)job->counted);
    for (int64_t chunk; (chunk = job->next_chunk++) < job->chunks;)
        NAME(step_chunk)(job, chunk, &memory);
    team_barrier(self);
    NAME(add_parts)(self, job->weight_sums, job->chunks, p->H, p->H, p->grad_weight, p->H);
    NAME(add_parts)(self, job->head_sums, job->chunks, p->V, p->H, p->grad_head, p->H);
    NAME(add_parts)(self, job->table_sums, job->chunks, p->V, p->H, p->grad_table, p->H);
    if (p->grad_bias && self->rank == 0) {
        team alone = {1, 0, 0, 0};
        NAME(add_parts)(&alone, job->bias_sums, job->chunks, 1, p->V, p->grad_bias, p->V);
    }
}

static void NAME(step_scratch)(NAME(step_job) *job, arena *memory) {
    const language_model_args *p = job->p;
    int64_t H = p->H, V = p->V, width = CEIL_DIV(H, PANEL) * PANEL, classes = CEIL_DIV(V, PANEL) * PANEL;
    job->weight = take(memory, width * H, sizeof(real));
    job->head = take(memory, classes * H, sizeof(real));
    job->both = take(memory, width * job->depth, sizeof(real));
    job->bias = take(memory, classes, sizeof(real));
    NAME(step_memory_of)(job, 0, &job->thread_size);
    job->thread_size = CEIL_DIV(job->thread_size, 16) * 16;
    job->thread_memory = take(memory, p->threads * job->thread_size, sizeof(real));
    job->weight_sums = take(memory, job->chunks * H * H, sizeof(real));
    job->head_sums = take(memory, job->chunks * V * H, sizeof(real));
    job->table_sums = take(memory, job->chunks * V * H, sizeof(real));
    job->bias_sums = take(memory, p->grad_bias ? job->chunks * V : 0, sizeof(real));
    job->losses = take(memory, job->chunks, sizeof(double));
}

static int NAME(language_model)(const void *args) {
    const language_model_args *p = args;
    NAME(step_job) job = {.p = p, .blocks = CEIL_DIV(p->B, MAX_ROWS), .state_size = NAME(block_size)(p->H)};
    job.chunks = MIN(STEP_CHUNKS, job.blocks);
    job.depth = CEIL_DIV(p->H, LANES) * LANES + p->V;
    job.grads_size = job.state_size + NAME(block_size)(p->V);
    arena memory = {0};
    NAME(step_scratch)(&job, &memory);
    if (arena_open(&memory))
        return STATUS_NO_MEMORY;
    NAME(step_scratch)(&job, &memory);
    for (int64_t v = 0; v < CEIL_DIV(p->V, PANEL) * PANEL; v++)
        job.bias[v] = v >= p->V ? -(real)INFINITY : p->bias ? ((const real *)p->bias)[v] : 0;
    team_run(p->threads, NAME(step_team), &job);
    double loss = 0;
    for (int64_t chunk = 0; !job.bad && chunk < job.chunks; chunk++)
        loss += job.losses[chunk];
    *p->loss = loss / (double)job.counted;
    free(memory.base);
    return job.bad ? STATUS_BAD_TOKEN : STATUS_OK;
}

#endif
