"""What the tests on a GPU share."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

# Dtype and precision of products.
KINDS = {
    "fp64": (torch.float64, "ieee"),
    "ieee": (torch.float32, "ieee"),
    "tf32x3": (torch.float32, "tf32x3"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}


@contextlib.contextmanager
def nobody_waits() -> Iterator[None]:
    """What waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compilations(kernel) -> int:
    """How many forms of a kernel are compiled."""
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def sanitized(tool: str, script: str) -> None:
    """Run a script under a tool of compute-sanitizer, which is to find nothing; skip the test where there is none."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    command += [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
