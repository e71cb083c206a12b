/*
 * Vectors of one instruction set and float type (included by way of targets.h), tanh and exp, and the one matrix
 * product that every kernel here is made of.
 *
 * C[i][j] = sum_k A[i][k] W[k][j], summed over k in order by one chain of multiply-adds per element, whatever the tile
 * shape: so results do not depend on how rows and columns are split over tiles and threads. The order is increasing,
 * but where a product of few rows is made again and again, as long as the reading of W takes: then every other time W is
 * read backwards (multiply_at), and its end is found in the nearest cache, where the time before has left it. W is
 * packed in panels: panel p holds columns p*PANEL .. p*PANEL+PANEL-1, k by k, zero beyond the last column; A is
 * blocked: LANES values of k at a time, MAX_ROWS rows each, so that every address is a constant from one pointer.
 */
#include <string.h>

#ifndef CHARRNN_SIMD_ONCE
#define CHARRNN_SIMD_ONCE
#include <math.h>
#include <stdint.h>

#include "scratch.h"

/* Keeps the compiler from loading all operands of a tile's step ahead of their use, which spills the sums. */
#if defined(__x86_64__)
#define PIN(v) __asm__ volatile("" : "+v"(v))
#else
#define PIN(v) (void)(v)
#endif
/* A batch of so few rows reads W backwards at every other step. */
enum { BACK_ROWS = 3 };
#define PREFETCH(p, write) __builtin_prefetch(p, write)
#define INLINE static inline __attribute__((always_inline, unused))
/* Rounds up to whole multiples. */
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#endif

#undef real
#undef integer
#undef unsigned_integer
#undef lane_mask
#undef OF_TYPE
#ifdef TYPE_IS_F64
#define real double
#define integer int64_t
#define unsigned_integer uint64_t
#define lane_mask __mmask8
#define OF_TYPE(intrinsic) intrinsic##_pd
#else
#define real float
#define integer int32_t
#define unsigned_integer uint32_t
#define lane_mask __mmask16
#define OF_TYPE(intrinsic) intrinsic##_ps
#endif

#undef LANES
#undef PANEL
#undef MAX_ROWS
#undef WIDE
#define LANES ((int)(ISA_BYTES / sizeof(real)))
#define PANEL (2 * LANES)
/* Accumulators for rows x 2 vectors fill the register file: 32 registers with AVX-512 (and NEON), 16 without. */
#if ISA_BYTES == 64 || defined(__aarch64__)
#define MAX_ROWS 12
#define WIDE(rows) ((rows) <= 3 ? 4 : (rows) <= 6 ? 2 : 1)
#else
#define MAX_ROWS 6
#define WIDE(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)
#endif

#undef vec
#undef ivec
#undef uvec
#define vec NAME(vec)
#define ivec NAME(ivec)
#define uvec NAME(uvec)
typedef real vec __attribute__((vector_size(ISA_BYTES), may_alias, aligned(sizeof(real))));
typedef integer ivec __attribute__((vector_size(ISA_BYTES), may_alias, aligned(sizeof(real))));
typedef unsigned_integer uvec __attribute__((vector_size(ISA_BYTES), may_alias, aligned(sizeof(real))));

INLINE vec NAME(load)(const real *p) { return *(const vec *)p; }
INLINE void NAME(store)(real *p, vec v) { *(vec *)p = v; }
INLINE vec NAME(splat)(real x) { return x - (vec){0}; }

/* The first n of LANES elements; zero beyond. */
#if defined(__x86_64__) && ISA_BYTES == 64
INLINE vec NAME(load_some)(const real *p, int n) {
    return OF_TYPE(_mm512_maskz_loadu)((lane_mask)((1u << n) - 1), p);
}
INLINE void NAME(store_some)(real *p, vec v, int n) {
    OF_TYPE(_mm512_mask_storeu)(p, (lane_mask)((1u << n) - 1), v);
}
#else
INLINE vec NAME(load_some)(const real *p, int n) {
    vec v = {0};
    if (n == LANES)
        return NAME(load)(p);
    for (int i = 0; i < n; i++)
        v[i] = p[i];
    return v;
}
INLINE void NAME(store_some)(real *p, vec v, int n) {
    if (n == LANES)
        NAME(store)(p, v);
    for (int i = 0; i < n && n < LANES; i++)
        p[i] = v[i];
}
#endif

