"""The registered operators in torch's own, so that an exported program runs where this library is not installed.

    program = torch.export.export(model, (x,), dynamic_shapes=...)
    program = program.run_decompositions(decompositions())
    torch.export.save(program, "model.pt2")        # torch.export.load needs torch alone

The time loop becomes torch's operator `scan`, so the program keeps any number of steps and sequences. It runs step by
step, at the speed of torch's operators.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from charrnn_fast.reference.elman import ACTIVATIONS

from .elman import ElmanLayer
from .elman_torch import of_direction, projected
from .linear_cross_entropy import LinearCrossEntropy


def decompositions() -> dict[Any, Callable[..., Any]]:
    """torch.export.default_decompositions() and this library's forward operators, for ExportedProgram's
    run_decompositions.

    Packed input has no decomposition, as its rows' steps are data and not shapes: a RuntimeError says so.
    """
    table: Any = torch.export.default_decompositions()
    table[torch.ops.charrnn_fast.elman_layer.default] = _elman_layer
    table[torch.ops.charrnn_fast.linear_cross_entropy.default] = _linear_cross_entropy_rows
    return table


def _elman_layer(*arguments: Any) -> tuple[Tensor, Tensor]:
    """input (T, B, I), or ids (T, B) -> output (T, B, D*H), h_n (D, B, H)."""
    from torch._higher_order_ops.scan import scan

    layer = ElmanLayer(*arguments)
    if layer.batch_sizes is not None:
        raise RuntimeError("an Elman layer of packed input has no decomposition: export the model on padded input")
    activation = ACTIVATIONS[layer.nonlinearity]
    outputs, states = [], []
    for direction, backwards in enumerate(layer.reverse):
        weight_ih, weight_hh, bias = of_direction(layer.weights, direction, len(layer.reverse))
        x = projected(layer.input, weight_ih, bias)
        state = x.new_zeros(x.shape[1:]) if layer.h0 is None else layer.h0[direction].clone()
        transposed = weight_hh.t().contiguous()

        def step(state: Tensor, x_t: Tensor, transposed: Tensor = transposed) -> tuple[Tensor, Tensor]:
            state = activation(torch.addmm(x_t, state, transposed))
            return state, state.clone()  # scan hands out no tensor twice

        last, output = scan(step, state, x, dim=0, reverse=backwards)
        outputs.append(output)
        states.append(last)
    return torch.cat(outputs, dim=-1), torch.stack(states)


def _linear_cross_entropy_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, each row's log-sum-exp (N,) and the number of rows that count (), as its kernels have them."""
    own = LinearCrossEntropy(*arguments)
    dtype = torch.promote_types(own.input.dtype, torch.float32)
    logits = F.linear(own.input, own.weight, own.bias).to(dtype)
    loss = F.cross_entropy(logits, own.target, reduction=own.reduction, ignore_index=own.ignore_index)
    return loss.to(own.loss_dtype), logits.logsumexp(-1), (own.target != own.ignore_index).sum().to(dtype)
