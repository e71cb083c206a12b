"""Speed on a CPU: python -m pytest bench --benchmark-only -k cpu [--seconds S] [--record FILE]

Every round times each side once, in turn, so that a busy machine slows all of them; ratios are taken round by round.
"""

import pytest

from charrnn_fast.bench.suite import BEYOND_ROWS, CLIPS, ELMAN, GENERATION, LM, Case, sweep_cases


@pytest.mark.parametrize("case", [*ELMAN, *LM, *CLIPS, *GENERATION, *BEYOND_ROWS], ids=str)
def test_cpu(case: Case, row):
    assert row(case)["ms"] > 0


@pytest.mark.parametrize("case", sweep_cases(quick=False), ids=str)
def test_cpu_sweep(case: Case, row):
    assert row(case)["ms"] > 0
