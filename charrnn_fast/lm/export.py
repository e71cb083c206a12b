"""A trained model for other programs: safetensors, a state_dict, ONNX, TorchScript.

What is exported is PyTorch's own form of the model, `Plain`: torch.nn.RNN on one-hot rows (or an embedding) and a
linear head, under CharRNN's names, so that parameters go over as they are and come back.
"""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charrnn_fast.errors import InputError
from charrnn_fast.lm.checkpoint import Checkpoint
from charrnn_fast.lm.files import write_whole

ONNX_OPSET, ONNX_IR = 17, 8  # of 2022: read by every onnxruntime since 1.12
FORMS = {"safetensors": ".safetensors", "state-dict": ".pt", "onnx": ".onnx", "torchscript": ".torchscript.pt"}


class Plain(nn.Module):
    """A CharRNN of torch.nn modules alone, in evaluation mode.

    forward: tokens (B, T) int64, state (L, B, H) -> logits (B, T, V), the state after the last token.
    """

    def __init__(self, written: Checkpoint):
        super().__init__()
        config, parameters = written.config, written.parameters
        self.vocab_size, width = config["vocab_size"], config["embedding"]
        dtype = parameters["head.weight"].dtype
        inputs = self.vocab_size if width == "onehot" else width
        shape: dict[str, Any] = {"num_layers": config["num_layers"], "nonlinearity": config["nonlinearity"]}
        self.embed = None if width == "onehot" else nn.Embedding(self.vocab_size, width, device="cpu", dtype=dtype)
        self.rnn = nn.RNN(inputs, config["hidden_size"], batch_first=True, device="cpu", dtype=dtype, **shape)
        self.head = nn.Linear(config["hidden_size"], self.vocab_size, device="cpu", dtype=dtype)
        self.load_state_dict(parameters)
        self.eval()

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        embed = self.embed
        rows = F.one_hot(tokens, self.vocab_size).to(self.head.weight.dtype) if embed is None else embed(tokens)
        outputs, state = self.rnn(rows, state)
        return self.head(outputs), state


def export(written: Checkpoint, form: str, path: Path) -> None:
    """Write a checkpoint's model to a file, in one of FORMS. Vocabulary and sizes go with it, as JSON: in the metadata
    of safetensors (config, vocab) and ONNX, as an extra file of TorchScript (meta.json), and beside the state_dict's
    tensors in nothing: that file is what torch.nn modules load.

    Raises InputError for a form whose package is not installed, and where the file cannot be written.
    """
    if form not in FORMS:
        raise InputError(f"the form must be one of {', '.join(FORMS)}, got {form}")
    content = _WRITERS[form](written)
    write_whole(path, content, "the export")


def described(written: Checkpoint) -> dict[str, str]:
    """What the parameters alone do not say, each as JSON."""
    vocab = {"symbols": written.vocab.symbols, "letters": written.vocab.letters}
    return {"format": "charrnn_fast", "config": json.dumps(written.config), "vocab": json.dumps(vocab)}


def _safetensors(written: Checkpoint) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError:
        raise _missing("safetensors", "safetensors") from None
    return save({name: value.contiguous() for name, value in written.parameters.items()}, described(written))


def _state_dict(written: Checkpoint) -> bytes:
    file = io.BytesIO()
    torch.save(dict(written.parameters), file)
    return file.getvalue()


def _torchscript(written: Checkpoint) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
        script = torch.jit.script(Plain(written))
        file = io.BytesIO()
        torch.jit.save(script, file, _extra_files={"meta.json": json.dumps(described(written))})
    return file.getvalue()


def _onnx(written: Checkpoint) -> bytes:
    """One RNN operator a layer, so that lengths and batch sizes are free; PyTorch's exporter would unroll the steps."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise _missing("onnx", "onnx") from None
    config, parameters = written.config, {name: p.numpy() for name, p in written.parameters.items()}
    V, H, L = config["vocab_size"], config["hidden_size"], config["num_layers"]
    head = parameters["head.weight"]
    element = helper.np_dtype_to_tensor_dtype(head.dtype)
    table = parameters.get("embed.weight", np.eye(V, dtype=head.dtype))  # (V, I)
    constants = {"table": table, "head": head.T, "head_bias": parameters["head.bias"], "one": np.array([1])}
    nodes = [
        helper.make_node("Transpose", ["tokens"], ["ids"], perm=[1, 0]),  # (T, B)
        helper.make_node("Gather", ["table", "ids"], ["x0"]),  # (T, B, I)
    ]
    activation = {"tanh": "Tanh", "relu": "Relu"}[config["nonlinearity"]]
    for layer in range(L):
        for kind in ("weight_ih", "weight_hh"):
            constants[f"{kind}{layer}"] = parameters[f"rnn.{kind}_l{layer}"][None]  # (1, H, ...)
        biases = [parameters[f"rnn.{kind}_l{layer}"] for kind in ("bias_ih", "bias_hh")]
        constants[f"bias{layer}"], constants[f"at{layer}"] = np.concatenate(biases)[None], np.array([layer])
        operands = [f"x{layer}", f"weight_ih{layer}", f"weight_hh{layer}", f"bias{layer}", "", f"h{layer}"]
        nodes += [
            helper.make_node("Gather", ["state", f"at{layer}"], [f"h{layer}"]),  # (1, B, H)
            helper.make_node("RNN", operands, [f"y{layer}", f"n{layer}"], hidden_size=H, activations=[activation]),
            helper.make_node("Squeeze", [f"y{layer}", "one"], [f"x{layer + 1}"]),  # (T, 1, B, H) -> (T, B, H)
        ]
    nodes += [
        helper.make_node("MatMul", [f"x{L}", "head"], ["products"]),
        helper.make_node("Add", ["products", "head_bias"], ["by_step"]),  # (T, B, V)
        helper.make_node("Transpose", ["by_step"], ["logits"], perm=[1, 0, 2]),
        helper.make_node("Concat", [f"n{layer}" for layer in range(L)], ["new_state"], axis=0),
    ]

    def value(name: str, kind: int, *shape: int | str):
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "charrnn_fast",
        [value("tokens", TensorProto.INT64, "B", "T"), value("state", element, L, "B", H)],
        [value("logits", element, "B", "T", V), value("new_state", element, L, "B", H)],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
    helper.set_model_props(model, described(written))
    return model.SerializeToString()


def _missing(form: str, package: str) -> InputError:
    return InputError(f"--to {form} needs the package {package}: pip install 'charrnn_fast[export]'")


_WRITERS: dict[str, Callable[[Checkpoint], bytes]] = {
    "safetensors": _safetensors,
    "state-dict": _state_dict,
    "onnx": _onnx,
    "torchscript": _torchscript,
}
