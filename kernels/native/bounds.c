/*
 * Whether what an argument record says fits the buffers that it names: asked before every call, so that no caller makes
 * a kernel read or write out of bounds. Only addresses and the buffers' own sizes are believed.
 *
 * Extents saturate instead of overflowing: whatever the sizes, too large stays too large. Negative strides, which no
 * tensor has, are refused; rows that are written must not share memory, because threads write them at the same time.
 */
#include "kernels.h"

#define REQUIRE(condition, what)                                                                                       \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return what;                                                                                               \
    } while (0)

static const int64_t HUGE_SIZE = INT64_MAX / 2;
/* A stride is added a few times beyond the last row, which must not overflow: one that is not used counts as well. */
static const int64_t MAX_STRIDE = (int64_t)1 << 48;

/* Sums and products of numbers that are not negative. */
static int64_t plus(int64_t a, int64_t b) { return a > HUGE_SIZE - b ? HUGE_SIZE : a + b; }
static int64_t times(int64_t a, int64_t b) { return b && a > HUGE_SIZE / b ? HUGE_SIZE : a * b; }

static int within(int64_t value, int64_t least, int64_t most) { return value >= least && value <= most; }

/* Elements from the first of (outer, inner, width) to the last, or HUGE_SIZE for strides that no tensor has. All sizes >= 1. */
static int64_t extent(int64_t outer, int64_t stride_outer, int64_t inner, int64_t stride_inner, int64_t width) {
    if (!within(stride_outer, 0, MAX_STRIDE) || !within(stride_inner, 0, MAX_STRIDE))
        return HUGE_SIZE;
    return plus(plus(outer > 1 ? times(outer - 1, stride_outer) : 0, inner > 1 ? times(inner - 1, stride_inner) : 0),
                width);
}

/* Whether `count` elements of `item` bytes are there. */
static int holds(const void *buffer, int64_t bytes, int64_t count, int64_t item) {
    return buffer && bytes >= times(count, item) && times(count, item) < HUGE_SIZE;
}

static int holds_or_null(const void *buffer, int64_t bytes, int64_t count, int64_t item) {
    return count < HUGE_SIZE && (!buffer || holds(buffer, bytes, count, item));
}

/* Whether no two rows of (outer, inner, width) share an element: one dimension's rows lie inside the other's stride. */
static int apart(int64_t outer, int64_t stride_outer, int64_t inner, int64_t stride_inner, int64_t width) {
    int64_t inside = extent(1, 0, inner, stride_inner, width), around = extent(outer, stride_outer, 1, 0, width);
    return (outer == 1 && inner == 1) || ((inner == 1 || stride_inner >= width) && (outer == 1 || stride_outer >= inside)) ||
           ((outer == 1 || stride_outer >= width) && (inner == 1 || stride_inner >= around));
}

/* Working memory grows with these: far below what would overflow its count. */
static int countable(int64_t a, int64_t b, int64_t c) { return times(times(a, b), c) < (int64_t)1 << 50; }

/* The rows of all steps of a packed batch, or 0 where batch_sizes or offsets cannot be. */
static int64_t packed_rows(const elman_shape *s) {
    int64_t rows = 0, before = s->B;
    for (int64_t t = 0; t < s->T; t++) {
        if (!within(s->batch_sizes[t], 1, before) || s->offsets[t] != rows)
            return 0;
        before = s->batch_sizes[t];
        rows = plus(rows, before);
    }
    return rows;
}

/* Elements of a sequence of this width, 0 < N rows when packed. */
static int64_t sequence(const elman_shape *s, int64_t N, int64_t stride_t, int64_t stride_b, int64_t width) {
    return N ? extent(1, 0, N, stride_b, width) : extent(s->T, stride_t, s->B, stride_b, width);
}

