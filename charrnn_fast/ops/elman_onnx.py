"""An Elman layer as ONNX's own operator RNN, for torch.onnx.export(dynamo=True).

ONNX has h_t = f(x_t W^T + h_{t-1} R^T + B_W + B_R) for any number of steps and sequences:
https://onnx.ai/onnx/operators/onnx__RNN.html. The exporter would have to unroll torch.nn.RNN's steps, and knows nothing
of this library's operators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_in_onnx(
    input: Tensor, h0: Tensor | None, weights: Sequence[Tensor], nonlinearity: str, directions: int
) -> tuple[Tensor, Tensor]:
    """All D directions of one layer, while an export is under way.

    Args:
        input: (T, B, I). h0: (D, B, H) or None.
        weights: for each direction W_ih (H, I), W_hh (H, H) and, if there are biases, b_ih and b_hh (H,).

    Returns:
        output (T, B, D*H) and h_n (D, B, H).
    """
    each = len(weights) // directions
    hidden = weights[1].shape[0]
    bias = None
    if each == 4:  # (D, 2H): the input's and the state's
        bias = torch.cat([torch.stack(list(weights[2::4])), torch.stack(list(weights[3::4]))], dim=1)
    steps, batch = input.shape[:2]
    output, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        (input, torch.stack(list(weights[::each])), torch.stack(list(weights[1::each])), bias, None, h0),
        {
            "hidden_size": hidden,
            "direction": "bidirectional" if directions == 2 else "forward",
            "activations": ["Tanh" if nonlinearity == "tanh" else "Relu"] * directions,
        },
        dtypes=(input.dtype, input.dtype),
        shapes=((steps, directions, batch, hidden), (directions, batch, hidden)),
    )
    return output.transpose(1, 2).reshape(steps, batch, directions * hidden), h_n
