/*
 * Output layer and cross-entropy in one pass, a few rows at a time, so that the logits are never stored.
 *
 *   o = h W^T + b,   loss_n = log sum_v exp(o_nv) - o_n,target
 *   grad_o = (softmax(o) - onehot(target)) * factor,   grad_h = grad_o W,   grad_W = grad_o^T h,   grad_b = sum_n
 * grad_o
 *
 * Rows are cut into parts by the shape alone; each part has its own sums, added in order at the end.
 */
#ifndef ISA

#include "kernels.h"
#include "threads.h"

#define TARGET_FILE "linear_cross_entropy.c"
#include "targets.h"

const kernel linear_cross_entropy_kernels[ISA_COUNT][2] = KERNEL_TABLE(linear_cross_entropy);

#else

#include "simd.h"

#include "outer.h"

#ifndef CHARRNN_CROSS_ENTROPY_ONCE
#define CHARRNN_CROSS_ENTROPY_ONCE
/* Rows of a part at least; the most parts, down to 4 where their sums would have more than MAX_SUMS elements. */
enum { PART_ROWS = 32, MAX_PARTS = 16, MAX_SUMS = 1 << 17 };
#endif

typedef struct {
    const linear_cross_entropy_args *p;
    int64_t parts, stride;                  /* stride: V rounded up to whole panels */
    double factor;                          /* of every row's gradient */
    real *forward_weight, *backward_weight; /* packed: (H, V) and (V, H) */
    real *bias;                             /* (stride), -inf beyond V */
    real *thread_memory;
    int64_t thread_size;
    real *weight_sums, *bias_sums; /* [parts][V][H], [parts][V] */
    double *losses;                /* [parts] */
    _Atomic int64_t next_part;
} NAME(loss_job);

/* This thread's working memory: a block of hidden rows, logits, a block of their gradients, a tile, operands of the
 * sum. */
typedef struct {
    real *hidden, *logits, *grads, *tile, *operands;
} NAME(loss_memory);

static NAME(loss_memory) NAME(loss_memory_of)(const NAME(loss_job) *job, int rank, int64_t *size) {
    const linear_cross_entropy_args *p = job->p;
    NAME(loss_memory) m;
    m.hidden = job->thread_memory + rank * job->thread_size;
    m.logits = m.hidden + NAME(block_size)(p->H);
    m.grads = m.logits + MAX_ROWS * job->stride;
    m.tile = m.grads + NAME(block_size)(job->stride);
    m.operands = m.tile + 4 * MAX_ROWS * PANEL;
    *size = m.operands + NAME(outer_size)(p->V, p->H) - m.hidden;
    return m;
}

/* logits[i][v] = hidden_i . weight_v + bias_v, -inf for v beyond V. */
static void NAME(loss_logits)(const NAME(loss_job) *job, int rows, const NAME(loss_memory) *m) {
    const linear_cross_entropy_args *p = job->p;
    int64_t size = p->H * PANEL;
    for (int64_t panel = 0; panel * PANEL < job->stride;) {
        int count = NAME(multiply)(rows, job->stride / PANEL - panel, p->H, m->hidden,
                                   job->forward_weight + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int i = 0; i < rows; i++)
                for (int v = 0; v < PANEL; v += LANES)
                    NAME(store)(
                        m->logits + i * job->stride + panel * PANEL + v,
                        NAME(load)(m->tile + (q * rows + i) * PANEL + v) + NAME(load)(job->bias + panel * PANEL + v));
    }
}

/* Loss of one row; with gradients, grad_o goes to row i of the block: for a factor of 0 zeros, or as in torch NaN where
 * the softmax is. */
