/*
 * Sums of outer products, target (G, H) = sum over rows of g^T h: rows are gathered OUTER_ROWS at a time into the
 * operands of the tile (simd.h), so that each sum runs in registers; and the addition of partial sums in a fixed order.
 */
#undef OUTER_TILE
#define OUTER_TILE (ISA_BYTES == 64 ? 8 : (int)MIN(4, LANES))

/*
 * Elements from one tile of g, or panel of h, to the next: a cache line more than their size, or else all that belongs
 * to one row would fall into the same few places of the cache.
 */
#undef TILE_STRIDE
#undef PANEL_STRIDE
#define TILE_STRIDE (OUTER_ROWS * OUTER_TILE + (int)(64 / sizeof(real)))
#define PANEL_STRIDE (OUTER_ROWS * PANEL + (int)(64 / sizeof(real)))

#ifndef CHARRNN_OUTER_ONCE
#define CHARRNN_OUTER_ONCE
enum { OUTER_ROWS = 128 };
#endif

typedef struct {
    real *g, *h; /* [G tiles][OUTER_ROWS][OUTER_TILE], [H panels][OUTER_ROWS][PANEL], padded */
    real *tile;
    real *target;              /* (G, H), contiguous; NULL: no sum is wanted */
    int64_t G, H, first, last; /* tiles first..last-1 of target's rows are this sum's */
    int count;
} NAME(outer);

static __attribute__((unused)) int64_t NAME(outer_size)(int64_t G, int64_t H) {
    return CEIL_DIV(G, LANES) * (LANES / OUTER_TILE) * TILE_STRIDE + CEIL_DIV(H, PANEL) * PANEL_STRIDE;
}

static __attribute__((unused)) NAME(outer)
    NAME(outer_open)(real *memory, real *tile, real *target, int64_t G, int64_t H, int64_t first, int64_t last) {
    real *h = memory + CEIL_DIV(G, LANES) * (LANES / OUTER_TILE) * TILE_STRIDE;
    NAME(outer) sum = {memory, h, tile, target, G, H, first, last, 0};
    memset(target + first * OUTER_TILE * H, 0,
           (size_t)((MIN(G, last * OUTER_TILE) - first * OUTER_TILE) * H) * sizeof(real));
    if (H % PANEL)
        memset(h + H / PANEL * PANEL_STRIDE, 0, PANEL_STRIDE * sizeof(real));
    return sum;
}

/* Adds the first `rows` rows, `columns` columns of a tile to target, whose rows are `row` elements apart. */
INLINE void NAME(outer_add)(const real *tile, real *target, int64_t rows, int64_t row, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0; v < PANEL && v < columns; v += LANES) {
            int width = (int)MIN(LANES, columns - v);
            vec sum = NAME(load_some)(target + i * row + v, width) + NAME(load)(tile + i * PANEL + v);
            NAME(store_some)(target + i * row + v, sum, width);
        }
}

/* Fetches what outer_add will add to: `rows` rows are pages apart, where no hardware would foresee them. */
INLINE void NAME(outer_fetch)(const real *target, int64_t rows, int64_t row) {
    for (int64_t i = 0; i < rows; i++) {
        PREFETCH(target + i * row, 1);
        PREFETCH(target + i * row + LANES, 1);
    }
}

static void NAME(outer_flush)(NAME(outer) *sum) {
    for (int64_t p = 0; sum->count && p * PANEL < sum->H; p++)
        for (int64_t r = sum->first; r < sum->last; r++) {
            NAME(outer_fetch)(sum->target + r * OUTER_TILE * sum->H + p * PANEL,
                              MIN(OUTER_TILE, sum->G - r * OUTER_TILE), sum->H);
            NAME(tile)(OUTER_TILE, 1, 1, OUTER_TILE, LANES * OUTER_TILE, 0, sum->count,
                       sum->g + r * TILE_STRIDE, sum->h + p * PANEL_STRIDE, 0, sum->tile);
            NAME(outer_add)(sum->tile, sum->target + r * OUTER_TILE * sum->H + p * PANEL,
                            MIN(OUTER_TILE, sum->G - r * OUTER_TILE), sum->H, sum->H - p * PANEL);
        }
    sum->count = 0;
}

/*
 * Adds one row: g in vectors g_step elements apart (LANES: contiguous), h contiguous. With g_full, h_full their last
 * vectors may be read whole.
 */
INLINE void NAME(outer_row)(NAME(outer) *sum, const int g_full, const int h_full, const real *g, int64_t g_step,
                            const real *h) {
    int64_t begin = sum->first * OUTER_TILE / LANES * LANES, end = MIN(sum->G, sum->last * OUTER_TILE);
    real *to = sum->g + begin / OUTER_TILE * TILE_STRIDE + sum->count * OUTER_TILE;
    g += begin / LANES * g_step;
    for (int64_t j = begin; j < end; j += LANES, g += g_step) {
        real part[LANES];
        if (!g_full)
            NAME(store)(part, NAME(load_some)(g, (int)MIN(LANES, sum->G - j)));
        for (int e = 0; e < LANES; e += OUTER_TILE, to += TILE_STRIDE)
            memcpy(to, (g_full ? g : part) + e, OUTER_TILE * sizeof(real));
    }
    to = sum->h + sum->count * PANEL;
    for (int64_t j = 0; j < sum->H; j += PANEL, to += PANEL_STRIDE)
        for (int v = 0; v < PANEL && j + v < sum->H; v += LANES)
            NAME(store)(to + v,
                        h_full ? NAME(load)(h + j + v) : NAME(load_some)(h + j + v, (int)MIN(LANES, sum->H - j - v)));
    if (++sum->count == OUTER_ROWS)
        NAME(outer_flush)(sum);
}

/* target[r][j] = target[r][j] if `kept`, else 0, + sum over parts of sums[part][r][j]: this thread's share of the rows. */
static void NAME(add_parts)(const team *self, int kept, const real *sums, int64_t parts, int64_t rows, int64_t columns,
                            real *target, int64_t target_row) {
    int64_t begin, end;
    team_share(self, rows, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
        if (!kept)
            memcpy(target + r * target_row, sums + r * columns, (size_t)columns * sizeof(real));
        for (int64_t part = !kept; part < parts; part++)
            for (int64_t j = 0; j < columns; j++)
                target[r * target_row + j] += sums[(part * rows + r) * columns + j];
    }
}
