"""Rows of results: what they hold, and what becomes of a side that fails or of a row that comes too late."""

import math
import time

import pytest
import torch

from charrnn_fast.bench import measure, suite
from charrnn_fast.bench.grid import BEYOND, GPU_GRID, GRID, SWEEPS, Config, Gradients
from charrnn_fast.bench.peers import Ours, Peer, Reference, TorchRNN
from charrnn_fast.bench.suite import Case, Run

RATES = {"fp32": {"gemm_flops": 1e9, "copy_bytes": 1e9}}
SMALL = Config("small", 3, 4, 5, 6, tokens=True)
CASES = [
    Case("forward", SMALL),
    Case("forward_backward", Config("packed", 3, 4, 5, 6, packed=True)),
    Case("lm_step", SMALL),
    Case("generation", SMALL),
    Case("clip", Gradients("few", ((3, 4), (5,)))),
]


class Broken(Peer):
    name = key = "broken"
    tasks = ("forward",)

    def forward(self, problem):
        raise ZeroDivisionError("no such luck")


def run(*peers: Peer, **options) -> Run:
    return Run(RATES, peers=peers, seconds=0.0, least=2, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_times_ratios_and_a_floor(case: Case):
    row = suite.row_of(case, run(TorchRNN(), Reference()))
    assert (row["task"], row["name"], row["rounds"]) == (case.task, case.name, 2)
    assert row["ms"] > 0 and "torch.nn.RNN" in row["ratios"] and row["peer_ms"]["torch.nn.RNN"] > 0
    assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
    own = {"gemm_flops": row["gemm_flops"], "copy_bytes": RATES["fp32"]["copy_bytes"]}
    assert row["gemm_flops"] > 1e8 and row["floor_ms"] == pytest.approx(1e3 * measure.floor(*case.work, own))
    assert ("reference" in row["skipped"]) == (case.name == "packed")
    assert ("memory_ratio" in row) == (case.task in suite.MEMORY_TASKS)


def test_a_peer_that_fails_is_a_line_and_not_an_end():
    row = suite.row_of(CASES[0], run(Broken(), TorchRNN()))
    assert row["skipped"] == {"broken": "it failed: ZeroDivisionError: no such luck"}
    assert "torch.nn.RNN" in row["ratios"]


def test_a_failure_of_ours_is_a_row_without_times():
    class Failing(Ours):
        def forward(self, problem):
            raise RuntimeError("no kernel")

    (row,) = suite.rows(CASES[:1], run(ours=Failing()), time.monotonic() + 60)
    assert row["not_measured"] == "RuntimeError: no kernel" and "ms" not in row


def test_rows_after_the_end_of_the_time_say_so():
    rows = list(suite.rows(CASES, run(), time.monotonic()))
    assert [row["not_measured"] for row in rows] == [suite.TIME_IS_UP] * len(CASES)


def test_the_suites_cover_the_grid():
    assert {case.config.name for case in suite.ELMAN} == {config.name for config in GRID}
    assert {case.task for case in suite.cases(quick=False)} == {
        *("forward", "forward_backward", "lm_step", "generation", "clip", *BEYOND)
    }
    quick = {case.task for case in suite.cases(quick=True)}
    assert quick == {case.task for case in suite.cases(quick=False)} - {"checkpoint_steps"}  # which takes seconds
    assert len(GPU_GRID) == 7 * 5 * 2 * 3
    for quick in (False, True):
        points = [case.sweep for case in suite.sweep_cases(quick)]
        assert set(points) == set(SWEEPS) and all(points.count(axis) >= 3 for axis in SWEEPS)


@pytest.mark.parametrize("config", GRID, ids=lambda c: c.name)
def test_work_is_counted(config: Config):
    rows = int(config.lengths.sum())
    recurrence, projection = 2 * rows * config.H**2, 0 if config.tokens else 2 * rows * config.I * config.H
    assert config.flops(False) == recurrence + projection and config.flops(True) == 3 * config.flops(False)
    assert config.bytes(True) > config.bytes(False) > 4 * rows * config.H
    assert config.bytes(False, 2) < config.bytes(False, 4)
    assert config.lm_flops() > config.flops(True) and math.isfinite(config.lm_bytes())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_on_a_device(case: Case):
    row = suite.row_of(case, run(TorchRNN(), Reference(), device=torch.device("cuda")))
    assert row["ms"] > 0 and row["ratios"]["torch.nn.RNN"]["median"] > 0


def test_times_on_the_device_or_why_there_are_none(monkeypatch):
    """Without a device: what a graph would be is the job itself, and one side cannot be captured."""
    jobs = {"charrnn_fast": lambda: 0.002, "a": lambda: 0.004, "b": lambda: None}  # which say what they took
    assert suite.device_times(jobs, run()) == {name: {"none": "a CUDA graph needs a CUDA device"} for name in jobs}
    monkeypatch.setattr(measure, "replay", lambda job, device: "it waits" if job is jobs["b"] else job)
    monkeypatch.setattr(measure, "alternate", lambda timed, *_, **__: {name: [job()] for name, job in timed.items()})

    class Device:
        type = "cuda"

    found = suite.device_times(jobs, run(device=Device()))
    assert found["b"] == {"none": "it waits"}
    assert (found["charrnn_fast"]["ratio"], found["charrnn_fast"]["ms"]) == ("1.0 (1.0-1.0)", 2.0)
    assert (found["a"]["ratio"], found["a"]["ms"]) == ("2.0 (2.0-2.0)", 4.0)


def test_rows_have_the_devices_time_where_it_is_asked_for():
    assert "device" not in suite.row_of(CASES[0], run(TorchRNN()))
    row = suite.row_of(CASES[0], run(TorchRNN(), replays=True))
    assert row["device"].keys() == {"charrnn_fast", "torch.nn.RNN"}


@pytest.mark.gpu
def test_a_captured_job_is_played_again():
    x = torch.ones(1000, device="cuda")
    again = measure.replay(lambda: x.add_(1), torch.device("cuda"))
    torch.cuda.synchronize()
    before = float(x[0])
    again()
    torch.cuda.synchronize()
    assert float(x[0]) == before + 1
    assert "captur" in measure.replay(lambda: float(x.sum()), torch.device("cuda"))
