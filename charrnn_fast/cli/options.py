"""Argument types and options that several commands share."""

import argparse
import math
import os

import torch

from charrnn_fast.errors import InputError


def add_text(p: argparse.ArgumentParser, *, required: bool, help: str) -> None:
    p.add_argument("--text", metavar="F", required=required, help=help)
    p.add_argument("--encoding", default="utf-8", metavar="C", help="the file's encoding (default: utf-8)")
    p.add_argument(
        "--errors",
        choices=("strict", "replace", "ignore"),
        default="strict",
        help="what to do with bytes that are not in it",
    )


SEED = (-(2**63), 2**63 - 1)  # what a torch.Generator takes, with room for the epochs that are added
WIDTH = 2**20  # of a layer or an embedding: one matrix of this size has 4 TB
LAYERS = 1024
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


def clip_norm(text: str) -> float:
    return math.inf if text == "none" else positive(text)


def embedding_kind(text: str) -> str | int:
    return text if text == "onehot" else at_least(1, WIDTH)(text)


def find_device(name: str) -> torch.device:
    """The device of a name, on which a number was computed. InputError if that cannot be."""
    try:
        device = torch.device(name)
        if float(torch.ones(1, dtype=torch.float32, device=device) + 1) != 2:
            raise RuntimeError("it does not compute")
    except Exception as error:  # each device's plug-in has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
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
