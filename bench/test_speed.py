"""Speed by pytest-benchmark: python -m pytest bench --benchmark-only -k cpu [--seconds S] [--record FILE]

Every round times each side once, in turn, so that a busy machine slows all of them; ratios are taken round by round.
-k gpu: the same on a GPU, then H x B x T x dtype; `python bench/gate.py` runs these within a bound of time.
"""

import pytest
import torch

from charrnn_fast.bench.suite import BEYOND_ROWS, CLIPS, ELMAN, GENERATION, GPU_ELMAN, LM, Case, sweep_cases

NAMED, SWEEPS = [*ELMAN, *LM, *CLIPS, *GENERATION], sweep_cases(quick=False)


@pytest.mark.parametrize("case", [*NAMED, *BEYOND_ROWS, *SWEEPS], ids=str)
def test_cpu(case: Case, row):
    assert row(case)["ms"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("case", [*NAMED, *SWEEPS, *GPU_ELMAN], ids=str)
def test_gpu(case: Case, row):
    assert row(case, torch.device("cuda"))["ms"] > 0