INLINE vec NAME(fma)(vec a, vec b, vec c) {
#if defined(__x86_64__) && ISA_BYTES == 64
    return OF_TYPE(_mm512_fmadd)(a, b, c);
#elif defined(__x86_64__) && ISA_BYTES == 32
    return OF_TYPE(_mm256_fmadd)(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE vec NAME(select)(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
/* Element l of the result is element index[l] of a followed by b; index is a constant. */
INLINE vec NAME(shuffle)(vec a, vec b, ivec index) {
#if defined(__clang__)
    vec result;
    for (int l = 0; l < LANES; l++)
        result[l] = index[l] < LANES ? a[index[l]] : b[index[l] - LANES];
    return result;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

INLINE real NAME(sum)(vec v) {
#if defined(__x86_64__) && ISA_BYTES == 64
    return OF_TYPE(_mm512_reduce_add)(v);
#else
    real s = v[0];
    for (int i = 1; i < LANES; i++)
        s += v[i];
    return s;
#endif
}
INLINE real NAME(highest)(vec v) {
#if defined(__x86_64__) && ISA_BYTES == 64
    return OF_TYPE(_mm512_reduce_max)(v);
#else
    real m = v[0];
    for (int i = 1; i < LANES; i++)
        m = v[i] > m ? v[i] : m;
    return m;
#endif
}

/* The second where either is NaN. */
INLINE vec NAME(vmin)(vec a, vec b) {
#if defined(__x86_64__) && ISA_BYTES == 64 && !defined(TYPE_IS_F64)
    return _mm512_min_ps(a, b);
#elif defined(__x86_64__) && ISA_BYTES == 32 && !defined(TYPE_IS_F64)
    return _mm256_min_ps(a, b);
#else
    return NAME(select)(a < b, a, b);
#endif
}
INLINE vec NAME(vmax)(vec a, vec b) { return NAME(select)(a > b, a, b); }
#undef FMA
#define FMA NAME(fma)
#undef SPLAT
#define SPLAT(c) NAME(splat)((real)(c))

/*
 * exp(x) = 2^n p(r), r = x - n ln 2: p minimax on |r| <= ln(2)/2. For x within the normal range; NaN stays NaN, because
 * 2^n is multiplied and not added to the exponent's bits. Those are unsigned: of NaN, or of an x whose result is not
 * taken, they wrap.
 */
INLINE vec NAME(exp_normal)(vec x) {
#ifdef TYPE_IS_F64
    const vec magic = SPLAT(6755399441055744.0);
    vec n = FMA(x, SPLAT(1.4426950408889634), magic);
    uvec power = ((uvec)n << 52) + (uvec)SPLAT(1);
    n -= magic;
    vec r = FMA(n, SPLAT(-1.90821492927058770002e-10), FMA(n, SPLAT(-0.693147180369123816490), x));
    vec p = SPLAT(2.4999890043020182682e-8);
    p = FMA(p, r, SPLAT(2.7630381294727155269e-7));
    p = FMA(p, r, SPLAT(2.7557587588584136152e-6));
    p = FMA(p, r, SPLAT(2.4801492754733738329e-5));
    p = FMA(p, r, SPLAT(1.9841269504464942228e-4));
    p = FMA(p, r, SPLAT(1.3888888943931033206e-3));
    p = FMA(p, r, SPLAT(8.3333333334957899156e-3));
    p = FMA(p, r, SPLAT(4.1666666666529153763e-2));
    p = FMA(p, r, SPLAT(0.16666666666666409874));
    p = FMA(p, r, SPLAT(0.50000000000000107256));
#else
    const vec magic = SPLAT(12582912.0f);
    vec n = FMA(x, SPLAT(1.44269504f), magic);
    uvec power = ((uvec)n << 23) + (uvec)SPLAT(1);
    n -= magic;
    vec r = FMA(n, SPLAT(2.12194440e-4f), FMA(n, SPLAT(-0.693359375f), x));
    vec p = SPLAT(0.00138144589904f);
    p = FMA(p, r, SPLAT(0.00836878126987f));
    p = FMA(p, r, SPLAT(0.041668394383f));
    p = FMA(p, r, SPLAT(0.166665200986f));
    p = FMA(p, r, SPLAT(0.499999934116f));
#endif
    return (FMA(p, r * r, r) + (real)1) * (vec)power;
}

/* exp for x <= 0, 0 where the result would be below the normal range. */
INLINE vec NAME(vexp)(vec x) {
    const vec lowest = SPLAT(sizeof(real) == 8 ? -708 : -87);
    return NAME(select)(x < lowest, (vec){0}, NAME(exp_normal)(x));
}

/* tanh: odd, +-0 and denormals kept, +-inf to +-1, NaN to NaN. */
INLINE vec NAME(vtanh)(vec x) {
    ivec sign = (ivec)x & (ivec)SPLAT(-0.0);
    vec magnitude = (vec)((ivec)x ^ sign);
#ifdef TYPE_IS_F64
    /* Within 1.4 ulp. Below 0.625 x + x^3 S(x^2), minimax; above, 1 - 2 / (exp(2|x|) + 1), whose fraction is below
     * 0.45. */
    vec u = x * x, s = SPLAT(-1.7430155388162504306e-8), q = SPLAT(2.547802997435097586981e-4);
    s = FMA(s, u, SPLAT(-2.4372024121216163839e-4));
    q = FMA(q, u, SPLAT(2.452879543267170051749e-2));
    s = FMA(s, u, SPLAT(-2.1418663844830434812e-2));
    q = FMA(q, u, SPLAT(0.4642559915344912746485));
    s = FMA(s, u, SPLAT(-0.33333333333333333317)) / FMA(q, u, SPLAT(1));
    vec small = FMA(x * u, s, x);
    vec limited = NAME(vmin)(SPLAT(20), magnitude);
    vec large = 1 - 2 / (NAME(exp_normal)(limited + limited) + 1);
    return NAME(select)(magnitude < SPLAT(0.625), small, (vec)((ivec)large | sign));
#else
    /*
     * m / (m + 1) with m = (exp(2|x|) - 1) / 2 = 2^n q + (2^n - 1) / 2, where q = (exp(2r) - 1) / 2 = r + r^2 p(r),
     * minimax, r = |x| - n ln(2)/2: no cancellation near 0, no branch.
     */
    const vec magic = SPLAT(12582912.0f);
    vec a = NAME(vmin)(SPLAT(10), magnitude);
    vec n = FMA(a, SPLAT(2.88539008f), magic);
    vec power = (vec)(((uvec)n << 23) + (uvec)SPLAT(1));
    vec r = FMA(n - magic, SPLAT(-0.34657359f), a);
    vec p = SPLAT(0.0442062688f);
    p = FMA(p, r, SPLAT(0.13390050f));
    p = FMA(p, r, SPLAT(0.333347155f));
    p = FMA(p, r, SPLAT(0.666660804f));
    p = FMA(p, r, SPLAT(0.999999868f));
    vec m = FMA(power, FMA(p, r * r, r), FMA(power, SPLAT(0.5f), SPLAT(-0.5f)));
    return (vec)((ivec)(m / (m + 1)) | sign);
#endif
}

/* relu as torch's: NaN stays NaN. */
INLINE vec NAME(vrelu)(vec x) { return NAME(select)(x < (vec){0}, (vec){0}, x); }

/* Exchanges the off-diagonal halves of every square of 2*half rows and lanes. */
INLINE void NAME(exchange_halves)(vec rows[LANES], const int half) {
    ivec low = {0}, high = {0};
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
        low[l] = l & half ? LANES + l - half : l;
        high[l] = l & half ? LANES + l : l + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & half)) {
            vec a = rows[i], b = rows[i + half];
            rows[i] = NAME(shuffle)(a, b, low);
            rows[i + half] = NAME(shuffle)(a, b, high);
        }
}

/* Turns a square of LANES vectors. */
INLINE void NAME(transpose)(vec rows[LANES]) {
    if (LANES >= 16)
        NAME(exchange_halves)(rows, 8);
    if (LANES >= 8)
        NAME(exchange_halves)(rows, 4);
    if (LANES >= 4)
        NAME(exchange_halves)(rows, 2);
    NAME(exchange_halves)(rows, 1);
}

/* Packs panel p of W[k][j] = source[j*row + k] (transposed) or source[k*row + j] (plain), k < K, j < J. */
static __attribute__((unused)) void NAME(pack_panel)(const real *source, int64_t row, int transposed, int64_t K,
                                                     int64_t J, int64_t p, real *panel) {
    int64_t j0 = p * PANEL;
    int width = (int)MIN(PANEL, J - j0);
    source += j0 * (transposed ? row : 1);
    if (width < PANEL)
        memset(panel, 0, (size_t)(K * PANEL) * sizeof(real));
    if (!transposed) {
        for (int64_t k = 0; k < K; k++)
            for (int v = 0; v < width; v += LANES)
                NAME(store)(panel + k * PANEL + v, NAME(load_some)(source + k * row + v, MIN(LANES, width - v)));
        return;
    }
    for (int j = 0; j < width; j += LANES) {
        int64_t k = 0;
        for (; j + LANES <= width && k + LANES <= K; k += LANES) {
            vec square[LANES];
            for (int i = 0; i < LANES; i++)
                square[i] = NAME(load)(source + (j + i) * row + k);
            NAME(transpose)(square);
            for (int i = 0; i < LANES; i++)
                NAME(store)(panel + (k + i) * PANEL + j, square[i]);
        }
        for (; k < K; k++)
            for (int i = j; i < MIN(width, j + LANES); i++)
                panel[k * PANEL + i] = source[i * row + k];
    }
}

/*
 * The tile: `rows` rows by `panels` panels. row_step and k_step say how A's block is ordered: (LANES, 1) rows of
 * vectors, (1, rows) k-major. C is [panels][rows][PANEL]. All but K and the pointers are constants after inlining.
 */
INLINE void NAME(multiply_add)(const int rows, const int panels, const int row_step, const real *a, const real *w,
                               int64_t panel_size, vec acc[12][8]) {
    vec wide[8];
    for (int v = 0; v < 2 * panels; v++)
        wide[v] = NAME(load)(w + (v / 2) * panel_size + (v % 2) * LANES);
    for (int i = 0; i < rows; i++) {
        vec ai = NAME(splat)(a[i * row_step]);
        PIN(ai);
        for (int v = 0; v < 2 * panels; v++)
            acc[i][v] = FMA(ai, wide[v], acc[i][v]);
    }
}

INLINE void NAME(tile)(const int rows, const int panels, const int row_step, const int k_step, const int block,
                       const int backwards, int64_t K, const real *a, const real *w, int64_t panel_size, real *c) {
    vec acc[12][8];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2 * panels; v++)
            acc[i][v] = (vec){0};
    if (backwards) {
        int64_t at = (K - 1) / LANES * LANES, k = K - at;
        a += at / LANES * block;
        do {
            do {
                k--;
                NAME(multiply_add)(rows, panels, row_step, a + k * k_step, w + (at + k) * PANEL, panel_size, acc);
            } while (k);
            a -= block;
            k = LANES;
        } while ((at -= LANES) >= 0);
    } else do {
        const real *ak = a, *end = w + MIN(K, LANES) * PANEL;
        do {
            NAME(multiply_add)(rows, panels, row_step, ak, w, panel_size, acc);
            ak += k_step;
            w += PANEL;
        } while (w != end);
        a += block;
        K -= LANES;
    } while (K > 0);
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2 * panels; v++)
            NAME(store)(c + ((v / 2) * rows + i) * PANEL + (v % 2) * LANES, acc[i][v]);
}

