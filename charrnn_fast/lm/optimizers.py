"""Optimizers by name, of torch or of the reference, and what a Trainer asks of one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.lm.language_model import LanguageModel

NAMES = ("sgd", "adam", "adamw", "rmsprop")


def make_optimizer(
    model: LanguageModel,
    name: str,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    capturable: bool = False,
) -> Any:
    """An optimizer over all parameters of the model that require gradients.

    Args:
        name: "sgd", "adam", "adamw" or "rmsprop"; the reference model has its own of the first two, without momentum.
        lr: learning rate. momentum: of "sgd" and "rmsprop". weight_decay: torch's.
        capturable: on a GPU, whether its steps are to be captured as a CUDA graph.

    Raises ValueError for other names, and numbers that are out of range or not for this optimizer.
    """
    own = model.own_optimizers
    if name not in (own or NAMES):
        names = ", ".join(repr(n) for n in (own or NAMES))
        raise ValueError(f"optimizer must be {names} or a torch.optim.Optimizer, got {name!r}")
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    if momentum and name not in ("sgd", "rmsprop"):
        raise ValueError(f"momentum {momentum} is for sgd and rmsprop: {name} has its own")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter that requires a gradient: nothing would be trained")
    if own:
        if momentum or weight_decay:
            raise ValueError(f"the {model.form}'s optimizers have neither momentum nor weight decay")
        return own[name](parameters, lr)
    options: dict[str, Any] = {"weight_decay": weight_decay}
    if name in ("sgd", "rmsprop"):
        options["momentum"] = momentum
    elif parameters[0].device.type == "cuda":
        # One launch instead of some fifteen, with the step count on the device; captured or not, the same numbers.
        options |= {"fused": True, "capturable": capturable}
    if name == "rmsprop" and parameters[0].device.type == "cuda":
        options["capturable"] = capturable
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    kinds |= {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    return kinds[name](parameters, lr, **options)


def held_by(optimizer: Any) -> list[Tensor]:
    """The parameters that an optimizer updates; the reference's have one group of them."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return list(optimizer.params)
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_optimizer(model: LanguageModel, optimizer: Any) -> None:
    """Raise unless the optimizer is one for this model: of a kind that its form knows, over its parameters."""
    own_kinds = model.own_optimizers
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the loss several times a step, which this trainer does not")
    if not isinstance(optimizer, torch.optim.Optimizer) and type(optimizer) not in own_kinds.values():
        kinds = "a torch.optim.Optimizer" + (f" or a {model.form} optimizer" if own_kinds else "")
        names = ", ".join(repr(n) for n in (own_kinds or NAMES))
        raise TypeError(f"optimizer must be {names} or {kinds} for this model, got {type(optimizer)}")
    held, own = held_by(optimizer), {id(p) for p in model.parameters()}
    foreign = sum(id(p) not in own for p in held)
    if foreign or not held:
        raise ValueError(
            f"the optimizer holds {len(held)} parameters, of which {foreign} are not the model's: make it of "
            "model.parameters(), after the last change to the model's modules"
        )


def learning_rates(optimizer: Any) -> list[float]:
    """Of each group of parameters; the reference's optimizers have one."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return [float(optimizer.lr)]
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rates(optimizer: torch.optim.Optimizer, lrs: Sequence[float]) -> None:
    """One for each group; where it is a tensor, as captured steps have it, in place."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def for_this_device(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimiser's state_dict with the options of `optimizer` for how to compute a step, which are its device's own.

    Where they put the step counts on the device, torch moves them there; elsewhere they belong on the host. A learning
    rate that is a tensor, as captured steps have it, becomes a number, or one on the optimizer's device.
    """
    own = optimizer.param_groups
    if len(own) != len(state["param_groups"]):
        return state  # torch refuses it
    names = [name for name in ("foreach", "fused", "capturable") if name in optimizer.defaults]
    groups = [
        written | {name: group[name] for name in names} | {"lr": _lr_like(written["lr"], group["lr"])}
        for written, group in zip(state["param_groups"], own, strict=True)
    ]
    values = {
        i: {name: value.cpu() if name == "step" and isinstance(value, Tensor) else value for name, value in of.items()}
        for i, of in state["state"].items()
    }
    return state | {"param_groups": groups, "state": values}


def _lr_like(lr: float | Tensor, own: float | Tensor) -> float | Tensor:
    return torch.full_like(own, float(lr)) if isinstance(own, Tensor) else float(lr)
