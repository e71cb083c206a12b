"""Rows of a matrix added up by an id, in an order that is always the same.

torch's own gradient of an embedding adds by atomics on a GPU where few ids have many rows (from 2.11 on, unless
torch.use_deterministic_algorithms asks otherwise), and a character model's few ids always have many.
"""

import torch
from torch import Tensor

MOST_IDS = 4096  # beyond, torch's own, which then sorts
MOST_ENTRIES = 1 << 22  # of the one-hot rows that are made at a time


def sum_by_id(rows: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    """(num_ids, C): row i is the sum of the rows whose id is i.

    rows: (..., C) floating point. ids: (...) int64 or int32; ids outside 0..num_ids-1 count nowhere. Differentiable in
    rows. On a GPU by products with one-hot rows: bitwise repeatable, in the precision that torch's switch allows
    products, 16-bit floats summed in float32; a row that is not finite reaches all ids.
    """
    if rows.device.type != "cuda" or num_ids > MOST_IDS:
        outside = (ids < 0) | (ids >= num_ids)
        ids = torch.where(outside, num_ids, ids)
        return torch.ops.aten.embedding_dense_backward(rows, ids, num_ids + 1, -1, False)[:num_ids]
    return _by_products(rows, ids, num_ids)


def _by_products(rows: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    rows, ids = rows.reshape(-1, rows.shape[-1]), ids.reshape(-1, 1)
    at_a_time = max(1, MOST_ENTRIES // max(1, num_ids))
    known = torch.arange(num_ids, dtype=torch.int64, device=ids.device)
    parts = [
        (some_ids == known).to(rows.dtype).t() @ some_rows
        for some_ids, some_rows in zip(ids.split(at_a_time), rows.split(at_a_time), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows.new_zeros(num_ids, rows.shape[1], dtype=wide)
    for part in parts:
        total = total + part
    return total.to(rows.dtype)
