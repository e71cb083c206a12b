"""Launchers of a one-layer character model's loss, gradients and training step (the kernels files have the algorithm).

    h_t = f(W_ih[:, token_t] + b_ih + b_hh + h_{t-1} W_hh^T)      loss = mean of -log softmax(h_t W_q^T + b_q)[target_t]

T time steps, B batch, H hidden units, V vocabulary. The loss and all gradients are two launches, a training step with
clipping and SGD or Adam three; nothing else runs on the device, and nothing waits for it. Everything is bitwise
repeatable on a device. Nothing here validates token ids: an id outside 0..V-1 counts as a zero row and adds to no
gradient, a target outside makes the loss NaN.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .language_model_forms import SUM_ELEMENTS, SUM_PROGRAMS, SUM_WARPS, UPDATE_ELEMENTS, UPDATE_WARPS, Tile, find_tile
from .language_model_kernels import language_model_kernel
from .language_model_types import Adam, Batch, Sums, Weights
from .language_model_update_kernels import language_model_sums_kernel, language_model_update_kernel
from .launch import INTERPRETED, device_limits, processors_of, start, target_of
from .targets import launch_options

# In the interpreter few, so that small batches have programs of several rows, and large, for each takes its time.
MOST_PROGRAMS = 3
BLOCK_P, BLOCK = (4, 512) if INTERPRETED else (SUM_PROGRAMS, SUM_ELEMENTS)


@functools.cache
def language_model_limits(
    hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> str | None:
    """None if the kernels run a model of these sizes on this device, else one clause that says why not."""
    device = torch.device(device)
    if dtype != torch.float32:
        return f"no kernel for {dtype}"
    if (why := device_limits(dtype, device)) is not None:
        return why
    target, shared_kb = target_of(device)
    tile = find_tile(hidden_size, vocab, target)
    if tile is None:
        return f"hidden size {hidden_size} and vocabulary {vocab} are more than one program can hold"
    needed = tile.head_form(hidden_size, vocab).shared_kb
    if needed > shared_kb:
        return f"a program needs {needed:.0f} KB of shared memory and has {shared_kb:.0f}"
    return None


def language_model_loss(
    weights: Weights,
    batch: Batch,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    ignore_index: int = -100,
    h_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean loss in nats, (), over the targets other than ignore_index, and the last states (B, H): two launches.

    weights: on one device; batch: ids on it. h0: (B, H) contiguous, None for zeros. h_n: where the last states go,
    contiguous, may be h0; by default a new tensor. Raises RuntimeError past language_model_limits.
    """
    call = _Call(weights, batch, nonlinearity)
    sums, h_n = call.rows(h0, h_n, ignore_index, grads=False)
    return call.total(sums), h_n


def language_model_forward(
    weights: Weights,
    batch: Batch,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Sums]:
    """As `language_model_loss`, and what `language_model_backward` makes the gradients of: two launches."""
    call = _Call(weights, batch, nonlinearity)
    sums, h_n = call.rows(h0, None, ignore_index, grads=True)
    return call.total(sums), h_n, sums


def language_model_backward(grad_loss: Tensor | None, weights: Weights, sums: Sums) -> Weights:
    """The gradients of the loss times grad_loss, a scalar on the device, 1 if None; each in memory of its own, those of
    the two biases too. One launch.
    """
    return _Sizes(weights).gradients(sums, grad_loss)[1]