static double NAME(loss_row)(const NAME(loss_job) *job, int i, int64_t target, real factor,
                             const NAME(loss_memory) *m) {
    real *logits = m->logits + i * job->stride;
    real chosen = logits[target];
    vec high = NAME(load)(logits), total = {0};
    for (int64_t v = LANES; v < job->stride; v += LANES)
        high = NAME(vmax)(NAME(load)(logits + v), high);
    real highest = NAME(highest)(high);
    for (int64_t v = 0; v < job->stride; v += LANES) {
        vec e = NAME(vexp)(NAME(load)(logits + v) - SPLAT(highest));
        NAME(store)(logits + v, e);
        total += e;
    }
    real sum = NAME(sum)(total);
    if (job->p->grad_hidden) {
        vec scale = SPLAT(factor / sum);
        for (int64_t v = 0; v < job->stride; v += LANES)
            NAME(store)(m->grads + NAME(at)(i, v), NAME(load)(logits + v) * scale);
        m->grads[NAME(at)(i, target)] -= factor;
    }
#ifdef TYPE_IS_F64
    return log(sum) + (highest - chosen);
#else
    return logf(sum) + (highest - chosen);
#endif
}

/* grad_h of the block, and its rows into the sums of the part. */
static void NAME(loss_backward)(const NAME(loss_job) *job, int64_t n0, int rows, const NAME(loss_memory) *m,
                                NAME(outer) *sum, real *bias_sum) {
    const linear_cross_entropy_args *p = job->p;
    int64_t size = p->V * PANEL;
    for (int64_t panel = 0; panel * PANEL < p->H;) {
        int count = NAME(multiply)(rows, CEIL_DIV(p->H, PANEL) - panel, p->V, m->grads,
                                   job->backward_weight + panel * size, size, m->tile);
        for (int q = 0; q < count; q++, panel++)
            for (int i = 0; i < rows; i++)
                for (int64_t v = 0, j = panel * PANEL; v < PANEL && j < p->H; v += LANES, j += LANES)
                    NAME(store_some)((real *)p->grad_hidden + (n0 + i) * p->H + j,
                                     NAME(load)(m->tile + (q * rows + i) * PANEL + v), (int)MIN(LANES, p->H - j));
    }
    for (int i = 0; i < rows; i++) {
        const real *hidden = (const real *)p->hidden + (n0 + i) * p->hidden_row;
        if (sum->target && p->H % LANES == 0)
            NAME(outer_row)(sum, 1, 1, m->grads + i * LANES, MAX_ROWS * LANES, hidden);
        else if (sum->target)
            NAME(outer_row)(sum, 1, 0, m->grads + i * LANES, MAX_ROWS * LANES, hidden);
        for (int64_t v = 0; bias_sum && v < p->V; v += LANES) {
            int width = (int)MIN(LANES, p->V - v);
            NAME(store_some)(bias_sum + v, NAME(load_some)(bias_sum + v, width) + NAME(load)(m->grads + NAME(at)(i, v)),
                             width);
        }
    }
}

static void NAME(loss_part)(const NAME(loss_job) *job, int64_t part, const NAME(loss_memory) *m) {
    const linear_cross_entropy_args *p = job->p;
    NAME(outer) sum = {0};
    real *bias_sum = p->grad_bias ? job->bias_sums + part * p->V : 0;
    double loss = 0;
    if (p->grad_weight)
        sum = NAME(outer_open)(m->operands, m->tile, job->weight_sums + part * p->V * p->H, p->V, p->H, 0,
                               CEIL_DIV(p->V, OUTER_TILE));
    if (bias_sum)
        memset(bias_sum, 0, (size_t)p->V * sizeof(real));
    int64_t end = p->N * (part + 1) / job->parts;
    for (int64_t n0 = p->N * part / job->parts; n0 < end; n0 += MAX_ROWS) {
        int rows = (int)MIN(MAX_ROWS, end - n0);
        for (int i = 0; i < rows; i++)
            NAME(block_load)(m->hidden, i, p->H, (const real *)p->hidden + (n0 + i) * p->hidden_row);
        NAME(loss_logits)(job, rows, m);
        for (int i = 0; i < rows; i++) {
            int ignored = p->target[n0 + i] == p->ignore_index;
            real weight = p->grad_loss ? ((const real *)p->grad_loss)[n0 + i] : 1;
            real factor = ignored ? 0 : (real)(job->factor * weight);
            double row_loss = NAME(loss_row)(job, i, ignored ? 0 : p->target[n0 + i], factor, m);
            row_loss = ignored ? 0 : row_loss;
            if (p->row_loss)
                ((real *)p->row_loss)[n0 + i] = (real)row_loss;
            loss += row_loss;
        }
        if (p->grad_hidden)
            NAME(loss_backward)(job, n0, rows, m, &sum, bias_sum);
    }
    if (sum.target)
        NAME(outer_flush)(&sum);
    job->losses[part] = loss;
}

