/*
 * What module.c and the kernels agree on: one argument record per kernel, filled field by field from Python integers.
 *
 * Every field is 8 bytes wide, in the order in which __init__.py passes it. Strides count elements. Element (t, b) of a
 * sequence lies at t*stride_t + b*stride_b, or, when packed, at (offsets[t] + b)*stride_b; the last stride is 1.
 */
#ifndef CHARRNN_KERNELS_H
#define CHARRNN_KERNELS_H

#include <stdint.h>

enum { STATUS_OK = 0, STATUS_NO_MEMORY = 1, STATUS_BAD_TOKEN = 2 };

enum { ISA_BASELINE, ISA_AVX2, ISA_AVX512, ISA_COUNT };

typedef struct {
    int64_t T, B, H, D, V;      /* V: rows of the table, 0 for dense input */
    int64_t threads;            /* upper bound, the caller included */
    int64_t columns;            /* 0: rows are split over the threads; 1: columns are */
    int64_t relu;               /* 0: tanh */
    int64_t reverse[2];         /* does direction d walk time backwards */
    const int64_t *batch_sizes; /* (T), rows active at each step, or NULL: always B */
    const int64_t *offsets;     /* (T), exclusive sums of batch_sizes, or NULL */
    const int64_t *tokens;      /* (T, B) or (N), or NULL: dense input */
    int64_t tokens_t, tokens_b;
    const void *weight[2]; /* (H, H), weight_hh of direction d */
    int64_t weight_row[2];
    const void *h0; /* (D, B, H) or NULL: zeros */
    int64_t h0_d, h0_b;
    void *out; /* (T, B, D*H) or (N, D*H); read by backward */
    int64_t out_t, out_b;
} elman_shape;

typedef struct {
    elman_shape s;
    const void *x; /* like out; with tokens the table (V, D*H), row stride x_b */
    int64_t x_t, x_b;
    void *h_n; /* (D, B, H), contiguous */
} elman_forward_args;

typedef struct {
    elman_shape s;
    int64_t fused;        /* 1: weight and table gradients while the recurrence runs, rows split */
    const void *grad_out; /* like out, or NULL */
    int64_t grad_out_t, grad_out_b;
    const void *grad_h_n; /* (D, B, H), or NULL */
    int64_t grad_h_n_d, grad_h_n_b;
    void *grad_x; /* like out; NULL where only the table's gradient is wanted and fused is 1 */
    int64_t grad_x_t, grad_x_b;
    void *grad_table;     /* (V, D*H), contiguous, or NULL */
    void *grad_weight[2]; /* (H, H), contiguous, or NULL */
    void *grad_h0;        /* (D, B, H), contiguous */
} elman_backward_args;

typedef struct {
    int64_t N, H, V, threads;
    int64_t ignore_index;
    int64_t mean;       /* 1: every row's gradient is divided by the number of rows that count */
    const void *hidden; /* (N, H) */
    int64_t hidden_row;
    const void *weight; /* (V, H) */
    int64_t weight_row;
    const void *bias;      /* (V) or NULL */
    const int64_t *target; /* (N), contiguous */
    const void *grad_loss; /* (N), factor of each row's gradient, or NULL: 1 */
    double *loss;          /* (1): out, sum or mean over the rows that count */
    void *row_loss;        /* (N) or NULL: out, 0 where ignored */
    void *grad_hidden;     /* (N, H), contiguous, or NULL: no gradients */
    void *grad_weight;     /* (V, H), contiguous, or NULL */
    void *grad_bias;       /* (V) or NULL */
} linear_cross_entropy_args;

typedef struct {
    int64_t T, B, H, V;
    int64_t threads, relu;
    int64_t ignore_index;
    const int64_t *tokens; /* (T, B) */
    int64_t tokens_t, tokens_b;
    const int64_t *targets; /* (T, B) */
    int64_t targets_t, targets_b;
    const void *table; /* (V, H) */
    int64_t table_row;
    const void *weight; /* (H, H), weight_hh */
    int64_t weight_row;
    const void *head; /* (V, H) */
    int64_t head_row;
    const void *bias; /* (V) of the head, or NULL */
    const void *h0;   /* (B, H) or NULL: zeros */
    int64_t h0_row;
    double *loss;      /* (1): out, mean over the targets that count */
    void *h_n;         /* (B, H), contiguous; as are the gradients */
    void *grad_table;  /* (V, H) */
    void *grad_weight; /* (H, H) */
    void *grad_head;   /* (V, H) */
    void *grad_bias;   /* (V) or NULL */
    void *grad_h0;     /* (B, H) */
} language_model_args;

typedef struct {
    int64_t B, P, N, H, V, L; /* P: prompt length, N: ids to append */
    int64_t threads, relu;
    const int64_t *prompt;        /* (B, P), contiguous */
    const void *table;            /* (V, H), contiguous: row v = W_ih[:, v] + b_ih + b_hh of layer 0 */
    const void *const *weight_ih; /* [L] (H, H), contiguous; entry 0 unused */
    const void *const *weight_hh; /* [L] (H, H), contiguous */
    const void *const *bias;      /* [L] (H), b_ih + b_hh; entry 0 unused */
    const void *head_weight;      /* (V, H), contiguous */
    const void *head_bias;        /* (V) or NULL */
    const double *uniforms;       /* (B, N) in [0, 1), contiguous, or NULL: greedy */
    const double *sharpness;      /* (1): alpha / temperature */
    int64_t top_k;                /* 0: all */
    void *state;                  /* (L, B, H), contiguous: in and out */
    int64_t *ids;                 /* (B, N), contiguous: out */
} generate_args;

typedef struct {
    int64_t count, threads;
    void *const *grads;     /* [count] contiguous tensors */
    const int64_t *sizes;   /* [count] */
    const double *max_norm; /* (1) */
    double *norm;           /* (1): out */
} clip_args;

typedef int (*kernel)(const void *args);

/* [instruction set][0: float, 1: double]; NULL where this build or this architecture has none. */
extern const kernel elman_forward_kernels[ISA_COUNT][2];
extern const kernel elman_backward_kernels[ISA_COUNT][2];
extern const kernel linear_cross_entropy_kernels[ISA_COUNT][2];
extern const kernel language_model_kernels[ISA_COUNT][2];
extern const kernel generate_kernels[ISA_COUNT][2];
extern const kernel clip_kernels[ISA_COUNT][2];

#endif
