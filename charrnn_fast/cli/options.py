"""Argument types and options that several commands share."""

import argparse
import math

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


def at_least(low: int):
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
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
    return text if text == "onehot" else at_least(1)(text)


def find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    return device
