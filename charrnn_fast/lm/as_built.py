"""Whether the parts of a CharRNN are what its constructor built, and nobody listens to them.

Its short ways (the loss in one call, ids in place of one-hot rows, the decoder's kernel) read a part's parameters and
never call it. They are right only while a call would do what the constructor's arguments say: no hook, no other class,
no parametrization, no other sizes. Everywhere else the parts are called as the modules that they are.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from charrnn_fast.ops.elman_torch import TorchRNN
from charrnn_fast.rnn import FusedRNN

if TYPE_CHECKING:
    from charrnn_fast.lm.recurrent import RecurrentLM

PARTS = ("embed", "rnn", "head")


def why_called(model: "RecurrentLM", parts: tuple[str, ...] = PARTS) -> str | None:
    """None where these parts' parameters stand for them, else one clause that says why they have to be called."""
    hooks = torch_module
    if (
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    ):
        return "a hook listens to all modules"
    for name in parts:
        why = why_changed(model, name)
        if why is None:
            part = model._modules.get(name)
            why = None if part is None else _why_watched(part)
        if why is not None:
            return f"{name} {why}"
    return None


def why_changed(model: "RecurrentLM", name: str) -> str | None:
    """None if a part has the class, sizes and parameters that the model's arguments say, else one clause."""
    part = model._modules.get(name)
    if part is None:
        return None if name == "embed" and model.embedding == "onehot" else "is missing"
    if name == "embed" and model.embedding == "onehot":
        return "was added"
    if type(part) not in _KINDS[name]:
        return f"is a {type(part).__name__}"
    sizes = (model.vocab_size, model.hidden_size, model.num_layers, model.nonlinearity, model.embedding, model.dropout)
    attributes, parameters = _expected(name, *sizes)
    for attribute, expected in attributes:
        if getattr(part, attribute) != expected:
            return f"has {attribute} {getattr(part, attribute)!r}"
    for parameter in parameters:
        value = part._parameters.get(parameter)
        if value is None:
            return f"has no parameter {parameter}"
        if type(value) not in (nn.Parameter, Tensor):
            return f"has a {type(value).__name__} as {parameter}"
    return None


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


@functools.lru_cache(256)  # asked at every call of a model
def _expected(
    name: str,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    nonlinearity: str,
    embedding: str | int,
    dropout: float,
) -> tuple[tuple[tuple[str, object], ...], tuple[str, ...]]:
    """The attributes that decide what a part computes, with their values, and the names of its parameters."""
    width = vocab_size if embedding == "onehot" else embedding
    if name == "embed":
        return (("num_embeddings", vocab_size), ("embedding_dim", width), ("max_norm", None)), ("weight",)
    if name == "head":
        return (("in_features", hidden_size), ("out_features", vocab_size)), ("weight", "bias")
    attributes = (
        ("mode", "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU"),
        ("input_size", width),
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
        ("bias", True),
        ("batch_first", True),
        ("dropout", dropout if num_layers > 1 else 0.0),
        ("bidirectional", False),
    )
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return attributes, tuple(f"{kind}_l{layer}" for layer in range(num_layers) for kind in kinds)
