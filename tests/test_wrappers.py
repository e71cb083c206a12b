"""DistributedDataParallel, fully_shard and torch.distributed.checkpoint by two processes: as torch's modules.

What is given a group of processes runs in each of them, by processes.py.
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence

from charrnn_fast import CharRNN, FusedRNN, clip_grad_norm_
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.torch_model import TorchCharRNN

T, B, V, H = 9, 4, 7, 6


class Tagger(nn.Module):
    """Packed input, two directions, and a parameter that nothing uses."""

    def __init__(self, kind: Callable[..., nn.RNN], unused: bool = False):
        super().__init__()
        self.rnn = kind(V, H, 2, bidirectional=True)
        self.head = nn.Linear(2 * H, V)
        if unused:
            self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.one_hot(ids, V).to(self.head.weight.dtype)
        packed = pack_padded_sequence(rows, torch.arange(len(ids[0]), 0, -1) + len(ids) - len(ids[0]))
        output, _ = self.rnn(packed)
        return F.cross_entropy(self.head(output.data), ids[0].repeat(len(output.data))[: len(output.data)])


class Loss(nn.Module):
    """A language model's loss as the forward that a wrapper sees."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.model = kind(V, H)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids[:, :-1], ids[:, 1:])[0]


def _pair(name: str, unused: bool = False, backend: str = "auto") -> tuple[nn.Module, nn.Module]:
    """The same model with this library's modules and with torch's, in float64."""
    torch.manual_seed(0)
    if name == "tagger":
        ours, theirs = Tagger(partial(FusedRNN, backend=backend), unused), Tagger(nn.RNN, unused)
    else:
        ours, theirs = Loss(CharRNN), Loss(TorchCharRNN)
    theirs.load_state_dict(ours.state_dict())
    return ours.double(), theirs.double()


def _trained(model: nn.Module, wrapped: nn.Module, clip: Any, rank: int, steps: int = 3) -> list[float]:
    """The losses, norms and last parameters of some steps on each process's own batches."""
    generator, device = torch.Generator().manual_seed(rank), next(model.parameters()).device
    optimizer, found = torch.optim.Adam(wrapped.parameters(), lr=0.05), []
    for _ in range(steps):
        loss = wrapped(torch.randint(V, (T, B), generator=generator).to(device))
        loss.backward()
        norm = clip(wrapped.parameters(), 0.5)
        found += [float(loss), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)]
        optimizer.step()
        optimizer.zero_grad()
    for p in model.parameters():
        found += (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten().tolist()
    return found


def data_parallel(
    group: Processes, folder: Path, name: str, options: dict[str, Any], backend: str = "auto", device: str = "cpu"
) -> Any:
    """[ours, theirs] of a run under DistributedDataParallel; with no_sync's accumulation before it."""
    results = []
    unused = options.get("find_unused_parameters", False) and name == "tagger"
    for model, clip in zip(_pair(name, unused, backend), (clip_grad_norm_, nn.utils.clip_grad_norm_), strict=True):
        wrapped = DistributedDataParallel(model.to(device), **options)
        if not options.get("static_graph"):
            with wrapped.no_sync():
                wrapped(torch.full((T, B), group.rank + 1, device=device)).backward()
        results.append(_trained(model, wrapped, clip, group.rank))
    return results


def sharded(group: Processes, folder: Path, name: str, parts: list[str]) -> Any:
    """[ours, theirs] of a run under fully_shard over both processes."""
    mesh, results = init_device_mesh("cpu", (group.count,)), []
    for model, clip in zip(_pair(name), (clip_grad_norm_, nn.utils.clip_grad_norm_), strict=True):
        for part in parts:
            fully_shard(model.get_submodule(part), mesh=mesh)
        fully_shard(model, mesh=mesh)
        results.append(_trained(model, model, clip, group.rank))
    return results


def checkpointed(group: Processes, folder: Path, name: str) -> Any:
    """Trained sharded, saved by torch.distributed.checkpoint, loaded into shards and whole into torch's module."""
    mesh = init_device_mesh("cpu", (group.count,))
    ours, theirs = _pair(name)
    again = copy.deepcopy(ours)
    optimizers = []
    for model in (ours, again):
        fully_shard(model, mesh=mesh)
        optimizers.append(torch.optim.Adam(model.parameters(), lr=0.05))
    ids = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(group.rank))
    for _ in range(2):
        ours(ids).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    state, optimizer_state = get_state_dict(ours, optimizers[0])
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    state, optimizer_state = get_state_dict(again, optimizers[1])
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    set_state_dict(again, optimizers[1], model_state_dict=state, optim_state_dict=optimizer_state)
    whole = theirs.state_dict()
    dcp.load({"model": whole}, checkpoint_id=folder / "dcp")
    theirs.load_state_dict(whole)
    losses = [float(model(ids)) for model in (ours, again)]
    for model, optimizer in zip((ours, again), optimizers, strict=True):
        model(ids).backward()
        optimizer.step()
    after = [[p.full_tensor().flatten().tolist() for p in model.parameters()] for model in (ours, again)]
    return {"losses": [*losses, float(theirs(ids))], "after": after}


# ---- the tests -------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True, "static_graph": True, "bucket_cap_mb": 1e-4},
]
MODELS = ["tagger", "loss"]
DATA_PARALLEL = [(name, options) for name in MODELS for options in OPTIONS]
DATA_PARALLEL += [("tagger", {}, "torch"), ("tagger", {}, "triton", "cuda" if torch.cuda.is_available() else "cpu")]
PARTS = {"tagger": [[], ["rnn"], ["rnn", "head"]], "loss": [[], ["model"], ["model.rnn", "model"]]}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes came to, by case."""
    cases = [("test_wrappers.data_parallel", *case) for case in DATA_PARALLEL]
    cases += [("test_wrappers.sharded", name, parts) for name in MODELS for parts in PARTS[name]]
    cases += [("test_wrappers.checkpointed", name) for name in MODELS]
    results = processes.run(2, tmp_path_factory.mktemp("processes") / "two", cases)
    return {json.dumps(case): found for case, *found in zip(cases, *results, strict=True)}


@pytest.mark.parametrize("case", DATA_PARALLEL, ids=str)
def test_distributed_data_parallel(two, case):
    ranks = two[json.dumps(("test_wrappers.data_parallel", *case))]
    for ours, theirs in ranks:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert ranks[0][0][7:] == ranks[1][0][7:]  # the parameters, and the last norm
    assert ranks[0][0][0] != ranks[1][0][0]  # losses of different batches


@pytest.mark.parametrize(("name", "parts"), [(name, parts) for name in MODELS for parts in PARTS[name]], ids=str)
def test_fully_shard(two, name, parts):
    ranks = two[json.dumps(("test_wrappers.sharded", name, parts))]
    for ours, theirs in ranks:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert ranks[0][0][7:] == ranks[1][0][7:]


@pytest.mark.parametrize("name", MODELS)
def test_distributed_checkpoint(two, name):
    """Saved from shards; loaded into shards, which go on to the same numbers, and whole into torch's own module."""
    for result in two[json.dumps(("test_wrappers.checkpointed", name))]:
        ours, again, theirs = result["losses"]
        assert ours == again and theirs == pytest.approx(ours, abs=1e-9)
        assert result["after"][0] == result["after"][1]
