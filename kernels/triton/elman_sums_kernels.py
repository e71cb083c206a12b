"""Sums after the Elman kernels' backward pass, each in one order: bitwise repeatable. Imports Triton alone."""

import triton
import triton.language as tl

from .numerics import dot


@triton.jit(do_not_specialize=["num_rows", "V", "C", "chunk"])
def rows_by_token_kernel(
    grad_x_ptr,  # (num_rows, C), gradient of the pre-activations
    tokens_ptr,  # (num_rows,) int32 or int64
    partial_ptr,  # (programs along the rows, C, V) fp32 or fp64, as W_ih lies
    num_rows,
    V,
    C,  # D*H
    chunk,  # rows of a program, a multiple of BLOCK_N
    stride_grad_x,
    stride_tokens,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum of grad_x's rows by token id, over this program's rows: a product with ones and zeros, exact in each term."""
    pid = tl.program_id(0)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc_type: tl.constexpr = partial_ptr.dtype.element_ty
    sums = tl.zeros((BLOCK_V, BLOCK_C), acc_type)
    first = pid.to(tl.int64) * chunk
    for start in range(0, chunk, BLOCK_N):
        rows = first + start + tl.arange(0, BLOCK_N)
        ids = tl.load(tokens_ptr + rows * stride_tokens, mask=rows < num_rows, other=-1)
        mask = (rows < num_rows)[:, None] & (offs_c < C)[None, :]
        d = tl.load(grad_x_ptr + rows[:, None] * stride_grad_x + offs_c[None, :], mask=mask, other=0.0)
        one_hot = (offs_v[:, None] == ids[None, :]).to(tl.float32).to(d.dtype)
        sums = dot(one_hot, d, sums, PRECISION)
    offsets = (pid.to(tl.int64) * C + offs_c[None, :]) * V + offs_v[:, None]
    tl.store(partial_ptr + offsets, sums, mask=(offs_v < V)[:, None] & (offs_c < C)[None, :])


@triton.jit(do_not_specialize=["programs", "chunks", "bias_numel", "weight_numel", "table_numel"])
def sum_partials_kernel(
    partial_bias_ptr,  # (programs, D, H)
    partial_weight_ptr,  # (programs, D, H, H), or None
    partial_table_ptr,  # (chunks, D*H, V), or None
    grad_bias_ptr,
    grad_weight_ptr,
    grad_table_ptr,
    programs,
    chunks,
    bias_numel,
    weight_numel,  # 0 if there is none
    table_numel,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums of all gradients along their first dimension: a block of one of them a program."""
    block = tl.program_id(0)
    partial_ptr, out_ptr, count, numel = partial_bias_ptr, grad_bias_ptr, programs, bias_numel
    before = 0  # blocks of the gradients before this one
    start = tl.cdiv(bias_numel, BLOCK)
    if partial_weight_ptr is not None:
        if block >= start:
            partial_ptr, out_ptr, numel, before = partial_weight_ptr, grad_weight_ptr, weight_numel, start
        start += tl.cdiv(weight_numel, BLOCK)
    if partial_table_ptr is not None:
        if block >= start:
            partial_ptr, out_ptr, numel, before = partial_table_ptr, grad_table_ptr, table_numel, start
            count = chunks
    offs = (block - before) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK_P, BLOCK), partial_bias_ptr.dtype.element_ty)
    for first in range(0, count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (p < count)[:, None] & (offs < numel)[None, :]
        sums += tl.load(partial_ptr + p.to(tl.int64)[:, None] * numel + offs[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs, tl.sum(sums, axis=0).to(grad_bias_ptr.dtype.element_ty), mask=offs < numel)