static void NAME(loss_team)(void *argument, team *self) {
    NAME(loss_job) *job = argument;
    const linear_cross_entropy_args *p = job->p;
    int64_t begin, end, unused;
    team_share(self, job->stride / PANEL, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        NAME(pack_panel)(p->weight, p->weight_row, 1, p->H, p->V, i, job->forward_weight + i * p->H * PANEL);
    team_share(self, p->grad_hidden ? CEIL_DIV(p->H, PANEL) : 0, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        NAME(pack_panel)(p->weight, p->weight_row, 0, p->V, p->H, i, job->backward_weight + i * p->V * PANEL);
    NAME(loss_memory) memory = NAME(loss_memory_of)(job, self->rank, &unused);
    team_barrier(self);
    for (int64_t part; (part = job->next_part++) < job->parts;)
        NAME(loss_part)(job, part, &memory);
    team_barrier(self);
    if (p->grad_weight)
        NAME(add_parts)(self, 0, job->weight_sums, job->parts, p->V, p->H, p->grad_weight, p->H);
    if (p->grad_bias && self->rank == 0) {
        team alone = {1, 0, 0, 0};
        NAME(add_parts)(&alone, 0, job->bias_sums, job->parts, 1, p->V, p->grad_bias, p->V);
    }
}

static void NAME(loss_scratch)(NAME(loss_job) *job, arena *memory) {
    const linear_cross_entropy_args *p = job->p;
    job->forward_weight = take(memory, job->stride * p->H, sizeof(real));
    job->backward_weight = take(memory, p->grad_hidden ? CEIL_DIV(p->H, PANEL) * PANEL * p->V : 0, sizeof(real));
    job->bias = take(memory, job->stride, sizeof(real));
    NAME(loss_memory_of)(job, 0, &job->thread_size);
    job->thread_size = CEIL_DIV(job->thread_size, 16) * 16;
    job->thread_memory = take(memory, p->threads * job->thread_size, sizeof(real));
    job->weight_sums = take(memory, p->grad_weight ? job->parts * p->V * p->H : 0, sizeof(real));
    job->bias_sums = take(memory, p->grad_bias ? job->parts * p->V : 0, sizeof(real));
    job->losses = take(memory, job->parts, sizeof(double));
}

static int NAME(linear_cross_entropy)(const void *args) {
    const linear_cross_entropy_args *p = args;
    NAME(loss_job) job = {.p = p, .stride = CEIL_DIV(p->V, PANEL) * PANEL};
    int64_t rows = 0, bad = 0;
    for (int64_t n = 0; n < p->N; n++) {
        int counts = p->target[n] != p->ignore_index;
        rows += counts;
        bad |= counts & ((uint64_t)p->target[n] >= (uint64_t)p->V);
    }
    if (bad)
        return STATUS_BAD_TOKEN;
    int64_t most = MAX(4, MIN(MAX_PARTS, MAX_SUMS / (p->V * p->H)));
    job.parts = MAX(1, MIN(p->N / PART_ROWS, most));
    job.factor = p->mean ? 1 / (double)rows : 1;
    arena memory = {0};
    NAME(loss_scratch)(&job, &memory);
    if (arena_open(&memory))
        return STATUS_NO_MEMORY;
    NAME(loss_scratch)(&job, &memory);
    for (int64_t v = 0; v < job.stride; v++)
        job.bias[v] = v >= p->V ? -(real)INFINITY : p->bias ? ((const real *)p->bias)[v] : 0;
    team_run(p->threads, NAME(loss_team), &job);
    double loss = 0;
    for (int64_t part = 0; part < job.parts; part++)
        loss += job.losses[part];
    *p->loss = p->mean ? loss / (double)rows : loss;
    arena_close(&memory);
    return STATUS_OK;
}

#endif
