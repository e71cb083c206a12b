"""Prints, after pytest-benchmark's own table, the one that matters: ratios measured round by round in this run."""

import json
from pathlib import Path

import pytest

from bench.measure import copy_rate, gemm_rate, machine

ROWS: list[dict] = []


def pytest_addoption(parser):
    parser.addoption(
        "--record", type=Path, metavar="FILE", help="write the ratios, rates and machine to this JSON file"
    )
    parser.addoption("--seconds", type=float, default=2.0, help="time budget per configuration, all sides together")


@pytest.fixture(scope="session")
def rates() -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, in this run."""
    return {"gemm_flops": gemm_rate(), "copy_bytes": copy_rate()}


@pytest.fixture
def record():
    """Takes a row of the table."""
    return ROWS.append


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    terminalreporter.section("ratios to charrnn_fast: median (quartiles), above 1 means charrnn_fast is faster")
    for row in ROWS:
        peers = "  ".join(f"{name} {ratio['text']}x" for name, ratio in row["ratios"].items())
        floor = "" if row.get("over_floor") is None else f"  {row['over_floor']:.2f} times the floor"
        memory = "" if row.get("memory_ratio") is None else f"  memory {row['memory_ratio']:.2f} of torch.nn.RNN's"
        terminalreporter.write_line(f"{row['task']:16} {row['name']:8} {row['ms']:9.3f} ms  {peers}{floor}{memory}")
        for name, reason in row["skipped"].items():
            terminalreporter.write_line(f"{'':26} {name} skipped: {reason}")
    if path := config.getoption("--record"):
        path.write_text(json.dumps({"machine": machine(), "rows": ROWS}, indent=1) + "\n")