typedef void (*NAME(tile_function))(int64_t K, const real *a, const real *w, int64_t panel_size, real *c);

#define TILE(rows, panels, backwards)                                                                                  \
    static void NAME(tile_##rows##_##panels##_##backwards)(int64_t K, const real *a, const real *w,                    \
                                                           int64_t panel_size, real *c) {                              \
        NAME(tile)(rows, panels, LANES, 1, MAX_ROWS * LANES, backwards, K, a, w, panel_size, c);                       \
    }
TILE(1, 1, 0) TILE(2, 1, 0) TILE(3, 1, 0) TILE(4, 1, 0) TILE(5, 1, 0) TILE(6, 1, 0) TILE(1, 4, 0)
TILE(1, 1, 1) TILE(2, 1, 1) TILE(3, 1, 1) TILE(1, 4, 1)
#if MAX_ROWS == 12
TILE(7, 1, 0) TILE(8, 1, 0) TILE(9, 1, 0) TILE(10, 1, 0) TILE(11, 1, 0) TILE(12, 1, 0)
TILE(2, 4, 0) TILE(3, 4, 0) TILE(4, 2, 0) TILE(5, 2, 0) TILE(6, 2, 0)
TILE(2, 4, 1) TILE(3, 4, 1)
#else
TILE(2, 2, 0) TILE(3, 2, 0) TILE(2, 2, 1) TILE(3, 2, 1)
#endif
#undef TILE

