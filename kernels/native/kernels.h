/*
 * What module.c and the kernels agree on: one argument record per kernel, filled field by field from Python integers.
 *
 * Every field is 8 bytes wide, in the order in which its launcher passes it. Strides count elements. Element (t, b) of a
 * sequence lies at t*stride_t + b*stride_b, or, when packed, at (offsets[t] + b)*stride_b; the last stride is 1.
 *
 * X_bytes is the size of the buffer at address X: what the sizes and strides say of X must fit it, or bounds.c refuses
 * the call before a kernel sees it. Addresses and these sizes have to be true; nothing else has to.
 */
#ifndef CHARRNN_KERNELS_H
#define CHARRNN_KERNELS_H

#include <stdint.h>

enum { STATUS_OK = 0, STATUS_NO_MEMORY = 1, STATUS_BAD_TOKEN = 2 };

/* More threads than this are refused. */
enum { MAX_THREADS = 1024 };

enum { ISA_BASELINE, ISA_AVX2, ISA_AVX512, ISA_COUNT };

typedef struct {
    int64_t T, B, H, D, V;      /* V: rows of the table, 0 for dense input */
    int64_t threads;            /* upper bound, the caller included */
    int64_t columns;            /* 0: rows are split over the threads; 1: columns are */
    int64_t relu;               /* 0: tanh */
    int64_t reverse[2];         /* does direction d walk time backwards */
    const int64_t *batch_sizes; /* (T), rows active at each step, or NULL: always B */
    int64_t batch_sizes_bytes;
    const int64_t *offsets;     /* (T), exclusive sums of batch_sizes, or NULL */
    int64_t offsets_bytes;
    const int64_t *tokens;      /* (T, B) or (N), or NULL: dense input */
    int64_t tokens_bytes;
    int64_t tokens_t, tokens_b;
    const void *weight[2]; /* (H, H), weight_hh of direction d */
    int64_t weight_bytes[2];
    int64_t weight_row[2];
    const void *h0; /* (D, B, H) or NULL: zeros */
    int64_t h0_bytes;
    int64_t h0_d, h0_b;
    void *out; /* (T, B, D*H) or (N, D*H); read by backward */
    int64_t out_bytes;
    int64_t out_t, out_b;
} elman_shape;

typedef struct {
    elman_shape s;
    const void *x; /* like out; with tokens the table (V, D*H), row stride x_b */
    int64_t x_bytes;
    int64_t x_t, x_b;
    void *h_n; /* (D, B, H), contiguous */
    int64_t h_n_bytes;
} elman_forward_args;

typedef struct {
    elman_shape s;
    int64_t fused;        /* 1: weight and table gradients while the recurrence runs, rows split */
    const void *grad_out; /* like out, or NULL */
    int64_t grad_out_bytes;
    int64_t grad_out_t, grad_out_b;
    const void *grad_h_n; /* (D, B, H), or NULL */
    int64_t grad_h_n_bytes;
    int64_t grad_h_n_d, grad_h_n_b;
    void *grad_x; /* like out; NULL where only the table's gradient is wanted and fused is 1 */
    int64_t grad_x_bytes;
    int64_t grad_x_t, grad_x_b;
    void *grad_table;     /* (V, D*H), contiguous, or NULL */
    int64_t grad_table_bytes;
    void *grad_weight[2]; /* (H, H), contiguous, or NULL */
    int64_t grad_weight_bytes[2];
    void *grad_h0;        /* (D, B, H), contiguous */
    int64_t grad_h0_bytes;
} elman_backward_args;

typedef struct {
    int64_t N, H, V, threads;
    int64_t ignore_index;
    int64_t mean;       /* 1: every row's gradient is divided by the number of rows that count */
    const void *hidden; /* (N, H) */
    int64_t hidden_bytes;
    int64_t hidden_row;
    const void *weight; /* (V, H) */
    int64_t weight_bytes;
    int64_t weight_row;
    const void *bias;      /* (V) or NULL */
    int64_t bias_bytes;
    const int64_t *target; /* (N), contiguous */
    int64_t target_bytes;
    const void *grad_loss; /* (N), factor of each row's gradient, or NULL: 1 */
    int64_t grad_loss_bytes;
    double *loss;          /* (1): out, sum or mean over the rows that count */
    int64_t loss_bytes;
    void *row_loss;        /* (N) or NULL: out, 0 where ignored */
    int64_t row_loss_bytes;
    void *grad_hidden;     /* (N, H), contiguous, or NULL: no gradients */
    int64_t grad_hidden_bytes;
    void *grad_weight;     /* (V, H), contiguous, or NULL */
    int64_t grad_weight_bytes;
    void *grad_bias;       /* (V) or NULL */
    int64_t grad_bias_bytes;
} linear_cross_entropy_args;

