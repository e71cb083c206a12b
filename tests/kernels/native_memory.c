/*
 * Runs every native kernel on small odd sizes, for a memory checker to watch: no Python and no torch around them.
 * Argument: the instruction set, 0 baseline, 1 AVX2, 2 AVX-512. Exit code 0 unless a kernel reports an error.
 */
#include <stdio.h>
#include <stdlib.h>

#include "kernels.h"

static float *numbers(int64_t count) {
    float *p = malloc((size_t)count * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        p[i] = (float)(i * 37 % 101 - 50) / 80;
    return p;
}

static int64_t *ids(int64_t count, int64_t below) {
    int64_t *p = malloc((size_t)count * sizeof(int64_t));
    for (int64_t i = 0; i < count; i++)
        p[i] = i % below;
    return p;
}

static int elman(int isa, int64_t H, int columns, int packed, int with_tokens) {
    enum { T = 3, B = 14, D = 2, V = 5 };
    int64_t sizes[T] = {14, 9, 2}, offsets[T] = {0, 14, 23}, N = packed ? 25 : T * B;
    int64_t *tokens = ids(N, V);
    float *x = numbers(with_tokens ? V * D * H : N * D * H), *out = numbers(N * D * H), *h_n = numbers(D * B * H);
    float *weight[D] = {numbers(H * H), numbers(H * H)}, *h0 = numbers(D * B * H);
    elman_shape s = {
        .T = T, .B = B, .H = H, .D = D, .V = with_tokens ? V : 0, .threads = 2, .columns = columns, .reverse = {0, 1},
        .batch_sizes = packed ? sizes : NULL, .offsets = packed ? offsets : NULL, .tokens = with_tokens ? tokens : NULL,
        .tokens_t = packed ? 0 : B, .tokens_b = 1, .weight = {weight[0], weight[1]}, .weight_row = {H, H},
        .h0 = h0, .h0_d = B * H, .h0_b = H, .out = out, .out_t = packed ? 0 : B * D * H, .out_b = D * H,
    };
    elman_forward_args forward = {.s = s, .x = x, .x_t = B * D * H, .x_b = D * H, .h_n = h_n};
    int failed = elman_forward_kernels[isa][0](&forward);
    for (int fused = 0; fused <= !columns; fused++) {
        float *grad_out = numbers(N * D * H), *grad_x = numbers(N * D * H), *grad_table = numbers(V * D * H);
        float *grad_weight[D] = {numbers(H * H), numbers(H * H)}, *grad_h0 = numbers(D * B * H);
        elman_backward_args backward = {
            .s = s, .fused = fused, .grad_out = grad_out, .grad_out_t = B * D * H, .grad_out_b = D * H,
            .grad_h_n = h_n, .grad_h_n_d = B * H, .grad_h_n_b = H, .grad_x = grad_x, .grad_x_t = B * D * H,
            .grad_x_b = D * H, .grad_table = with_tokens ? grad_table : NULL,
            .grad_weight = {grad_weight[0], grad_weight[1]}, .grad_h0 = grad_h0,
        };
        failed |= elman_backward_kernels[isa][0](&backward);
        free(grad_out), free(grad_x), free(grad_table), free(grad_weight[0]), free(grad_weight[1]), free(grad_h0);
    }
    free(tokens), free(x), free(out), free(h_n), free(weight[0]), free(weight[1]), free(h0);
    return failed;
}

static int loss(int isa) {
    enum { N = 70, H = 33, V = 29 };
    float *hidden = numbers(N * H), *weight = numbers(V * H), *bias = numbers(V);
    float *grad_hidden = numbers(N * H), *grad_weight = numbers(V * H), *grad_bias = numbers(V);
    int64_t *target = ids(N, V);
    double value;
    target[3] = -100;
    linear_cross_entropy_args args = {
        .N = N, .H = H, .V = V, .threads = 2, .ignore_index = -100, .mean = 1, .hidden = hidden, .hidden_row = H,
        .weight = weight, .weight_row = H, .bias = bias, .target = target, .loss = &value, .grad_hidden = grad_hidden,
        .grad_weight = grad_weight, .grad_bias = grad_bias,
    };
    int failed = linear_cross_entropy_kernels[isa][0](&args);
    free(hidden), free(weight), free(bias), free(grad_hidden), free(grad_weight), free(grad_bias), free(target);
    return failed;
}

static int language_model(int isa, int64_t T, int64_t B, int64_t H) {
    enum { V = 29 };
    int64_t *tokens = ids(T * B, V), *targets = ids(T * B, V);
    float *table = numbers(V * H), *weight = numbers(H * H), *head = numbers(V * H), *bias = numbers(V);
    float *h0 = numbers(B * H), *h_n = numbers(B * H), *grad_table = numbers(V * H), *grad_weight = numbers(H * H);
    float *grad_head = numbers(V * H), *grad_bias = numbers(V), *grad_h0 = numbers(B * H);
    double value;
    targets[T * B - 1] = -100;
    language_model_args args = {
        .T = T, .B = B, .H = H, .V = V, .threads = 2, .ignore_index = -100, .tokens = tokens, .tokens_t = B,
        .tokens_b = 1, .targets = targets, .targets_t = B, .targets_b = 1, .table = table, .table_row = H,
        .weight = weight, .weight_row = H, .head = head, .head_row = H, .bias = bias, .h0 = h0, .h0_row = H,
        .loss = &value, .h_n = h_n, .grad_table = grad_table, .grad_weight = grad_weight, .grad_head = grad_head,
        .grad_bias = grad_bias, .grad_h0 = grad_h0,
    };
    int failed = language_model_kernels[isa][0](&args);
    free(tokens), free(targets), free(table), free(weight), free(head), free(bias), free(h0), free(h_n);
    free(grad_table), free(grad_weight), free(grad_head), free(grad_bias), free(grad_h0);
    return failed;
}

static int decode(int isa, int threads) {
    enum { B = 3, P = 2, N = 9, H = 33, V = 29, L = 2 };
    float *table = numbers(V * H), *weight = numbers(H * H), *bias = numbers(H), *head = numbers(V * H);
    float *state = numbers(L * B * H);
    int64_t *prompt = ids(B * P, V), *out = ids(B * N, V);
    double uniforms[B * N], sharpness = 1;
    for (int i = 0; i < B * N; i++)
        uniforms[i] = i / (double)(B * N);
    const void *weights[L] = {weight, weight}, *biases[L] = {bias, bias};
    generate_args args = {
        .B = B, .P = P, .N = N, .H = H, .V = V, .L = L, .threads = threads, .prompt = prompt, .table = table,
        .weight_ih = weights, .weight_hh = weights, .bias = biases, .head_weight = head, .uniforms = uniforms,
        .sharpness = &sharpness, .top_k = 4, .state = state, .ids = out,
    };
    int failed = generate_kernels[isa][0](&args);
    free(table), free(weight), free(bias), free(head), free(state), free(prompt), free(out);
    return failed;
}

static int clip(int isa) {
    float *a = numbers(20000), *b = numbers(7);
    void *grads[2] = {a, b};
    int64_t sizes[2] = {20000, 7};
    double max_norm = 1, norm;
    clip_args args = {
        .count = 2, .threads = 2, .grads = grads, .sizes = sizes, .max_norm = &max_norm, .norm = &norm};
    int failed = clip_kernels[isa][0](&args);
    free(a), free(b);
    return failed;
}

int main(int argc, char **argv) {
    int isa = argc > 1 ? atoi(argv[1]) : 0, failed = 0;
    for (int64_t H = 1; H <= 40; H += 13)
        for (int options = 0; options < 8; options++)
            failed |= elman(isa, H, options & 1, options >> 1 & 1, options >> 2 & 1);
    for (int64_t H = 1; H <= 40; H += 13)
        failed |= language_model(isa, 3, 30, H) | language_model(isa, 31, 1, H) | language_model(isa, 7, 5, H);
    failed |= loss(isa) | decode(isa, 1) | decode(isa, 2) | clip(isa);
    printf("%s\n", failed ? "a kernel failed" : "done");
    return failed != 0;
}