#define T(rows, panels) NAME(tile_##rows##_##panels##_0)
#define BACK(rows, panels) NAME(tile_##rows##_##panels##_1)
/* By rows: one panel; WIDE(rows) of them; and backwards, by whether there are as many, and by rows up to BACK_ROWS. */
#if MAX_ROWS == 12
static const NAME(tile_function) NAME(narrow_tiles)[] __attribute__((unused)) = {
    0, T(1, 1), T(2, 1), T(3, 1), T(4, 1), T(5, 1), T(6, 1), T(7, 1), T(8, 1), T(9, 1), T(10, 1), T(11, 1), T(12, 1),
};
static const NAME(tile_function) NAME(wide_tiles)[] __attribute__((unused)) = {
    0, T(1, 4), T(2, 4), T(3, 4), T(4, 2), T(5, 2), T(6, 2), T(7, 1), T(8, 1), T(9, 1), T(10, 1), T(11, 1), T(12, 1),
};
static const NAME(tile_function) NAME(back_tiles)[2][BACK_ROWS + 1] __attribute__((unused)) = {
    {0, BACK(1, 1), BACK(2, 1), BACK(3, 1)},
    {0, BACK(1, 4), BACK(2, 4), BACK(3, 4)},
};
#else
static const NAME(tile_function) NAME(narrow_tiles)[] __attribute__((unused)) = {
    0, T(1, 1), T(2, 1), T(3, 1), T(4, 1), T(5, 1), T(6, 1),
};
static const NAME(tile_function) NAME(wide_tiles)[] __attribute__((unused)) = {
    0, T(1, 4), T(2, 2), T(3, 2), T(4, 1), T(5, 1), T(6, 1),
};
static const NAME(tile_function) NAME(back_tiles)[2][BACK_ROWS + 1] __attribute__((unused)) = {
    {0, BACK(1, 1), BACK(2, 1), BACK(3, 1)},
    {0, BACK(1, 4), BACK(2, 2), BACK(3, 2)},
};
#endif
#undef T
#undef BACK