typedef struct {
    int64_t T, B, H, V;
    int64_t threads, relu;
    int64_t ignore_index;
    const int64_t *tokens; /* (T, B) */
    int64_t tokens_bytes;
    int64_t tokens_t, tokens_b;
    const int64_t *targets; /* (T, B) */
    int64_t targets_bytes;
    int64_t targets_t, targets_b;
    const void *table; /* (V, H) */
    int64_t table_bytes;
    int64_t table_row;
    const void *weight; /* (H, H), weight_hh */
    int64_t weight_bytes;
    int64_t weight_row;
    const void *head; /* (V, H) */
    int64_t head_bytes;
    int64_t head_row;
    const void *bias; /* (V) of the head, or NULL */
    int64_t bias_bytes;
    const void *h0;   /* (B, H) or NULL: zeros */
    int64_t h0_bytes;
    int64_t h0_row;
    double *loss;      /* (1): out, mean over the targets that count */
    int64_t loss_bytes;
    void *h_n;         /* (B, H), contiguous; as are the gradients */
    int64_t h_n_bytes;
    void *grad_table;  /* (V, H) */
    int64_t grad_table_bytes;
    void *grad_weight; /* (H, H) */
    int64_t grad_weight_bytes;
    void *grad_head;   /* (V, H) */
    int64_t grad_head_bytes;
    void *grad_bias;   /* (V) or NULL */
    int64_t grad_bias_bytes;
    void *grad_h0;     /* (B, H) */
    int64_t grad_h0_bytes;
} language_model_args;

typedef struct {
    int64_t B, P, N, H, V, L; /* P: prompt length, N: ids to append */
    int64_t threads, relu;
    const int64_t *prompt;        /* (B, P), contiguous */
    int64_t prompt_bytes;
    const void *table;            /* (V, H), contiguous: row v = W_ih[:, v] + b_ih + b_hh of layer 0 */
    int64_t table_bytes;
    const void *const *weight_ih; /* [L] (H, H), contiguous; entry 0 unused. Behind the L addresses L sizes in bytes; */
    int64_t weight_ih_bytes;
    const void *const *weight_hh; /* [L] (H, H), contiguous, and sizes; */
    int64_t weight_hh_bytes;
    const void *const *bias;      /* [L] (H), b_ih + b_hh; entry 0 unused, and sizes */
    int64_t bias_bytes;
    const void *head_weight;      /* (V, H), contiguous */
    int64_t head_weight_bytes;
    const void *head_bias;        /* (V) or NULL */
    int64_t head_bias_bytes;
    const double *uniforms;       /* (B, N) in [0, 1), contiguous, or NULL: greedy */
    int64_t uniforms_bytes;
    const double *sharpness;      /* (1): alpha / temperature */
    int64_t sharpness_bytes;
    int64_t top_k;                /* 0: all */
    void *state;                  /* (L, B, H), contiguous: in and out */
    int64_t state_bytes;
    int64_t *ids;                 /* (B, N), contiguous: out */
    int64_t ids_bytes;
} generate_args;

typedef struct {
    int64_t count, threads;
    void *const *grads;     /* [count] contiguous tensors */
    int64_t grads_bytes;
    const int64_t *sizes;   /* [count], in elements */
    int64_t sizes_bytes;
    const double *max_norm; /* (1) */
    int64_t max_norm_bytes;
    double *norm;           /* (1): out */
    int64_t norm_bytes;
} clip_args;

typedef int (*kernel)(const void *args);

/* What does not fit, in a word or two, or NULL. item: bytes of a floating-point number. bounds.c */
const char *elman_forward_refused(const void *args, int64_t item);
const char *elman_backward_refused(const void *args, int64_t item);
const char *linear_cross_entropy_refused(const void *args, int64_t item);
const char *language_model_refused(const void *args, int64_t item);
const char *generate_refused(const void *args, int64_t item);
const char *clip_refused(const void *args, int64_t item);

/* [instruction set][0: float, 1: double]; NULL where this build or this architecture has none. */
extern const kernel elman_forward_kernels[ISA_COUNT][2];
extern const kernel elman_backward_kernels[ISA_COUNT][2];
extern const kernel linear_cross_entropy_kernels[ISA_COUNT][2];
extern const kernel language_model_kernels[ISA_COUNT][2];
extern const kernel generate_kernels[ISA_COUNT][2];
extern const kernel clip_kernels[ISA_COUNT][2];

#endif
