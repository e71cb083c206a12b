"""The C extension: whether it is there, and which instruction set it is told to use."""

import os
from importlib import import_module
from typing import Any

import torch

_PACKAGE = __name__.rpartition(".")[0]

missing: str | None = None
try:
    extension: Any = import_module(f"{_PACKAGE}._native")
except ModuleNotFoundError:
    extension, missing = None, "the C extension is not built: install with GCC or Clang at hand"
except ImportError as error:
    extension, missing = None, f"the C extension cannot be loaded: {error}"

ISAS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_selected: int | None = None


def available() -> str | None:
    """None if the kernels can run here, else one clause saying why not."""
    return missing


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline".

    Raises RuntimeError if CHARRNN_ISA names one that this machine or this build lacks.
    """
    return ISAS[isa_number()]


def set_isa(name: str | None) -> None:
    """Use this instruction set from now on; None: $CHARRNN_ISA, or else the best that the machine has.

    Raises RuntimeError if this machine or this build lacks it.
    """
    global _selected
    if extension is None:
        raise RuntimeError(f"the native backend cannot run: {missing}")
    names = extension.isas()
    name = name or os.environ.get("CHARRNN_ISA") or names[-1]
    if name not in names:
        raise RuntimeError(f"CHARRNN_ISA: this machine has {', '.join(names)}, got {name!r}")
    _selected = ISAS.index(name)


def isa_number() -> int:
    """C's number for the instruction set in use."""
    if _selected is None:
        set_isa(None)
    assert _selected is not None
    return _selected


def peak_scratch() -> int:
    """The most bytes of working memory, beyond all tensors, that the kernels held at once since the last such call."""
    return 0 if extension is None else extension.peak_scratch()