/* Checks the shape; *rows becomes the number of packed rows, or 0. */
static const char *shape_refused(const elman_shape *s, int64_t item, int64_t *rows) {
    REQUIRE(s->T >= 1 && s->B >= 1 && s->H >= 1 && within(s->D, 1, 2) && s->V >= 0, "sizes");
    REQUIRE(within(s->threads, 1, MAX_THREADS), "threads");
    for (int64_t d = 0; d < s->D; d++)
        REQUIRE(holds(s->weight[d], s->weight_bytes[d], extent(s->H, s->weight_row[d], 1, 0, s->H), item), "weight_hh");
    *rows = 0;
    if (s->batch_sizes || s->offsets) {
        REQUIRE(holds(s->batch_sizes, s->batch_sizes_bytes, s->T, 8), "batch_sizes");
        REQUIRE(holds(s->offsets, s->offsets_bytes, s->T, 8), "offsets");
        REQUIRE((*rows = packed_rows(s)) > 0, "batch_sizes");
    }
    int64_t width = s->D * s->H, N = *rows;
    REQUIRE(holds(s->out, s->out_bytes, sequence(s, N, s->out_t, s->out_b, width), item), "out");
    REQUIRE(N ? apart(1, 0, N, s->out_b, width) : apart(s->T, s->out_t, s->B, s->out_b, width), "out");
    REQUIRE(holds_or_null(s->tokens, s->tokens_bytes, sequence(s, N, s->tokens_t, s->tokens_b, 1), 8), "tokens");
    REQUIRE(holds_or_null(s->h0, s->h0_bytes, extent(s->D, s->h0_d, s->B, s->h0_b, s->H), item), "h0");
    REQUIRE(countable(s->threads + s->B, s->H + 64, 256), "sizes");
    return 0;
}

const char *elman_forward_refused(const void *args, int64_t item) {
    const elman_forward_args *p = args;
    const elman_shape *s = &p->s;
    int64_t rows;
    const char *why = shape_refused(s, item, &rows);
    if (why)
        return why;
    int64_t width = s->D * s->H;
    if (s->tokens)
        REQUIRE(s->V >= 1 && holds(p->x, p->x_bytes, extent(1, 0, s->V, p->x_b, width), item), "table");
    else
        REQUIRE(holds(p->x, p->x_bytes, sequence(s, rows, p->x_t, p->x_b, width), item), "input");
    REQUIRE(holds(p->h_n, p->h_n_bytes, times(s->B, width), item), "h_n");
    return 0;
}

const char *elman_backward_refused(const void *args, int64_t item) {
    const elman_backward_args *p = args;
    const elman_shape *s = &p->s;
    int64_t rows;
    const char *why = shape_refused(s, item, &rows);
    if (why)
        return why;
    int64_t width = s->D * s->H;
    REQUIRE(holds_or_null(p->grad_out, p->grad_out_bytes, sequence(s, rows, p->grad_out_t, p->grad_out_b, width), item),
            "grad_out");
    REQUIRE(holds_or_null(p->grad_h_n, p->grad_h_n_bytes, extent(s->D, p->grad_h_n_d, s->B, p->grad_h_n_b, s->H), item),
            "grad_h_n");
    REQUIRE(p->grad_x || (p->fused && !s->columns), "grad_input");
    REQUIRE(holds_or_null(p->grad_x, p->grad_x_bytes, sequence(s, rows, p->grad_x_t, p->grad_x_b, width), item),
            "grad_input");
    REQUIRE(!p->grad_x || (rows ? apart(1, 0, rows, p->grad_x_b, width)
                                : apart(s->T, p->grad_x_t, s->B, p->grad_x_b, width)),
            "grad_input");
    REQUIRE(!p->grad_table || (s->tokens && s->V >= 1), "grad_table");
    REQUIRE(holds_or_null(p->grad_table, p->grad_table_bytes, times(s->V, width), item), "grad_table");
    for (int64_t d = 0; d < s->D; d++)
        REQUIRE(holds_or_null(p->grad_weight[d], p->grad_weight_bytes[d], times(s->H, s->H), item), "grad_weight");
    REQUIRE(holds(p->grad_h0, p->grad_h0_bytes, times(s->B, width), item), "grad_h0");
    return 0;
}

