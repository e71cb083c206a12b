"""Several processes that train one model: the curve of one process with the whole batch, one checkpoint, one end."""

import json
from pathlib import Path

import processes
import pytest
import torch

from charrnn_fast.lm import checkpoint, distributed, training
from charrnn_fast.lm.distributed import Processes, SharedGradients
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import RECIPES, for_processes
from charrnn_fast.lm.training import Trainer

OPTIONS = [
    ("windows", {}),
    ("windows", {"accumulate": 2}),
    ("windows", {"optimizer": "adam", "lr": 1e-3, "on_nan": "skip"}),
    ("carried", {}),
    ("carried", {"graph_batches": 3}),
    ("torch", {}),
    ("layers", {}),
    ("random", {"accumulate": 4}),
]
RESUMED = [("carried", 0.0), ("layers", 0.3)]
ON_NAN = ["stop", "skip", "restore"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes came to, by case; both the same."""
    cases = [("curve", *case) for case in OPTIONS]
    cases += [("stopped_and_resumed", *case, 20) for case in RESUMED]
    cases += [("not_finite", on_nan) for on_nan in ON_NAN] + [("a_write_that_fails",)]
    folder = tmp_path_factory.mktemp("processes") / "two"
    first, second = processes.run(2, folder, cases)
    assert first == second  # to the bit
    return {
        json.dumps(case): (result, folder / str(i)) for i, (case, result) in enumerate(zip(cases, first, strict=True))
    }


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def same_curve(together, form, options):
    alone = processes.curve(None, Path(), form, options)
    assert len(alone["steps"]) > 10
    for name in ("steps", "parameters"):
        same(*(torch.tensor(found[name], dtype=torch.float64) for found in (together, alone)))
    for name in ("epochs", "validated"):  # None stands for what was not measured
        same(together[name], json.loads(json.dumps(alone[name])))


@pytest.mark.parametrize(("form", "options"), OPTIONS, ids=str)
def test_two_processes_follow_the_curve_of_one_with_the_whole_batch(two, form, options):
    same_curve(two[json.dumps(("curve", form, options))][0], form, options)


def test_three_processes_of_which_some_have_no_rows(tmp_path):
    """The last windows of an epoch are fewer than the processes, and so are the streams of a short validation."""
    together = processes.run(3, tmp_path / "three", [("curve", "windows", {}), ("curve", "carried", {})])
    assert together[0] == together[1] == together[2]
    same_curve(together[0][0], "windows", {})
    same_curve(together[0][1], "carried", {})


@pytest.mark.parametrize(("form", "dropout"), RESUMED)
def test_stopped_by_one_saved_by_the_first_resumed_by_all(two, form, dropout):
    result, _ = two[json.dumps(("stopped_and_resumed", form, dropout, 20))]
    assert (result["stopped"], result["step"], result["between"]) == ("enough", 21, False)
    assert result["resumed"] == result["straight"]  # to the bit, each process's dropout too


def test_one_process_goes_on_where_two_have_stopped(two):
    """The checkpoint is that of one process with the whole batch."""
    _, folder = two[json.dumps(("stopped_and_resumed", "carried", 0.0, 20))]
    trainer, sampler, recipe = processes.built("carried", None)
    checkpoint.resume(checkpoint.load(folder), trainer, sampler, recipe)
    assert trainer.step == 21 and trainer._so_far.state.shape[1] == recipe.batch_size
    trainer.fit(sampler)
    straight, whole_run, _ = processes.built("carried", None)
    straight.fit(whole_run)
    same(list(trainer.model.parameters()), list(straight.model.parameters()))


@pytest.mark.parametrize("on_nan", ON_NAN)
def test_what_is_not_finite_in_one_is_so_in_all(two, on_nan):
    result, _ = two[json.dumps(("not_finite", on_nan))]
    if on_nan == "stop":
        assert "at step 21" in result["error"]
    else:
        assert result["error"] is None and len(result["skipped"]) == 3
        assert sum(result["skipped"]) == (1 if on_nan == "skip" else 0)


def test_a_checkpoint_that_cannot_be_written_is_known_to_all(two):
    result, _ = two[json.dumps(("a_write_that_fails",))]
    assert result["wrote"] is False and "gone" in result["failure"]
    assert result["then"] is True and result["after"] is None


def test_a_process_that_dies_is_an_error_in_the_others_at_once(tmp_path):
    first, second = processes.run(2, tmp_path / "run", [("one_dies",)], codes=[0, 7])
    assert second is None
    assert first[0]["error"].startswith("another process of this run has ended or cannot be reached: ")
    assert first[0]["step"] <= 6


# ---- in this process alone ----------------------------------------------------------------------------------------


class Alone(Processes):
    """A group of so many that add up what this one has."""

    def __init__(self, count=2, rank=0):
        self.group, self.rank, self.count, self.first = None, rank, count, rank == 0

    def add_up(self, values):
        values.mul_(self.count)

    def of_all(self, value):
        return [value] * self.count


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_added_up_in_32(dtype):
    parameters = [torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype)), torch.nn.Parameter(torch.zeros(4, dtype=dtype))]
    frozen = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    loss = torch.tensor(3.0, dtype=dtype)
    shared = SharedGradients(Alone(), [*parameters, frozen])
    shared([loss], [100_000])  # characters, more than a 16-bit number holds
    assert all(p.grad.dtype == dtype and (p.grad == 0.5).all() for p in parameters)
    assert frozen.grad is None and float(loss) == 3.0
    assert float(shared.wishes) == 0.0


def test_rows_are_shared_out_whole():
    batch = torch.arange(7)[:, None]
    for count in (1, 2, 3, 7, 9):
        shares = [Alone(count, rank).share(batch) for rank in range(count)]
        assert torch.equal(torch.cat(shares), batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    state = torch.randn(2, 7, 3)
    parts = [Alone(9, rank).own(state) for rank in range(9)]
    assert parts[7] is parts[8] is None
    assert torch.equal(torch.cat(parts[:7], 1), state)
    assert Alone(2, 1).own((state, state))[1].shape == (2, 3, 3) and Alone(2, 1).own(None) is None


def test_each_process_has_the_recipes_own_batch():
    assert for_processes(RECIPES["santa"], 1).batch_size == 1
    assert for_processes(RECIPES["scratch"], 3).batch_size == 3 * 1024


def test_captured_steps_are_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(training, "why_not", lambda *arguments: None)
    monkeypatch.setattr(Processes, "why_not_captured", lambda self: "only NCCL's collectives can be")
    model = CharRNN(5, 4)
    assert "only where that is asked for" in Trainer(model, processes=Alone()).capture_reason
    with pytest.raises(RuntimeError, match="only NCCL's collectives can be"):
        Trainer(model, capture=True, processes=Alone())


def test_who_is_there_as_torchrun_says(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.launched() == 1 and distributed.speaks() and distributed.restarts() == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert distributed.launched() == 2 and not distributed.speaks() and distributed.restarts() == 3
    assert distributed.local_rank() == 1
