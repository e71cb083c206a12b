/*
 * Calls every native kernel with argument records of random sizes, strides, ids, batch sizes and buffers, for a memory
 * checker to watch. Buffers have the sizes that the record says, and nothing else need be right: what does not fit has
 * to be refused (bounds.c), and what is not refused must stay inside.
 * Arguments: instruction set (0 baseline, 1 AVX2, 2 AVX-512), calls, seed, and 1 for records that are all right, of which
 * none may be refused and none may fail. Prints how many calls were refused, how many ran, and how many of those failed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { MAX_BUFFERS = 64, LARGEST = 1 << 17 };

static uint64_t seed;
static void *buffers[MAX_BUFFERS];
static int buffer_count, strange; /* strange: how often, of 100, a number is not the right one */
static int all_right;
static long failed;

static int64_t below(int64_t n) { /* xorshift64* */
    seed ^= seed >> 12, seed ^= seed << 25, seed ^= seed >> 27;
    return (int64_t)((seed * 0x2545F4914F6CDD1DULL) >> 33) % n;
}

static int oddly(void) { return below(100) < strange; }

static int64_t number(int64_t right) {
    static const int64_t odd[] = {0, 1, 2, -1, -7, 1000, (int64_t)1 << 40, INT64_MAX, INT64_MIN, INT64_MAX / 8};
    if (!oddly())
        return right;
    return below(2) ? right + below(5) - 2 : odd[below((int64_t)(sizeof odd / sizeof *odd))];
}

/* A buffer that should have `count` items of `item` bytes, its size in *bytes; perhaps smaller, larger or none. */
static void *buffer(int64_t count, int64_t item, int64_t *bytes, int optional) {
    if (optional ? below(3) == 0 : oddly()) {
        *bytes = oddly() ? below(1000) : 0;
        return NULL;
    }
    int64_t size = number(count);
    size = size < 0 ? 0 : size > LARGEST / item ? LARGEST : size * item;
    *bytes = oddly() && size > 0 ? size - 1 : size;
    void *p = malloc((size_t)*bytes);
    buffers[buffer_count++] = p;
    if (item == 4)
        for (int64_t i = 0; i < *bytes / 4; i++)
            ((float *)p)[i] = (float)(below(201) - 100) / 90;
    else
        for (int64_t i = 0; i < *bytes / 8; i++)
            ((double *)p)[i] = (double)(below(201) - 100) / 90;
    return p;
}

static int64_t *ids(int64_t count, int64_t vocab, int64_t *bytes, int optional) {
    int64_t *p = buffer(count, 8, bytes, optional);
    for (int64_t i = 0; p && i < *bytes / 8; i++)
        p[i] = all_right || below(200) ? below(vocab) : number(-100);
    return p;
}

static int64_t size(int64_t most) { return 1 + below(most); }

static int call(const char *(*refused)(const void *, int64_t), const kernel table[][2], int isa, int64_t item,
                const void *args) {
    if (refused(args, item))
        return 1;
    failed += table[isa][item == 8](args) != 0;
    return 0;
}

static void make_shape(elman_shape *s, int64_t item, int64_t *rows) {
    int64_t T = size(5), B = size(19), H = size(40), D = size(2), V = size(9);
    int packed = below(2), tokens = below(2);
    *s = (elman_shape){.T = number(T), .B = number(B), .H = number(H), .D = number(D), .V = number(tokens ? V : 0),
                       .threads = all_right || below(20) ? size(3) : number(100000), .columns = below(2), .relu = below(2),
                       .reverse = {below(2), below(2)}};
    *rows = T * B;
    if (packed) {
        int64_t *sizes = buffer(T, 8, &s->batch_sizes_bytes, 0), *offsets = buffer(T, 8, &s->offsets_bytes, 0), left = B;
        s->batch_sizes = sizes, s->offsets = offsets, *rows = 0;
        for (int64_t t = 0; t < T; t++, *rows += left) {
            left -= t ? below(left) : 0;
            if (sizes && t < s->batch_sizes_bytes / 8)
                sizes[t] = number(left);
            if (offsets && t < s->offsets_bytes / 8)
                offsets[t] = number(*rows);
        }
    }
    if (tokens)
        s->tokens = ids(*rows, V, &s->tokens_bytes, 0);
    s->tokens_t = number(packed ? 0 : B), s->tokens_b = number(1);
    for (int64_t d = 0; d < D; d++) {
        s->weight[d] = buffer(H * H, item, &s->weight_bytes[d], 0);
        s->weight_row[d] = number(H);
    }
    s->h0 = buffer(D * B * H, item, &s->h0_bytes, 1);
    s->h0_d = number(B * H), s->h0_b = number(H);
    s->out = buffer(*rows * D * H, item, &s->out_bytes, 0);
    s->out_t = number(packed ? 0 : B * D * H), s->out_b = number(D * H);
}