/* How many of the panels that are left are multiplied at once. */
INLINE int NAME(at_once)(int rows, int64_t left) {
    return WIDE(rows) > 1 && left >= WIDE(rows) ? WIDE(rows) : 1;
}

/* Multiplies `count` panels, as many as at_once says; backwards for at most BACK_ROWS rows. */
INLINE void NAME(multiply_at)(int rows, int count, int backwards, int64_t K, const real *a, const real *w,
                              int64_t panel_size, real *c) {
    if (backwards)
        NAME(back_tiles)[count > 1][rows](K, a, w, panel_size, c);
    else
        (count > 1 ? NAME(wide_tiles) : NAME(narrow_tiles))[rows](K, a, w, panel_size, c);
}

/* Multiplies up to `left` panels at once; returns how many. */
INLINE int NAME(multiply)(int rows, int64_t left, int64_t K, const real *a, const real *w, int64_t panel_size,
                          real *c) {
    int count = NAME(at_once)(rows, left);
    NAME(multiply_at)(rows, count, 0, K, a, w, panel_size, c);
    return count;
}

/* Element (row, column) of a block of A; the elements of a block of `columns` columns; one row in and out. */
INLINE int64_t NAME(at)(int64_t row, int64_t column) {
    return (column / LANES) * (MAX_ROWS * LANES) + row * LANES + column % LANES;
}
INLINE int64_t NAME(block_size)(int64_t columns) { return CEIL_DIV(columns, LANES) * LANES * MAX_ROWS; }
static __attribute__((unused)) void NAME(block_load)(real *block, int64_t row, int64_t columns, const real *source) {
    for (int64_t j = 0; j < columns; j += LANES)
        NAME(store)(block + NAME(at)(row, j), NAME(load_some)(source + j, (int)MIN(LANES, columns - j)));
}
static __attribute__((unused)) void NAME(block_save)(const real *block, int64_t row, int64_t columns, real *target) {
    for (int64_t j = 0; j < columns; j += LANES)
        NAME(store_some)(target + j, NAME(load)(block + NAME(at)(row, j)), (int)MIN(LANES, columns - j));
}
