"""Whether the parts of a CharRNN are what its constructor built, and nobody listens to them.

Its short ways (the loss in one call, ids in place of one-hot rows, the decoder's kernel) read a part's parameters and
never call it. They are right only while a call would do what the constructor's arguments say: no hook, no other class,
no parametrization, no other sizes. Everywhere else the parts are called as the modules that they are.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from charrnn_fast.ops.elman_torch import TorchRNN
from charrnn_fast.rnn import FusedRNN

if TYPE_CHECKING:
    from charrnn_fast.lm.model import CharRNN

PARTS = ("embed", "rnn", "head")


def why_called(model: "CharRNN", parts: tuple[str, ...] = PARTS) -> str | None:
    """None where these parts' parameters stand for them, else one clause that says why they have to be called."""
    if _all_modules_are_watched():
        return "a hook listens to all modules"
    for name in parts:
        part = getattr(model, name)
        why = why_changed(model, name) or (None if part is None else _why_watched(part))
        if why is not None:
            return f"{name} {why}"
    return None


def why_changed(model: "CharRNN", name: str) -> str | None:
    """None if a part has the class, sizes and parameters that the model's arguments say, else one clause."""
    part = getattr(model, name)
    if part is None:
        return None if name == "embed" and model.embedding == "onehot" else "is missing"
    if name == "embed" and model.embedding == "onehot":
        return "was added"
    if type(part) not in _KINDS[name]:
        return f"is a {type(part).__name__}"
    for attribute, expected in _expected(model, name).items():
        if getattr(part, attribute) != expected:
            return f"has {attribute} {getattr(part, attribute)!r}"
    for parameter in _parameter_names(model, name):
        value = part._parameters.get(parameter)
        if value is None:
            return f"has no parameter {parameter}"
        if type(value) not in (nn.Parameter, Tensor):
            return f"has a {type(value).__name__} as {parameter}"
    return None


def _all_modules_are_watched() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _why_watched(part: nn.Module) -> str | None:
    """None if a call of the module is a call of its class's forward and of nothing else, else one clause."""
    if part._forward_hooks or part._forward_pre_hooks:
        return "has a forward hook"
    if part._backward_hooks or part._backward_pre_hooks:
        return "has a backward hook"
    if "forward" in part.__dict__:
        return "has a forward of its own"
    if part._compiled_call_impl is not None and not torch.compiler.is_compiling():
        return "is compiled by itself"
    return None


_KINDS: dict[str, tuple[type, ...]] = {
    "embed": (nn.Embedding,),
    "rnn": (FusedRNN, TorchRNN),
    "head": (nn.Linear,),
}


def _expected(model: "CharRNN", name: str) -> dict[str, object]:
    """The attributes that decide what a part computes."""
    width = model.vocab_size if model.embedding == "onehot" else model.embedding
    if name == "embed":
        return {"num_embeddings": model.vocab_size, "embedding_dim": width, "max_norm": None}
    if name == "head":
        return {"in_features": model.hidden_size, "out_features": model.vocab_size}
    return {
        "mode": "RNN_TANH" if model.nonlinearity == "tanh" else "RNN_RELU",
        "input_size": width,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "bias": True,
        "batch_first": True,
        "dropout": model.dropout if model.num_layers > 1 else 0.0,
        "bidirectional": False,
    }


def _parameter_names(model: "CharRNN", name: str) -> list[str]:
    if name == "embed":
        return ["weight"]
    if name == "head":
        return ["weight", "bias"]
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"{kind}_l{layer}" for layer in range(model.num_layers) for kind in kinds]