static int elman(int isa, int64_t item, int backward) {
    elman_shape s;
    int64_t rows;
    make_shape(&s, item, &rows);
    int64_t width = (s.D & 3) * (s.H & 63), t = s.batch_sizes ? 0 : (s.B & 31) * width, states = (s.B & 31) * width;
    if (!backward) {
        elman_forward_args p = {.s = s, .x_t = number(t), .x_b = number(width)};
        p.x = buffer((s.tokens ? s.V & 15 : rows) * width, item, &p.x_bytes, 0);
        p.h_n = buffer(states, item, &p.h_n_bytes, 0);
        return call(elman_forward_refused, elman_forward_kernels, isa, item, &p);
    }
    elman_backward_args p = {.s = s, .fused = below(2), .grad_out_t = number(t), .grad_out_b = number(width),
                             .grad_h_n_d = number((s.B & 31) * (s.H & 63)), .grad_h_n_b = number(s.H & 63),
                             .grad_x_t = number(t), .grad_x_b = number(width)};
    if (p.fused && (all_right || below(10)))
        p.s.columns = 0;
    p.grad_out = buffer(rows * width, item, &p.grad_out_bytes, 1);
    p.grad_h_n = buffer(states, item, &p.grad_h_n_bytes, 1);
    p.grad_x = buffer(rows * width, item, &p.grad_x_bytes, p.fused);
    if (s.tokens)
        p.grad_table = buffer((s.V & 15) * width, item, &p.grad_table_bytes, 1);
    int weights = below(3) > 0;
    for (int d = 0; weights && d < 2; d++)
        p.grad_weight[d] = buffer((s.H & 63) * (s.H & 63), item, &p.grad_weight_bytes[d], 0);
    p.grad_h0 = buffer(states, item, &p.grad_h0_bytes, 0);
    return call(elman_backward_refused, elman_backward_kernels, isa, item, &p);
}

static int loss(int isa, int64_t item) {
    int64_t N = size(80), H = size(36), V = size(40);
    linear_cross_entropy_args p = {.N = number(N), .H = number(H), .V = number(V), .threads = size(3),
                                   .ignore_index = -100, .mean = below(2), .hidden_row = number(H),
                                   .weight_row = number(H)};
    p.hidden = buffer(N * H, item, &p.hidden_bytes, 0);
    p.weight = buffer(V * H, item, &p.weight_bytes, 0);
    p.bias = buffer(V, item, &p.bias_bytes, 1);
    p.target = ids(N, V, &p.target_bytes, 0);
    p.grad_loss = buffer(N, item, &p.grad_loss_bytes, 1);
    p.loss = buffer(1, 8, &p.loss_bytes, 0);
    p.row_loss = buffer(N, item, &p.row_loss_bytes, 1);
    int gradients = below(2);
    if (gradients) {
        p.grad_hidden = buffer(N * H, item, &p.grad_hidden_bytes, 0);
        p.grad_weight = buffer(V * H, item, &p.grad_weight_bytes, 0);
        p.grad_bias = buffer(V, item, &p.grad_bias_bytes, 1);
    }
    return call(linear_cross_entropy_refused, linear_cross_entropy_kernels, isa, item, &p);
}

static int model(int isa, int64_t item) {
    /* Of few rows several steps are taken together. */
    int64_t T = size(below(4) ? 6 : 31), B = size(T > 6 ? 7 : 33), H = size(40), V = size(30);
    language_model_args p = {.T = number(T), .B = number(B), .H = number(H), .V = number(V), .threads = size(3),
                             .relu = below(2), .ignore_index = -100, .tokens_t = number(B), .tokens_b = number(1),
                             .targets_t = number(1), .targets_b = number(T), .table_row = number(H),
                             .weight_row = number(H), .head_row = number(H), .h0_row = number(H)};
    p.tokens = ids(T * B, V, &p.tokens_bytes, 0), p.targets = ids(T * B, V, &p.targets_bytes, 0);
    p.table = buffer(V * H, item, &p.table_bytes, 0), p.weight = buffer(H * H, item, &p.weight_bytes, 0);
    p.head = buffer(V * H, item, &p.head_bytes, 0);
    int bias = below(2);
    if (bias) {
        p.bias = buffer(V, item, &p.bias_bytes, 0);
        p.grad_bias = buffer(V, item, &p.grad_bias_bytes, 0);
    }
    p.h0 = buffer(B * H, item, &p.h0_bytes, 1), p.loss = buffer(1, 8, &p.loss_bytes, 0);
    p.h_n = buffer(B * H, item, &p.h_n_bytes, 0), p.grad_table = buffer(V * H, item, &p.grad_table_bytes, 0);
    p.grad_weight = buffer(H * H, item, &p.grad_weight_bytes, 0);
    p.grad_head = buffer(V * H, item, &p.grad_head_bytes, 0), p.grad_h0 = buffer(B * H, item, &p.grad_h0_bytes, 0);
    return call(language_model_refused, language_model_kernels, isa, item, &p);
}

