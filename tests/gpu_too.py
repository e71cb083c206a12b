"""Tests that are not of a GPU alone and run on a GPU where there is one, and are then among those of `-m gpu`."""

from collections.abc import Mapping
from typing import Any

FILES = (
    "kernels/test_elman_sixteen_bits.py",
    "lm/test_three_launches.py",
    "ops/test_language_model_step.py",
    "ops/test_registered.py",
    "test_compiled.py",
    "test_rnn_checkpointed.py",
    "test_rnn_lengths_and_resets.py",
    "test_rnn_transforms.py",
)


def is_gpu_test(path: str, params: Mapping[str, Any]) -> bool:
    """Whether a test in a file (its path in tests/) with these parameters runs on a GPU: not by a CPU's kernels."""
    return path in FILES and params.get("backend", "triton") == "triton"