const char *linear_cross_entropy_refused(const void *args, int64_t item) {
    const linear_cross_entropy_args *p = args;
    REQUIRE(p->N >= 0 && p->H >= 1 && p->V >= 1, "sizes");
    REQUIRE(within(p->threads, 1, MAX_THREADS), "threads");
    REQUIRE(!p->N || holds(p->hidden, p->hidden_bytes, extent(1, 0, p->N, p->hidden_row, p->H), item), "input");
    REQUIRE(holds(p->weight, p->weight_bytes, extent(1, 0, p->V, p->weight_row, p->H), item), "weight");
    REQUIRE(holds_or_null(p->bias, p->bias_bytes, p->V, item), "bias");
    REQUIRE(!p->N || holds(p->target, p->target_bytes, p->N, 8), "target");
    REQUIRE(holds_or_null(p->grad_loss, p->grad_loss_bytes, p->N, item), "grad_loss");
    REQUIRE(holds(p->loss, p->loss_bytes, 1, 8), "loss");
    REQUIRE(holds_or_null(p->row_loss, p->row_loss_bytes, p->N, item), "row_loss");
    REQUIRE(holds_or_null(p->grad_hidden, p->grad_hidden_bytes, times(p->N, p->H), item), "grad_input");
    REQUIRE(holds_or_null(p->grad_weight, p->grad_weight_bytes, times(p->V, p->H), item), "grad_weight");
    REQUIRE(holds_or_null(p->grad_bias, p->grad_bias_bytes, p->V, item), "grad_bias");
    REQUIRE(countable(p->threads, p->H + 64, 256) && countable(p->threads, p->V + 64, 256) &&
                countable(p->V + 64, p->H + 64, 64),
            "sizes");
    return 0;
}

/* Ids (T, B) that may be read at any strides, but are as many as that: a zero stride would make a loop of any length. */
static int holds_ids(const language_model_args *p, const int64_t *ids, int64_t bytes, int64_t stride_t,
                     int64_t stride_b) {
    return holds(ids, bytes, extent(p->T, stride_t, p->B, stride_b, 1), 8) && holds(ids, bytes, times(p->T, p->B), 8);
}

const char *language_model_refused(const void *args, int64_t item) {
    const language_model_args *p = args;
    int64_t H = p->H, V = p->V;
    REQUIRE(p->T >= 1 && p->B >= 1 && H >= 1 && V >= 1, "sizes");
    REQUIRE(within(p->threads, 1, MAX_THREADS), "threads");
    REQUIRE(holds_ids(p, p->tokens, p->tokens_bytes, p->tokens_t, p->tokens_b), "tokens");
    REQUIRE(holds_ids(p, p->targets, p->targets_bytes, p->targets_t, p->targets_b), "targets");
    REQUIRE(holds(p->table, p->table_bytes, extent(1, 0, V, p->table_row, H), item), "table");
    REQUIRE(holds(p->weight, p->weight_bytes, extent(1, 0, H, p->weight_row, H), item), "weight_hh");
    REQUIRE(holds(p->head, p->head_bytes, extent(1, 0, V, p->head_row, H), item), "head_weight");
    REQUIRE(holds_or_null(p->bias, p->bias_bytes, V, item), "head_bias");
    REQUIRE(holds_or_null(p->h0, p->h0_bytes, extent(1, 0, p->B, p->h0_row, H), item), "h0");
    REQUIRE(holds(p->loss, p->loss_bytes, 1, 8), "loss");
    REQUIRE(holds(p->h_n, p->h_n_bytes, times(p->B, H), item), "h_n");
    REQUIRE(holds(p->grad_table, p->grad_table_bytes, times(V, H), item), "grad_table");
    REQUIRE(holds(p->grad_weight, p->grad_weight_bytes, times(H, H), item), "grad_weight");
    REQUIRE(holds(p->grad_head, p->grad_head_bytes, times(V, H), item), "grad_head");
    REQUIRE(holds_or_null(p->grad_bias, p->grad_bias_bytes, V, item), "grad_bias");
    REQUIRE(holds(p->grad_h0, p->grad_h0_bytes, times(p->B, H), item), "grad_h0");
    REQUIRE(countable(times(p->threads, plus(p->T, 64)), H + 64, 32) && countable(p->threads, V + 64, 512) &&
                countable(H + 64, V + H + 64, 64),
            "sizes");
    return 0;
}

