"""What the launchers of a character model take: parameters, a batch of ids, an optimizer's state. No Triton here."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """A model's parameters, or what belongs to each of them: contiguous float32; None for one that there is not."""

    weight_ih: Tensor  # (H, V)
    weight_hh: Tensor  # (H, H)
    head_weight: Tensor  # (V, H)
    bias_ih: Tensor | None = None  # (H,)
    bias_hh: Tensor | None = None  # (H,)
    head_bias: Tensor | None = None  # (V,)


class Batch(NamedTuple):
    """Where the ids of B rows of T steps are: row b, step t at starts[b] + t stride_t, or b stride_b + t stride_t.

    Strides are in elements; ids are of an integer type. Which places there are is for the caller to know.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None  # (B,) int64
    steps: int  # T
    rows: int  # B
    strides: tuple[int, int, int, int]  # of tokens along B and T, of targets


def windows(X: Tensor, Y: Tensor) -> Batch:
    """The batch of ids X and their successors Y, each (B, T) of an integer type, any strides; nothing is copied."""
    if X.dim() != 2 or X.shape != Y.shape:
        raise ValueError(f"targets must be {tuple(X.shape)} as tokens are, (B, T), got {tuple(Y.shape)}")
    rows, steps = X.shape
    (tokens_b, tokens_t), (targets_b, targets_t) = X.stride(), Y.stride()
    return Batch(X, Y, None, steps, rows, (tokens_b, tokens_t, targets_b, targets_t))


def positions(corpus: Tensor, starts: Tensor, num_steps: int) -> Batch:
    """The batch of ids corpus[s + t] and their successors corpus[s + t + 1], t below num_steps, for each s of starts.

    corpus: (N,) of an integer type; starts: (B,) int64 on its device, contiguous, each in 0..N-num_steps-1, which the
    caller sees to: nothing looks at them. num_steps: T.
    """
    if corpus.dim() != 1 or starts.dim() != 1 or len(corpus) <= num_steps:
        got = f"{tuple(corpus.shape)}, {tuple(starts.shape)}"
        raise ValueError(f"corpus and starts: expected more than {num_steps} ids (N,) and places (B,), got {got}")
    (stride,) = corpus.stride()
    return Batch(corpus, corpus[1:], starts, num_steps, len(starts), (0, stride, 0, stride))


class Sums(NamedTuple):
    """What the rows of a batch leave, by program: see language_model_kernels.py."""

    partial: Tensor | None  # (programs, 2 V H + H H + H + V), for the gradients
    losses: Tensor  # (2, programs)


class Moments(NamedTuple):
    """State of Adam's for one parameter."""

    first: Tensor  # like the parameter
    second: Tensor
    steps: Tensor  # () float32


class Adam(NamedTuple):
    """moments: in the order of Weights, None for a parameter that there is not or that is not trained."""

    moments: Sequence[Moments | None]
    beta1: float
    beta2: float
    eps: float
