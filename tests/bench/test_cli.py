"""charrnn-fast bench as a user meets it."""

import json

import pytest
import torch

from charrnn_fast.bench import measure, step_profile, suite
from charrnn_fast.bench.grid import Config, sweep
from charrnn_fast.cli import bench, main

TINY = Config("tiny", 2, 3, 4, 5, tokens=True)


@pytest.fixture
def tiny(monkeypatch):
    """The command on a configuration that takes no time."""
    cases = [suite.Case("forward", TINY), suite.Case("lm_step", TINY)]
    monkeypatch.setattr(suite, "cases", lambda quick: cases)
    points = [suite.Case("forward_backward", config, sweep="T") for config in sweep("T", (2, 4))]
    monkeypatch.setattr(suite, "sweep_cases", lambda quick: points)
    monkeypatch.setattr(measure, "rates", lambda device: {"gemm_flops": 1e9, "copy_bytes": 1e9})


def test_a_table_then_the_pictures_then_one_sentence(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    peers = ["torch.nn.RNN", "reference"]
    assert main(["bench", "--quick", "--peers", *peers, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fp32 GEMM 1 GFLOP/s" in lines[0] and lines[1].startswith("what")
    assert any(line.startswith("training step") and "tiny" in line for line in lines)
    assert any(line.startswith("cost with T 2: ") for line in lines)
    assert [line.rpartition("/")[2] for line in lines[-4:-1]] == ["speedup.png", "growth.png", "roofline.png"]
    assert lines[-1].startswith("Fastest here: ")
    written = json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert written["command"] == "charrnn-fast bench --quick --peers torch.nn.RNN reference"
    assert [set(row["ratios"]) for row in written["rows"]] == [set(peers)] * 2
    assert len(written["sweeps"]) == 2


def test_no_time_leaves_rows_that_say_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", {False: 0.0, True: 0.0})
    assert main(["bench", "--out", str(tmp_path / "out")]) == 0
    assert "not measured: the time was up" in capsys.readouterr().out


def test_what_the_command_calls_peers_are_the_suites():
    assert tuple(peer.key for peer in suite.PEERS) == bench.PEERS


def test_errors_of_a_user(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "--out", str(tmp_path / "file")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert main(["bench", "--device", "cuda:99"]) == 2
    assert "--device cuda:99 cannot be used here" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--peers", "nobody"])


def test_profile_prints_phases_operators_and_gaps(capsys):
    found = step_profile.profile_step(config=TINY)
    assert [name for name, _ in found.phases] == list(step_profile.PHASES)
    assert sum(us for _, us in found.phases) <= found.span
    assert 0 < sum(line[2] for line in found.lines) <= found.span
    assert sum(found.gaps) < found.span
    assert main(["bench", "--profile"]) == 0
    out = capsys.readouterr().out
    assert "one training step of d2l" in out and "SGD.step" in out and "gaps between them" in out


def test_gaps_are_what_no_span_covers():
    assert step_profile.gaps([(2.0, 4.0), (3.0, 5.0), (7.0, 8.0)], 0.0, 10.0) == [2.0, 2.0, 2.0]
    assert step_profile.gaps([], 0.0, 3.0) == [3.0]
    assert step_profile.gaps([(0.0, 3.0)], 0.0, 3.0) == []


@pytest.mark.gpu
def test_profile_of_a_device_lists_kernels():
    found = step_profile.profile_step(torch.device("cuda"), TINY)
    assert found.unit == "kernel" and found.lines and 0 < sum(line[2] for line in found.lines) <= found.span
