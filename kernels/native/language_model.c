/*
 * One training step of a one-layer character model in one pass: forward, loss and all gradients.
 *
 *   h_t = f(table[token_t] + h_{t-1} W^T),   o_t = h_t U^T + b,   loss = mean over (t, b) of -log softmax(o_t)[target_t]
 *   grad_o_t = (softmax(o_t) - onehot(target_t)) / count,   g_t = (g_{t+1} W + grad_o_t U) f'(h_t)
 *   [grad_W; grad_U] = sum_t [g_{t+1}, grad_o_t]^T h_t,   grad_table[v] = sum of g_t where token_t = v
 *
 * A block of up to MAX_ROWS rows goes through all steps and back with its states in level 2, so nothing of size
 * (T, B, H) is ever stored. Where a block has few rows, several steps in a row share one block of the states, a group:
 * the head, the loss and the sums over rows then read their weights once a group instead of once a step. g_{t+1} and
 * grad_o_t lie side by side in one block: with one step a group, one product makes the gradient of h_t. Rows are cut
 * into blocks, and blocks into chunks, by the shape alone; each chunk has its own sums, added in order at the end.
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

#include "ids.h"

#ifndef CHARRNN_LANGUAGE_MODEL_ONCE
#define CHARRNN_LANGUAGE_MODEL_ONCE
enum {
    STEP_CHUNKS = 32,    /* partial sums, at most */
    STEP_SUMS = 1 << 20, /* elements of all partial sums, at most, unless there are but two */
    RING = 8,            /* groups whose outer products are summed in registers before they go to a partial sum */
    FEW_BLOCKS = 16,     /* below so many blocks their number is made even, */
    SPLIT_ROWS = 4,      /* from so many rows on */
};
#endif

typedef struct {
    const language_model_args *p;
    int64_t rows, blocks, chunks; /* rows of a block */
    int64_t threads;              /* no more than there are chunks */
    int64_t steps, groups;        /* steps of a group; groups of h_0 .. h_T */
    int64_t depth;       /* rows of [W; U], where U begins at a whole vector */
    int64_t state_size;  /* elements of one block of h, or of g */
    int64_t grads_size;  /* elements of one block of [g, grad_o] */
    real *weight, *head; /* packed W^T and U^T */
    real *both;          /* packed [W; U] */
    real *bias;          /* whole panels, -inf beyond V */
    real *thread_memory;
    int64_t thread_size;
    real *weight_sums, *head_sums, *table_sums, *bias_sums; /* [chunks - 1] of (H, H), (V, H), (V, H), (V) */
    double *losses;                                         /* [chunks] */
    _Atomic int64_t next_chunk, counted, bad;
} NAME(step_job);

/*
 * This thread's memory: the groups of h_0 .. h_T, RING groups [g_{t+1}, grad_o_t] at group % RING, a block of logits,
 * one of grad_o U, a tile; and the chunk's sums. h_t is step (t + steps - 1) % steps of group (t + steps - 1) / steps:
 * h_0 is the last of group 0, and the head reads whole groups from 1 on. Rows of a group that have no step are zero.
 */
typedef struct {
    real *states, *grads, *logits, *lifted, *tile;
    real *weight_sum, *head_sum, *table_sum, *bias_sum;
    real factor; /* of every row's gradient */
    int64_t b0;
    int rows;
    double loss;
} NAME(step_memory);

static NAME(step_memory) NAME(step_memory_of)(const NAME(step_job) *job, int rank, int64_t *size) {
    NAME(step_memory) m = {.states = job->thread_memory + rank * job->thread_size};
    m.grads = m.states + job->groups * job->state_size;
    m.logits = m.grads + RING * job->grads_size;
    m.lifted = m.logits + NAME(block_size)(job->p->V);
    m.tile = m.lifted + (job->steps > 1 ? job->state_size : 0);
    *size = m.tile + 4 * MAX_ROWS * PANEL - m.states;
    return m;
}