static const void *const *layers(int64_t L, int64_t count, int64_t item, int64_t *bytes) {
    int64_t *list = buffer(2 * L, 8, bytes, 0);
    if (list)
        memset(list, 0, (size_t)*bytes);
    for (int64_t layer = 0; list && layer < L && (L + layer + 1) * 8 <= *bytes; layer++) {
        int64_t size;
        list[layer] = (int64_t)buffer(count, item, &size, 0);
        list[L + layer] = size;
    }
    return (const void *const *)list;
}

static int decode(int isa, int64_t item) {
    int64_t B = size(14), P = size(3), N = size(6), H = size(36), V = size(30), L = size(3);
    generate_args p = {.B = number(B), .P = number(P), .N = number(N), .H = number(H), .V = number(V), .L = L,
                       .threads = size(3), .relu = below(2), .top_k = below(2) ? 0 : number(size(V))};
    p.prompt = ids(B * P, V, &p.prompt_bytes, 0), p.table = buffer(V * H, item, &p.table_bytes, 0);
    p.weight_ih = layers(L, H * H, item, &p.weight_ih_bytes);
    p.weight_hh = layers(L, H * H, item, &p.weight_hh_bytes), p.bias = layers(L, H, item, &p.bias_bytes);
    p.head_weight = buffer(V * H, item, &p.head_weight_bytes, 0), p.head_bias = buffer(V, item, &p.head_bias_bytes, 1);
    p.uniforms = buffer(B * N, 8, &p.uniforms_bytes, 1), p.sharpness = buffer(1, 8, &p.sharpness_bytes, 0);
    p.state = buffer(L * B * H, item, &p.state_bytes, 0), p.ids = buffer(B * N, 8, &p.ids_bytes, 0);
    return call(generate_refused, generate_kernels, isa, item, &p);
}

static int clip(int isa, int64_t item) {
    int64_t count = size(4);
    clip_args p = {.count = number(count), .threads = size(3)};
    int64_t *grads = buffer(count, 8, &p.grads_bytes, 0), *sizes = buffer(count, 8, &p.sizes_bytes, 0);
    if (grads)
        memset(grads, 0, (size_t)p.grads_bytes);
    if (sizes)
        memset(sizes, 0, (size_t)p.sizes_bytes);
    /* A gradient's size in elements is what this record believes, as it does an address. */
    for (int64_t i = 0; grads && sizes && i < p.grads_bytes / 8 && i < p.sizes_bytes / 8 && i < 8; i++) {
        int64_t bytes;
        grads[i] = (int64_t)buffer(size(below(8) ? 3000 : 20000), item, &bytes, 0);
        sizes[i] = bytes / item;
    }
    p.grads = (void *const *)grads, p.sizes = sizes;
    p.max_norm = buffer(1, 8, &p.max_norm_bytes, 0), p.norm = buffer(1, 8, &p.norm_bytes, 0);
    return call(clip_refused, clip_kernels, isa, item, &p);
}

int main(int argc, char **argv) {
    int isa = argc > 1 ? atoi(argv[1]) : 0;
    long calls = argc > 2 ? atol(argv[2]) : 1000, refused = 0;
    seed = 0x9E3779B97F4A7C15ULL ^ (argc > 3 ? (uint64_t)atol(argv[3]) : 0);
    all_right = argc > 4 && atoi(argv[4]);
    for (long i = 0; i < calls; i++) {
        int64_t item = below(2) ? 4 : 8;
        strange = all_right ? 0 : (int)(below(3) * 3); /* a third of the calls are right but for their ids */
        switch (below(7)) {
        case 0: case 1: refused += elman(isa, item, 0); break;
        case 2: case 3: refused += elman(isa, item, 1); break;
        case 4: refused += loss(isa, item); break;
        case 5: refused += below(2) ? model(isa, item) : clip(isa, item); break;
        default: refused += decode(isa, item);
        }
        while (buffer_count)
            free(buffers[--buffer_count]);
    }
    printf("refused %ld ran %ld failed %ld\n", refused, calls - refused, failed);
    return 0;
}
