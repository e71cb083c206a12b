"""Argument types and options that several commands share."""

import argparse
import math
import os

import torch

from charrnn_fast.errors import InputError
from charrnn_fast.lm import distributed
from charrnn_fast.lm.keeping import Every

SEED = (-(2**63), 2**63 - 1)  # what a torch.Generator takes, with room for the epochs that are added
WIDTH = 2**20  # of a layer or an embedding: one matrix of this size has 4 TB
LAYERS = 1024
BATCH = 2**24  # sequences in a batch, characters in a window
COUNT = 10**9  # of epochs
CHARACTERS = 10**7  # to decode in one go


def at_least(low: int, high: int = COUNT):
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, got {value}")
        return value

    parse.__name__ = "whole number"
    return parse


def positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def between(low: float, high: float, *, first: bool = True, last: bool = True):
    """A number in an interval; first, last: whether its ends belong to it."""

    def parse(text: str) -> float:
        value = float(text)
        if not (low < value < high or (first and value == low) or (last and value == high)) or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"must be {'at least' if first else 'above'} {low:g} and {'at most' if last else 'below'} {high:g}, "
                f"got {text}"
            )
        return value

    parse.__name__ = "number"
    return parse


def or_none(kind):
    """A value of `kind`, or the word none."""

    def parse(text: str):
        return text if text == "none" else kind(text)

    parse.__name__ = getattr(kind, "__name__", "value")
    return parse


def shares(text: str) -> tuple[float, ...]:
    """Two or three shares above 0, at most 1 together."""
    values = tuple(float(part) for part in text.split(","))
    if not 2 <= len(values) <= 3 or not all(value > 0 for value in values) or not sum(values) <= 1 + 1e-9:
        raise argparse.ArgumentTypeError(f"must be two or three shares above 0, together at most 1, got {text}")
    return values


def every(text: str) -> Every:
    """A number of steps, or with a unit (s, m, h) a time."""
    units = {"s": 1, "m": 60, "h": 3600}
    if text[-1:] in units:
        return Every(positive(text[:-1]) * units[text[-1]], seconds=True)
    return Every(at_least(1)(text))


every.__name__ = "number of steps or time"


def clip_norm(text: str) -> float | str:
    return text if text == "none" else positive(text)


def embedding_kind(text: str) -> str | int:
    return text if text == "onehot" else at_least(1, WIDTH)(text)


def find_device(name: str) -> torch.device:
    """The device of a name, on which a number was computed; cuda is a GPU for each of several processes. InputError if
    that cannot be.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and distributed.launched() > 1:
            device = torch.device("cuda", distributed.local_rank())
        if float(torch.ones(1, dtype=torch.float32, device=device) + 1) != 2:
            raise RuntimeError("it does not compute")
    except Exception as error:  # each device's plug-in has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    if device.type == "cuda" and distributed.launched() > 1:
        torch.cuda.set_device(device)
    return device


def require_memory(numbers: int, what: str, device: torch.device) -> None:
    """InputError if so many float32 numbers are more than the memory of this machine or GPU."""
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if 4 * numbers > available:
        raise InputError(f"{what} need {4 * numbers:,} bytes: {device} has {available:,}")
