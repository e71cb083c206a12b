/*
 * Compiles the file named by TARGET_FILE once per instruction set and float type, with the compiler told to generate
 * code for that set inside those functions alone: the program chooses when it runs (module.c), so nothing here is ever
 * executed on a machine that lacks it. Inside, NAME(f) is f_avx512_f32 and the like. KERNEL_TABLE(f) is the resulting
 * dispatch table.
 */
#ifndef TARGET_FILE
#error "define TARGET_FILE before including targets.h"
#endif

#define JOIN_(f, isa, type) f##_##isa##_##type
#define JOIN(f, isa, type) JOIN_(f, isa, type)
#define NAME(f) JOIN(f, ISA, TYPE)

#if defined(__x86_64__)
#include <immintrin.h>
#define KERNEL_TABLE(f)                                                                                                \
    {                                                                                                                  \
        {f##_baseline_f32, f##_baseline_f64}, {f##_avx2_f32, f##_avx2_f64}, { f##_avx512_f32, f##_avx512_f64 }         \
    }
#else
#define KERNEL_TABLE(f) {{f##_baseline_f32, f##_baseline_f64}, {0, 0}, {0, 0}}
#endif

#define ISA baseline
#define ISA_BYTES 16
#include "float_types.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define ISA_BYTES 32
#include "float_types.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define ISA avx512
#define ISA_BYTES 64
#include "float_types.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
