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

/* An address, and the size in bytes of the buffer there. */
#define BUFFER(type, name)                                                                                             \
    type *name;                                                                                                        \
    int64_t name##_bytes

typedef struct {
    int64_t T, B, H, D, V;              /* V: rows of the table, 0 for dense input */
    int64_t threads;                    /* upper bound, the caller included */
    int64_t columns;                    /* 0: rows are split over the threads; 1: columns are */
    int64_t relu;                       /* 0: tanh */
    int64_t reverse[2];                 /* does direction d walk time backwards */
    BUFFER(const int64_t, batch_sizes); /* (T), rows active at each step, or NULL: always B */
    BUFFER(const int64_t, offsets);     /* (T), exclusive sums of batch_sizes, or NULL */
    BUFFER(const int64_t, tokens);      /* (T, B) or (N), or NULL: dense input */
    int64_t tokens_t, tokens_b;
    const void *weight[2]; /* (H, H), weight_hh of direction d */
    int64_t weight_bytes[2];
    int64_t weight_row[2];
    BUFFER(const void, h0); /* (D, B, H) or NULL: zeros */
    int64_t h0_d, h0_b;
    BUFFER(void, out); /* (T, B, D*H) or (N, D*H); read by backward */
    int64_t out_t, out_b;
} elman_shape;

typedef struct {
    elman_shape s;
    BUFFER(const void, x); /* like out; with tokens the table (V, D*H), row stride x_b */
    int64_t x_t, x_b;
    BUFFER(void, h_n); /* (D, B, H), contiguous */
} elman_forward_args;

typedef struct {
    elman_shape s;
    int64_t fused;                /* 1: weight and table gradients while the recurrence runs, rows split */
    BUFFER(const void, grad_out); /* like out, or NULL */
    int64_t grad_out_t, grad_out_b;
    BUFFER(const void, grad_h_n); /* (D, B, H), or NULL */
    int64_t grad_h_n_d, grad_h_n_b;
    BUFFER(void, grad_x); /* like out; NULL where only the table's gradient is wanted and fused is 1 */
    int64_t grad_x_t, grad_x_b;
    BUFFER(void, grad_table); /* (V, D*H), contiguous, or NULL */
    void *grad_weight[2];     /* (H, H), contiguous, or NULL */
    int64_t grad_weight_bytes[2];
    BUFFER(void, grad_h0); /* (D, B, H), contiguous */
} elman_backward_args;

typedef struct {
    int64_t N, H, V, threads;
    int64_t ignore_index;
    int64_t mean;               /* 1: every row's gradient is divided by the number of rows that count */
    BUFFER(const void, hidden); /* (N, H) */
    int64_t hidden_row;
    BUFFER(const void, weight); /* (V, H) */
    int64_t weight_row;
    BUFFER(const void, bias);      /* (V) or NULL */
    BUFFER(const int64_t, target); /* (N), contiguous */
    BUFFER(const void, grad_loss); /* (N), factor of each row's gradient, or NULL: 1 */
    BUFFER(double, loss);          /* (1): out, sum or mean over the rows that count */
    BUFFER(void, row_loss);        /* (N) or NULL: out, 0 where ignored */
    BUFFER(void, grad_hidden);     /* (N, H), contiguous, or NULL: no gradients */
    BUFFER(void, grad_weight);     /* (V, H), contiguous, or NULL */
    BUFFER(void, grad_bias);       /* (V) or NULL */
} linear_cross_entropy_args;

typedef struct {
    int64_t T, B, H, V;
    int64_t threads, relu;
    int64_t ignore_index;
    BUFFER(const int64_t, tokens); /* (T, B) */
    int64_t tokens_t, tokens_b;
    BUFFER(const int64_t, targets); /* (T, B) */
    int64_t targets_t, targets_b;
    BUFFER(const void, table); /* (V, H) */
    int64_t table_row;
    BUFFER(const void, weight); /* (H, H), weight_hh */
    int64_t weight_row;
    BUFFER(const void, head); /* (V, H) */
    int64_t head_row;
    BUFFER(const void, bias); /* (V) of the head, or NULL */
    BUFFER(const void, h0);   /* (B, H) or NULL: zeros */
    int64_t h0_row;
    BUFFER(double, loss);      /* (1): out, mean over the targets that count */
    BUFFER(void, h_n);         /* (B, H), contiguous; as are the gradients */
    BUFFER(void, grad_table);  /* (V, H) */
    BUFFER(void, grad_weight); /* (H, H) */
    BUFFER(void, grad_head);   /* (V, H) */
    BUFFER(void, grad_bias);   /* (V) or NULL */
    BUFFER(void, grad_h0);     /* (B, H) */
} language_model_args;

typedef struct {
    int64_t B, P, N, H, V, L; /* P: prompt length, N: ids to append */
    int64_t threads, relu;
    BUFFER(const int64_t, prompt);        /* (B, P), contiguous */
    BUFFER(const void, table);            /* (V, H), contiguous: row v = W_ih[:, v] + b_ih + b_hh of layer 0 */
    /* Each a list of L addresses, and behind them L sizes in bytes; entry 0 of weight_ih and bias is not used. */
    BUFFER(const void *const, weight_ih); /* [L] (H, H), contiguous */
    BUFFER(const void *const, weight_hh); /* [L] (H, H), contiguous */
    BUFFER(const void *const, bias);      /* [L] (H), b_ih + b_hh */
    BUFFER(const void, head_weight);      /* (V, H), contiguous */
    BUFFER(const void, head_bias);        /* (V) or NULL */
    BUFFER(const double, uniforms);       /* (B, N) in [0, 1), contiguous, or NULL: greedy */
    BUFFER(const double, sharpness);      /* (1): alpha / temperature */
    int64_t top_k;                        /* 0: all */
    BUFFER(void, state);                  /* (L, B, H), contiguous: in and out */
    BUFFER(int64_t, ids);                 /* (B, N), contiguous: out */
} generate_args;

typedef struct {
    int64_t count, threads;
    BUFFER(void *const, grads);     /* [count] contiguous tensors */
    BUFFER(const int64_t, sizes);   /* [count], in elements */
    BUFFER(const double, max_norm); /* (1) */
    BUFFER(double, norm);           /* (1): out */
} clip_args;

typedef int (*kernel)(const void *args);

#define EACH_KERNEL(DO)                                                                                                \
    DO(elman_forward) DO(elman_backward) DO(linear_cross_entropy) DO(language_model) DO(generate) DO(clip)

/*
 * X_refused says what does not fit, in a word or two, or NULL; item: bytes of a floating-point number. bounds.c
 * X_kernels: [instruction set][0: float, 1: double]; NULL where this build or this architecture has none.
 */
#define DECLARE(name)                                                                                                  \
    const char *name##_refused(const void *args, int64_t item);                                                        \
    extern const kernel name##_kernels[ISA_COUNT][2];
EACH_KERNEL(DECLARE)
#undef DECLARE

#endif