def language_model_step(
    weights: Weights,
    batch: Batch,
    h0: Tensor | None = None,
    *,
    trained: Sequence[bool],
    lr: float | Tensor,
    adam: Adam | None = None,
    max_norm: float | None = None,
    nonlinearity: str = "tanh",
    ignore_index: int = -100,
    h_n: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One training step: gradients, clipped by their norm together, and the update in place. Three launches.

    Args as in `language_model_loss`, and trained: in the order of Weights, which of them are updated and count in the
    norm; lr: a number, or a scalar tensor on the device, which is read when the kernel runs; adam: its state, None for
    SGD; max_norm: None for no clipping; norm: () float32, where the norm goes, by default a new tensor.

    Returns the loss () and the last states (B, H), both of the weights before the step, and the norm () before
    clipping. Adam's numbers of steps become one more.
    """
    call = _Call(weights, batch, nonlinearity)
    moments = (None,) * 6 if adam is None else adam.moments
    steps = [None if m is None or not t else m.steps for m, t in zip(moments, trained, strict=True)]
    sums, h_n = call.rows(h0, h_n, ignore_index, grads=True)
    loss = call.empty()
    squares, grads = call.gradients(sums, None, loss, trained, steps)
    norm = call.empty() if norm is None else norm
    call.update(grads, squares, norm, trained, lr, adam, max_norm)
    return loss, h_n, norm


class _Sizes:
    """A model's sizes, and the launches that depend on nothing else."""

    def __init__(self, weights: Weights):
        self.weights, self.device = weights, weights.weight_ih.device
        self.H, self.V = weights.weight_ih.shape
        why = language_model_limits(self.H, self.V, weights.weight_ih.dtype, self.device)
        if why is not None:
            raise RuntimeError(f"language_model: {why}")
        self.target = target_of(self.device)[0]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def total(self, sums: Sums) -> Tensor:
        """The mean loss."""
        loss = self.empty()
        self.gradients(Sums(None, sums.losses), None, loss)
        return loss

    def gradients(
        self,
        sums: Sums,
        upstream: Tensor | None,
        loss: Tensor | None = None,
        trained: Sequence[bool] = (False,) * 6,
        steps: Sequence[Tensor | None] = (None,) * 6,
    ) -> tuple[Tensor | None, Weights]:
        """Gradients, if there are sums for them, and before them, with anything trained, the sums of squares that make
        the norm. steps: become one more. loss: where the mean loss goes.
        """
        H, V, partial = self.H, self.V, sums.partial
        grads: list[Any] = [None if w is None or partial is None else torch.empty_like(w) for w in self.weights]
        blocks = 1 if partial is None else sum(-(-numel // BLOCK) for numel in (V * H, H * H, V * H, H, V))
        squares, bits = None, 0
        if any(trained):
            squares, bits = self.empty(blocks), sum(bool(t) << i for i, t in enumerate(trained))
        start(
            language_model_sums_kernel,
            (blocks, 1, 1),
            self.device,
            *sums,
            upstream,
            loss,
            squares,
            *grads,
            *steps,
            sums.losses.shape[1],
            H=H,
            V=V,
            TRAINED=bits,
            BLOCK_P=BLOCK_P,
            BLOCK=BLOCK,
            **launch_options(SUM_WARPS, self.target),
        )
        return squares, Weights(*grads)

    def update(
        self,
        grads: Weights,
        squares: Tensor | None,
        norm: Tensor,
        trained: Sequence[bool],
        lr: float | Tensor,
        adam: Adam | None,
        max_norm: float | None,
    ) -> None:
        H, V = self.H, self.V
        numels = (V * H, H * H, V * H, H, H, V)
        moments = (
            (None,) * 6 if adam is None else [m if t else None for m, t in zip(adam.moments, trained, strict=True)]
        )
        numbers = [0.0 if max_norm is None else max_norm, 0.0 if isinstance(lr, Tensor) else lr]
        numbers += [0.9, 0.999, 1e-8] if adam is None else [adam.beta1, adam.beta2, adam.eps]
        start(
            language_model_update_kernel,
            (sum(-(-numel // UPDATE_ELEMENTS) for numel in numels), 1, 1),
            self.device,
            squares,
            norm,
            lr if isinstance(lr, Tensor) else None,
            *grads,
            *[p if t else None for p, t in zip(self.weights, trained, strict=True)],
            *[None if m is None else m.first for m in moments],
            *[None if m is None else m.second for m in moments],
            *[None if m is None else m.steps for m in moments],
            0 if squares is None else len(squares),
            *[half for number in numbers for half in halves_of(number)],
            NUMELS=numels,
            CLIP=max_norm is not None,
            ADAM=adam is not None,
            BLOCK=UPDATE_ELEMENTS,
            **launch_options(UPDATE_WARPS, self.target),
        )


class _Call(_Sizes):
    """A model on a batch."""

    def __init__(self, weights: Weights, batch: Batch, nonlinearity: str):
        super().__init__(weights)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        self.batch, self.tanh = batch, nonlinearity == "tanh"
        tile = _tile_of(self.H, self.V, self.target)
        most = MOST_PROGRAMS if INTERPRETED else processors_of(self.device) * tile.programs_per_core
        self.programs = min(batch.rows, most)

    def rows(self, h0: Tensor | None, h_n: Tensor | None, ignore_index: int, grads: bool) -> tuple[Sums, Tensor]:
        """Each row's loss, last state and, with grads, sums for the gradients."""
        w, batch, H, V = self.weights, self.batch, self.H, self.V
        h_n = self.empty(batch.rows, H) if h_n is None else h_n
        partial = self.empty(self.programs, 2 * V * H + H * H + H + V) if grads else None
        losses = self.empty(2, self.programs)
        start(
            language_model_kernel,
            (self.programs, 1, 1),
            self.device,
            batch.tokens,
            batch.targets,
            batch.starts,
            w.weight_ih,
            w.weight_hh,
            w.bias_ih,
            w.bias_hh,
            w.head_weight,
            w.head_bias,
            h0,
            h_n,
            self.empty(self.programs, 2 if grads else 1, batch.steps, H),
            partial,
            losses,
            batch.steps,
            batch.rows,
            ignore_index,
            *batch.strides,
            **_constants(H, V, self.target, self.tanh, grads),
        )
        return Sums(partial, losses), h_n


@functools.cache
def _tile_of(hidden_size: int, vocab: int, target: str) -> Tile:
    tile = find_tile(hidden_size, vocab, target)
    if tile is None:
        raise RuntimeError(f"language_model: no tile for H={hidden_size}, V={vocab} on {target}")
    return tile


@functools.cache
def _constants(hidden_size: int, vocab: int, target: str, tanh: bool, grads: bool) -> dict[str, object]:
    """Meta-parameters and compiler options of language_model_kernel."""
    tile = _tile_of(hidden_size, vocab, target)
    form = tile.form(hidden_size, vocab, tanh, one_piece=INTERPRETED)
    head = tile.head_form(hidden_size, vocab, one_piece=INTERPRETED)
    return {"GRADS": grads, "F": form, "HEAD": head, **tile.launch_options(target)}


def halves_of(number: float) -> tuple[int, int]:
    """The 64 bits of a double as two signed integers, the high half first."""
    high, low = struct.unpack(">ii", struct.pack(">d", number))
    return high, low
