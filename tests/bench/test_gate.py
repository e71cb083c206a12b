"""The GPU gate in its form for a machine without one: every stage of it, and a run that is cut short."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from charrnn_fast.bench import gate, gate_kernels, gate_stages

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gate.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device the gate itself is run, and takes nine minutes")
def test_every_stage_runs_to_its_end_without_a_gpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--seconds", "3000"]  # a bound, not a length
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + (tmp_path / "gate.log").read_text()[-4000:]
    found = json.loads((tmp_path / "gate.json").read_text())
    stages = found["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {stage.name: "done" for stage in gate.STAGES}
    assert found["machine"]["torch"] == torch.__version__ and found["rates"]["fp32"]["gemm_flops"] > 0
    assert stages["environment"]["paths"]["fp32 H=2048"]["path"] in ("native", "torch")
    assert set(stages["tests"]["outcomes"]) == {"SKIPPED"}
    assert len(stages["parity"]["parity"]) >= 5 and all(row["ok"] for row in stages["parity"]["parity"])
    assert {row["task"] for row in found["rows"]} == {"forward", "forward_backward", "lm_step", "clip", "generation"}
    assert all(row["ms"] > 0 for row in (*found["rows"], *found["sweeps"])) and found["sweeps"]
    for row in (*found["rows"], *found["sweeps"]):  # every side has its time on the device, or says why not
        assert row["device"].keys() == {"charrnn_fast", *row["peer_ms"]}
        assert all(side == {"none": "a CUDA graph needs a CUDA device"} for side in row["device"].values())
    assert {"FlagGems", "XMA"} <= found["rows"][0]["skipped"].keys() or "FlagGems" in found["rows"][0]["peer_ms"]
    for row in stages["kernels"]["kernels"]:
        assert row["charrnn_fast"]["us"] > 0 and row["torch.nn.RNN"]["kernels"] and row["finding"] == ""
    assert stages["tests"]["workers"] == 2
    assert "triton" in {row["path"] for row in found["rows"] if row["task"] == "forward"}
    assert stages["language_model"]["scratch_recipe"]["validation_perplexity"] > 1
    assert all(row["recorded"] is not None for row in stages["registers"]["registers"])
    assert [row["notable"] for row in stages["tiles"]["tiles"] if "forward_ratio" in row]
    for row in stages["chip"]["decoders"]:
        assert all(row[f"{name}: us an id"] > 0 for name in ("one program", "shipped", "one counter", "8 warps"))
    for row in stages["chip"]["chip"]:
        assert row["ours_us_a_step"] > 0 and row["theirs_us_a_step"] > 0
        assert len(row["candidates"]) >= 3 and all(each["backward_ratio"] for each in row["candidates"])


@pytest.mark.parametrize(
    ("line", "test", "outcome"),
    [
        ("tests/a.py::test_b[1-x y] PASSED [ 50%]", "tests/a.py::test_b[1-x y]", "PASSED"),
        ("tests/a.py::test_b SKIPPED (no device) [100%]", "tests/a.py::test_b", "SKIPPED"),
        ("[gw3] [  7%] FAILED tests/a.py::test_b[1-x y] ", "tests/a.py::test_b[1-x y]", "FAILED"),
        ("[gw10] [100%] SKIPPED tests/a.py::test_b", "tests/a.py::test_b", "SKIPPED"),
    ],
)
def test_outcomes_are_read_with_and_without_workers(line, test, outcome):
    found = gate_stages.OUTCOME.match(line) or gate_stages.OUTCOME_OF_A_WORKER.match(line)
    assert (found["test"], found["outcome"]) == (test, outcome)


@pytest.fixture
def a_gate(tmp_path, monkeypatch):
    monkeypatch.setattr(gate.Gate, "has_gpu", lambda self: False)
    return gate.Gate(tmp_path, 60.0, ["python bench/gate.py"])


def _replace_worker(monkeypatch, script: str) -> None:
    """Stages run this instead; sys.argv[1] is the file for the result."""
    real = gate.run

    def run(command, seconds, log, environment=None):
        return real([sys.executable, "-c", script, command[4]], seconds, log, environment)

    monkeypatch.setattr(gate, "run", run)


def test_a_stage_that_is_killed_leaves_what_it_had(a_gate, tmp_path, monkeypatch):
    _replace_worker(
        monkeypatch,
        "import sys, time; print('begun', flush=True)\n"
        'open(sys.argv[1], \'w\').write(\'{"rows": [1, 2], "findings": ["odd"], "more": 3}\'); time.sleep(600)',
    )
    start = time.monotonic()
    a_gate.run_stage(gate.STAGES[0], 3.0)
    assert time.monotonic() - start < 60
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["rows"] == [1, 2]
    stage = found["stages"]["environment"]
    assert (stage["status"], stage["findings"], stage["more"]) == ("out of time", ["odd"], 3)
    assert "begun" in (tmp_path / "gate.log").read_text()


def test_a_stage_that_fails_does_not_end_the_run(a_gate, monkeypatch):
    _replace_worker(monkeypatch, "import sys; sys.exit(3)")
    assert a_gate.run(list(gate.STAGES[:2])) == 1
    assert [stage["status"] for stage in a_gate.content["stages"].values()] == ["exit code 3"] * 2


def test_without_time_a_stage_is_not_run(a_gate):
    a_gate.until = time.monotonic()
    assert a_gate.run([gate.STAGES[0]]) == 1
    assert a_gate.content["stages"]["environment"]["status"] == "not run: no time was left"


def test_recurrences_are_known_by_their_kernels_names():
    ours = {
        "elman_forward_kernel": (1.0, 5.0),
        "elman_backward_kernel": (1.0, 7.0),
        "ampere_sgemm_128x64_tn": (2.0, 9.0),
    }
    theirs = {"void RNN_blockPersist_fp<float>": (1.0, 3.0), "_bp_RNN_FMA": (1.0, 4.0), "cutlass_80_simt": (1.0, 1.0)}
    assert gate_kernels.recurrence_us(ours, "charrnn_fast") == 12.0
    assert gate_kernels.recurrence_us(theirs, "torch.nn.RNN") == 7.0
    assert gate_kernels.recurrence_us({"aten::addmm": (1.0, 1.0)}, "charrnn_fast") is None


def test_the_shares_are_of_a_whole_and_fit_nine_minutes():
    assert sum(stage.share for stage in gate.STAGES) == pytest.approx(1)
    assert gate.DEFAULT_SECONDS < 9 * 60
