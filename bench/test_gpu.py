"""Speed on a GPU: python -m pytest bench --benchmark-only -k gpu [--seconds S] [--record FILE]

The configurations of the CPU suite, then H x B x T x dtype. `python bench/gate.py` runs these within a bound of time.
"""

import pytest
import torch

from charrnn_fast.bench.suite import CLIPS, ELMAN, GENERATION, GPU_ELMAN, LM, Case, sweep_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [*ELMAN, *LM, *CLIPS, *GENERATION], ids=str)
def test_gpu(case: Case, row):
    assert row(case, torch.device("cuda"))["ms"] > 0


@pytest.mark.parametrize("case", sweep_cases(quick=False), ids=str)
def test_gpu_sweep(case: Case, row):
    assert row(case, torch.device("cuda"))["ms"] > 0


@pytest.mark.parametrize("case", GPU_ELMAN, ids=str)
def test_gpu_grid(case: Case, row):
    assert row(case, torch.device("cuda"))["ms"] > 0
