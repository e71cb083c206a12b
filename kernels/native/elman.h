/*
 * How one call of the recurrence is cut into blocks of rows and panels of columns, and where its rows lie.
 * Included once per target by elman_forward.c and elman_backward.c.
 */
#ifndef CHARRNN_ELMAN_ONCE
#define CHARRNN_ELMAN_ONCE

static inline int64_t walk(const elman_shape *s, int direction, int64_t step) {
    return s->reverse[direction] ? s->T - 1 - step : step;
}

static inline int64_t position(const elman_shape *s, int64_t t, int64_t b, int64_t stride_t, int64_t stride_b) {
    return s->offsets ? (s->offsets[t] + b) * stride_b : t * stride_t + b * stride_b;
}

/* Whether a step reads W backwards: see simd.h. Depends on the batch alone, not on how it is cut. */
static inline int reads_backwards(const elman_shape *s, int64_t step) { return s->B <= BACK_ROWS && step % 2; }

/* Rows of b0 .. b0+rows-1 that step t has. */
static inline int active_rows(const elman_shape *s, int64_t t, int64_t b0, int rows) {
    if (!s->batch_sizes)
        return rows;
    int64_t left = s->batch_sizes[t] - b0;
    return (int)MAX(0, MIN(left, rows));
}

/* Whether all ids are in 0..V-1: an id below 0 or above V-1 makes a negative number of one of the two. */
static inline int tokens_in_range(const elman_shape *s) {
    int64_t bits = 0;
    for (int64_t t = 0; s->tokens && t < s->T; t++) {
        const int64_t *id = s->tokens + position(s, t, 0, s->tokens_t, s->tokens_b);
        int64_t rows = s->batch_sizes ? s->batch_sizes[t] : s->B;
        for (int64_t b = 0; b < rows; b++, id += s->tokens_b)
            bits |= *id | (int64_t)((uint64_t)s->V - 1 - (uint64_t)*id);
    }
    return bits >= 0;
}

/* How one call is cut: blocks of rows, panels of columns. */
typedef struct {
    int64_t rows, blocks;       /* rows of a block, blocks of one direction */
    int64_t panels, panel_size; /* panels of one direction, elements of one panel */
    int64_t state_size;         /* elements of one block's state */
} cut;

#endif

static cut NAME(make_cut)(const elman_shape *s, int even) {
    cut c;
    c.blocks = CEIL_DIV(s->B, MAX_ROWS);
    if (even && !s->columns && s->D * c.blocks % s->threads && s->B * s->D >= s->threads)
        c.blocks = MIN(s->B, CEIL_DIV(CEIL_DIV(s->D * c.blocks, s->threads) * s->threads, s->D));
    c.rows = even ? CEIL_DIV(s->B, c.blocks) : MAX_ROWS;
    c.blocks = CEIL_DIV(s->B, c.rows);
    c.panels = CEIL_DIV(s->H, PANEL);
    c.panel_size = s->H * PANEL;
    c.state_size = NAME(block_size)(s->H);
    return c;
}

/* Rows that were active at the step before and are not at this one keep their state. */
static void NAME(state_keep)(const cut *c, int from, int to, int64_t panel, int64_t last, const real *now, real *next) {
    int64_t end = MIN(last * PANEL, c->panel_size / PANEL);
    for (int row = from; row < to; row++)
        for (int64_t j = panel * PANEL; j < end; j += LANES)
            NAME(store)(next + NAME(at)(row, j), NAME(load)(now + NAME(at)(row, j)));
}