/* The group of h_t, and where its rows begin in a block. */
INLINE int64_t NAME(step_group)(const NAME(step_job) *job, int64_t t) { return (t + job->steps - 1) / job->steps; }
INLINE int64_t NAME(step_row)(const NAME(step_job) *job, const NAME(step_memory) *m, int64_t t) {
    return (t + job->steps - 1) % job->steps * m->rows * LANES;
}
INLINE real *NAME(step_state)(const NAME(step_job) *job, const NAME(step_memory) *m, int64_t t) {
    return m->states + NAME(step_group)(job, t) * job->state_size + NAME(step_row)(job, m, t);
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
    const real *now = NAME(step_state)(job, m, t), *x[MAX_ROWS];
    real *next = NAME(step_state)(job, m, t + 1);
    for (int i = 0; i < m->rows; i++)
        x[i] = (const real *)p->table + p->tokens[t * p->tokens_t + (m->b0 + i) * p->tokens_b] * p->table_row;
    int64_t panels = CEIL_DIV(p->H, PANEL), size = p->H * PANEL;
    int backwards = p->B <= BACK_ROWS && t % 2, count;
    for (int64_t left = panels; left > 0; left -= count) {
        count = NAME(at_once)(m->rows, left);
        int64_t panel = backwards ? left - count : panels - left;
        NAME(multiply_at)(m->rows, count, backwards, p->H, now, job->weight + panel * size, size, m->tile);
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
 * Loss and grad_o of `rows` rows, step t's and those of the steps after it, from the logits. The block's highest logit
 * stands for each row's own, which saves a horizontal maximum per row, unless a row lies so far below it that its sum
 * would lose digits.
 */
INLINE double NAME(step_rows)(const NAME(step_job) *job, const int64_t vectors, int64_t t, int rows,
                              const NAME(step_memory) *m, real *grads) {
    const language_model_args *p = job->p;
    const real common = NAME(step_highest)(vectors, rows, m->logits);
    real sums[MAX_ROWS];
    for (int i = 0; i < rows; i++)
        sums[i] = NAME(step_exp)(vectors, m->logits + i * LANES, grads + i * LANES, common);
    double loss = 0, product = 1; /* of at most 12 sums in 1e-20..V: one logarithm for them all */
    for (int i = 0, b = 0; i < rows; i++, b++) {
        if (b == m->rows)
            b = 0, t++;
        real highest = common;
        if (!(sums[i] >= (real)1e-20)) {
            highest = NAME(step_highest)(vectors, 1, m->logits + i * LANES);
            sums[i] = NAME(step_exp)(vectors, m->logits + i * LANES, grads + i * LANES, highest);
        }
        int64_t target = p->targets[t * p->targets_t + (m->b0 + b) * p->targets_b];
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

/* The head, and the loss of `rows` rows of a group, whose first step is t. */
static void NAME(step_loss)(const NAME(step_job) *job, int64_t t, int rows, NAME(step_memory) *m, const real *state,
                            real *grads) {
    const language_model_args *p = job->p;
    int64_t panels = CEIL_DIV(p->V, PANEL), vectors = CEIL_DIV(p->V, LANES), size = p->H * PANEL;
    for (int64_t panel = 0; panel < panels;) {
        int count = NAME(multiply)(rows, panels - panel, p->H, state, job->head + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->V; v += LANES, j += LANES) {
                vec bias = NAME(load)(job->bias + j);
                for (int i = 0; i < rows; i++)
                    NAME(store)(m->logits + NAME(at)(i, j), NAME(load)(m->tile + (q * rows + i) * PANEL + v) + bias);
            }
    }
    m->loss +=
        vectors == 2 ? NAME(step_rows)(job, 2, t, rows, m, grads) : NAME(step_rows)(job, vectors, t, rows, m, grads);
    for (int64_t v = 0; m->bias_sum && v < p->V; v += LANES) {
        int width = (int)MIN(LANES, p->V - v);
        vec sum = NAME(load_some)(m->bias_sum + v, width);
        for (int i = 0; i < rows; i++)
            sum += NAME(load)(grads + NAME(at)(i, v));
        NAME(store_some)(m->bias_sum + v, sum, width);
    }
}

/* grad_o U of a group. */
static void NAME(step_lift)(const NAME(step_job) *job, int rows, const NAME(step_memory) *m, const real *grads) {
    int64_t panels = CEIL_DIV(job->p->H, PANEL), size = job->depth * PANEL;
    const real *head = job->both + (job->depth - job->p->V) * PANEL;
    for (int64_t panel = 0; panel < panels;) {
        int count = NAME(multiply)(rows, panels - panel, job->p->V, grads, head + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < job->p->H; v += LANES, j += LANES)
                for (int i = 0; i < rows; i++)
                    NAME(store)(m->lifted + NAME(at)(i, j), NAME(load)(m->tile + (q * rows + i) * PANEL + v));
    }
}

/* OUTER_TILE columns of g by `vectors` vectors of h, over `rows` rows of each of `groups` blocks. */
INLINE void NAME(step_tile)(const int vectors, int rows, int64_t groups, const real *g, int64_t g_size, const real *h,
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
    } while (--groups);
    for (int i = 0; i < OUTER_TILE; i++)
        for (int v = 0; v < vectors; v++)
            NAME(store)(tile + i * PANEL + v * LANES, sums[i][v]);
}

/* target (G, H) += sum over the rows of `groups` groups of g^T h. */
static void NAME(step_outer)(const NAME(step_job) *job, const NAME(step_memory) *m, int64_t groups, const real *g,
                             const real *h, int64_t G, real *target) {
    int64_t H = job->p->H;
    int rows = (int)job->steps * m->rows;
    for (int64_t j = 0; j < H; j += PANEL)
        for (int64_t r = 0; r < G; r += OUTER_TILE) {
            const real *from = g + NAME(at)(0, r), *states = h + NAME(at)(0, j);
            NAME(outer_fetch)(target + r * H + j, MIN(OUTER_TILE, G - r), H);
            if (H - j > LANES)
                NAME(step_tile)(2, rows, groups, from, job->grads_size, states, job->state_size, m->tile);
            else
                NAME(step_tile)(1, rows, groups, from, job->grads_size, states, job->state_size, m->tile);
            NAME(outer_add)(m->tile, target + r * H + j, MIN(OUTER_TILE, G - r), H, H - j);
        }
}

/* g = (sums + lifted) f'(h), one vector of columns of all rows. */
INLINE void NAME(step_grads)(const int relu, int rows, const real *sums, const real *lifted, const real *states,
                             real *grads) {
    for (int i = 0; i < rows; i++, sums += PANEL, states += LANES, grads += LANES) {
        vec g = NAME(load)(sums), h = NAME(load)(states);
        if (lifted)
            g += NAME(load)(lifted + i * LANES);
        g = relu ? NAME(select)(h <= (vec){0}, (vec){0}, g) : (vec)(g * FMA(-h, h, SPLAT(1)));
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

/* The gradient of h_t, t > 0, and from it g of step t-1, which goes to `next`. grads: the rows of [g_t, grad_o]. */
static void NAME(step_backward)(const NAME(step_job) *job, int64_t t, const NAME(step_memory) *m, const real *grads,
                                real *next) {
    const language_model_args *p = job->p;
    const real *state = NAME(step_state)(job, m, t);
    const real *lifted = job->steps > 1 ? m->lifted + NAME(step_row)(job, m, t) : 0;
    int64_t panels = CEIL_DIV(p->H, PANEL), size = job->depth * PANEL, depth = lifted ? p->H : job->depth;
    int backwards = p->B <= BACK_ROWS && t % 2, count;
    for (int64_t left = panels; left > 0; left -= count) {
        count = NAME(at_once)(m->rows, left);
        int64_t panel = backwards ? left - count : panels - left;
        NAME(multiply_at)(m->rows, count, backwards, depth, grads, job->both + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->H; v += LANES, j += LANES) {
                const real *sums = m->tile + q * m->rows * PANEL + v;
                int64_t at = NAME(at)(0, j);
                if (p->relu)
                    NAME(step_grads)(1, m->rows, sums, lifted ? lifted + at : 0, state + at, next + at);
                else
                    NAME(step_grads)(0, m->rows, sums, lifted ? lifted + at : 0, state + at, next + at);
            }
    }
    NAME(step_table)(job, t - 1, m, next);
}

/* grad_h0 = g_0 W. */
static void NAME(step_first)(const NAME(step_job) *job, const NAME(step_memory) *m, const real *grads) {
    const language_model_args *p = job->p;
    int64_t panels = CEIL_DIV(p->H, PANEL), size = job->depth * PANEL;
    for (int64_t panel = 0; panel < panels;) {
        int count = NAME(multiply)(m->rows, panels - panel, p->H, grads, job->both + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->H; v += LANES, j += LANES)
                for (int i = 0; i < m->rows; i++)
                    NAME(store_some)((real *)p->grad_h0 + (m->b0 + i) * p->H + j,
                                     NAME(load)(m->tile + (q * m->rows + i) * PANEL + v), (int)MIN(LANES, p->H - j));
    }
}

/* Adds the outer products of RING groups from `group` on, or as many as there are. */
static void NAME(step_flush)(const NAME(step_job) *job, const NAME(step_memory) *m, int64_t group) {
    int64_t groups = MIN(RING, job->groups - group);
    const real *state = m->states + group * job->state_size;
    NAME(step_outer)(job, m, groups, m->grads, state, job->p->H, m->weight_sum);
    NAME(step_outer)(job, m, groups, m->grads + job->state_size, state, job->p->V, m->head_sum);
}

/* All gradients of one group from 1 on. Its block of g is complete, and may be flushed, when its first step is left. */
static void NAME(step_group_backward)(const NAME(step_job) *job, int64_t group, NAME(step_memory) *m) {
    int64_t first = (group - 1) * job->steps + 1, last = MIN(first + job->steps - 1, job->p->T);
    int rows = (int)(last - first + 1) * m->rows;
    real *grads = m->grads + group % RING * job->grads_size;
    NAME(step_loss)(job, first - 1, rows, m, m->states + group * job->state_size, grads + job->state_size);
    if (job->steps > 1)
        NAME(step_lift)(job, rows, m, grads + job->state_size);
    for (int64_t t = last; t > first; t--) {
        int64_t row = NAME(step_row)(job, m, t);
        NAME(step_backward)(job, t, m, grads + row, grads + row - m->rows * LANES);
    }
    if (group % RING == 0)
        NAME(step_flush)(job, m, group);
    real *before = m->grads + (group - 1) % RING * job->grads_size;
    if (group == 1)
        memset(before, 0, (size_t)job->grads_size * sizeof(real));
    NAME(step_backward)(job, first, m, grads, before + (job->steps - 1) * m->rows * LANES);
}

static void NAME(step_block)(const NAME(step_job) *job, int64_t block, NAME(step_memory) *m) {
    const language_model_args *p = job->p;
    int64_t size = job->state_size;
    m->b0 = block * job->rows;
    m->rows = (int)MIN(job->rows, p->B - m->b0);
    memset(m->states, 0, (size_t)size * sizeof(real));
    memset(m->states + (job->groups - 1) * size, 0, (size_t)size * sizeof(real));
    real *initial = NAME(step_state)(job, m, 0);
    for (int i = 0; p->h0 && i < m->rows; i++)
        NAME(block_load)(initial, i, p->H, (const real *)p->h0 + (m->b0 + i) * p->h0_row);
    for (int64_t t = 0; t < p->T; t++)
        NAME(step_forward)(job, t, m);
    for (int i = 0; i < m->rows; i++)
        NAME(block_save)(NAME(step_state)(job, m, p->T), i, p->H, (real *)p->h_n + (m->b0 + i) * p->H);
    memset(m->grads + (job->groups - 1) % RING * job->grads_size, 0, (size_t)job->grads_size * sizeof(real));
    for (int64_t group = job->groups - 1; group > 0; group--)
        NAME(step_group_backward)(job, group, m);
    NAME(step_flush)(job, m, 0);
    NAME(step_first)(job, m, m->grads + NAME(step_row)(job, m, 0));
}

/* Where a chunk's sum is made, set to zero: the first one's in the result itself. */
static real *NAME(step_sum)(real *sums, void *result, int64_t chunk, int64_t size) {
    return memset(chunk ? sums + (chunk - 1) * size : result, 0, (size_t)size * sizeof(real));
}

static void NAME(step_chunk)(const NAME(step_job) *job, int64_t chunk, NAME(step_memory) *m) {
    const language_model_args *p = job->p;
    int64_t H = p->H, V = p->V;
    m->weight_sum = NAME(step_sum)(job->weight_sums, p->grad_weight, chunk, H * H);
    m->head_sum = NAME(step_sum)(job->head_sums, p->grad_head, chunk, V * H);
    m->table_sum = NAME(step_sum)(job->table_sums, p->grad_table, chunk, V * H);
    m->bias_sum = p->grad_bias ? NAME(step_sum)(job->bias_sums, p->grad_bias, chunk, V) : 0;
    m->loss = 0;
    for (int64_t b = job->blocks * chunk / job->chunks; b < job->blocks * (chunk + 1) / job->chunks; b++)
        NAME(step_block)(job, b, m);
    job->losses[chunk] = m->loss;
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
    int64_t T = p->T, B = p->B, V = p->V, bad = 0;
    NAME(ids_check)(self, p->tokens, T, B, p->tokens_t, p->tokens_b, V, 0, &bad); /* 0 is in range anyway */
    job->counted += NAME(ids_check)(self, p->targets, T, B, p->targets_t, p->targets_b, V, p->ignore_index, &bad);
    if (bad)
        job->bad = 1;
    NAME(step_pack)(job, self);
    NAME(step_memory) memory = NAME(step_memory_of)(job, self->rank, &unused);
    team_barrier(self);
    if (job->bad)
        return;
    memory.factor = (real)(1 / (double)job->counted);
    for (int64_t chunk; (chunk = job->next_chunk++) < job->chunks;)
        NAME(step_chunk)(job, chunk, &memory);
    team_barrier(self);
    NAME(add_parts)(self, 1, job->weight_sums, job->chunks - 1, p->H, p->H, p->grad_weight, p->H);
    NAME(add_parts)(self, 1, job->head_sums, job->chunks - 1, p->V, p->H, p->grad_head, p->H);
    NAME(add_parts)(self, 1, job->table_sums, job->chunks - 1, p->V, p->H, p->grad_table, p->H);
    if (p->grad_bias && self->rank == 0) {
        team alone = {1, 0, 0, 0};
        NAME(add_parts)(&alone, 1, job->bias_sums, job->chunks - 1, 1, p->V, p->grad_bias, p->V);
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
    job->thread_memory = take(memory, job->threads * job->thread_size, sizeof(real));
    job->weight_sums = take(memory, (job->chunks - 1) * H * H, sizeof(real));
    job->head_sums = take(memory, (job->chunks - 1) * V * H, sizeof(real));
    job->table_sums = take(memory, (job->chunks - 1) * V * H, sizeof(real));
    job->bias_sums = take(memory, p->grad_bias ? (job->chunks - 1) * V : 0, sizeof(real));
    job->losses = take(memory, job->chunks, sizeof(double));
}

static int NAME(language_model)(const void *args) {
    const language_model_args *p = args;
    NAME(step_job) job = {.p = p, .blocks = CEIL_DIV(p->B, MAX_ROWS), .state_size = NAME(block_size)(p->H)};
    if (p->B >= SPLIT_ROWS && job.blocks < FEW_BLOCKS)
        job.blocks += job.blocks % 2; /* or two threads would wait for each other's last block */
    job.rows = CEIL_DIV(p->B, job.blocks);
    job.blocks = CEIL_DIV(p->B, job.rows);
    for (job.chunks = 2; job.chunks < STEP_CHUNKS && 2 * job.chunks * p->H * (p->H + 2 * p->V) <= STEP_SUMS;)
        job.chunks *= 2; /* a power of two, so that two or four threads get equal shares */
    job.chunks = MIN(job.chunks, job.blocks);
    job.threads = MIN(p->threads, job.chunks);
    job.steps = MAX(1, MIN(MAX_ROWS / job.rows, p->T));
    job.groups = NAME(step_group)(&job, p->T) + 1;
    job.depth = CEIL_DIV(p->H, LANES) * LANES + p->V;
    job.grads_size = job.state_size + NAME(block_size)(p->V);
    arena memory = {0};
    NAME(step_scratch)(&job, &memory);
    if (arena_open(&memory))
        return STATUS_NO_MEMORY;
    NAME(step_scratch)(&job, &memory);
    for (int64_t v = 0; v < CEIL_DIV(p->V, PANEL) * PANEL; v++)
        job.bias[v] = v >= p->V ? -(real)INFINITY : p->bias ? ((const real *)p->bias)[v] : 0;
    team_run(job.threads, NAME(step_team), &job);
    double loss = 0;
    for (int64_t chunk = 0; !job.bad && chunk < job.chunks; chunk++)
        loss += job.losses[chunk];
    *p->loss = loss / (double)job.counted;
    arena_close(&memory);
    return job.bad ? STATUS_BAD_TOKEN : STATUS_OK;
}

#endif
