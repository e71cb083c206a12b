"""What every launcher asks of a device: which column of the tile tables it has, how it multiplies float32."""

import contextlib
import functools
from typing import Any

import torch

from . import numerics
from .targets import AMD

INTERPRETED: bool = numerics.INTERPRETED.value
# Rows of the tile tables by dtype; float32 has one for each precision of its products.
KINDS = {torch.float64: "fp64", torch.float16: "16bit", torch.bfloat16: "16bit"}


@functools.cache
def target_of(device: torch.device) -> tuple[str, float]:
    """The column of the tile table for a device, and its shared memory for one program in KB; "" if it has no column.

    A CPU (interpreter) has the tiles of sm_90.
    """
    if device.type == "cpu":
        return "sm_90", 227
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return ("gfx942" if properties.gcnArchName.startswith(("gfx94", "gfx95")) else ""), 64
    # Consumer Blackwell (12.x) has Ampere's matrix instructions.
    target = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}.get(properties.major, "")
    return target, properties.shared_memory_per_block_optin / 1024


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device; of an H100 for the interpreter."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def precision_of(dtype: torch.dtype, precision: str, device: torch.device) -> str:
    """The dot's: what was asked for matters for float32 alone, and AMD's matrix instructions multiply that as it is."""
    return precision if dtype == torch.float32 and target_of(device)[0] not in AMD else "ieee"


def on_device(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