/* Whether a list of L addresses and L sizes is there, and each from `first` on holds `count` elements. */
static int holds_layers(const generate_args *p, const void *const *list, int64_t bytes, int64_t first, int64_t count,
                        int64_t item) {
    if (!holds(list, bytes, times(2, p->L), 8))
        return 0;
    const int64_t *sizes = (const int64_t *)list + p->L;
    for (int64_t layer = first; layer < p->L; layer++)
        if (!holds(list[layer], sizes[layer], count, item))
            return 0;
    return 1;
}

const char *generate_refused(const void *args, int64_t item) {
    const generate_args *p = args;
    int64_t H = p->H, V = p->V;
    REQUIRE(p->B >= 1 && p->P >= 1 && p->N >= 1 && H >= 1 && V >= 1 && p->L >= 1, "sizes");
    REQUIRE(within(p->threads, 1, MAX_THREADS), "threads");
    REQUIRE(p->top_k >= 0, "top_k");
    REQUIRE(holds(p->prompt, p->prompt_bytes, times(p->B, p->P), 8), "prompt");
    REQUIRE(holds(p->table, p->table_bytes, times(V, H), item), "table");
    REQUIRE(holds_layers(p, p->weight_ih, p->weight_ih_bytes, 1, times(H, H), item), "weight_ih");
    REQUIRE(holds_layers(p, p->weight_hh, p->weight_hh_bytes, 0, times(H, H), item), "weight_hh");
    REQUIRE(holds_layers(p, p->bias, p->bias_bytes, 1, H, item), "bias");
    REQUIRE(holds(p->head_weight, p->head_weight_bytes, times(V, H), item), "head_weight");
    REQUIRE(holds_or_null(p->head_bias, p->head_bias_bytes, V, item), "head_bias");
    REQUIRE(holds_or_null(p->uniforms, p->uniforms_bytes, times(p->B, p->N), 8), "uniforms");
    REQUIRE(holds(p->sharpness, p->sharpness_bytes, 1, 8), "sharpness");
    REQUIRE(holds(p->state, p->state_bytes, times(p->L, times(p->B, H)), item), "state");
    REQUIRE(holds(p->ids, p->ids_bytes, times(p->B, p->N), 8), "ids");
    REQUIRE(countable(times(p->threads, p->L), H + 64, 64) && countable(p->threads, V + 64, 64) &&
                countable(p->L, H + 64, H + 64) && countable(V + 64, H + 64, 8),
            "sizes");
    return 0;
}

const char *clip_refused(const void *args, int64_t item) {
    const clip_args *p = args;
    REQUIRE(p->count >= 0, "sizes");
    REQUIRE(within(p->threads, 1, MAX_THREADS), "threads");
    REQUIRE(!p->count || holds(p->grads, p->grads_bytes, p->count, 8), "gradients");
    REQUIRE(!p->count || holds(p->sizes, p->sizes_bytes, p->count, 8), "sizes");
    REQUIRE(holds(p->max_norm, p->max_norm_bytes, 1, 8) && holds(p->norm, p->norm_bytes, 1, 8), "norm");
    int64_t total = 0;
    for (int64_t i = 0; i < p->count; i++) {
        REQUIRE(p->sizes[i] >= 0 && (p->grads[i] || !p->sizes[i]), "gradients");
        total = plus(total, times(p->sizes[i], item));
    }
    REQUIRE(total < HUGE_SIZE, "sizes");
    return 0;
}
