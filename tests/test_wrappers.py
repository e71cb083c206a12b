"""DistributedDataParallel, fully_shard and torch.distributed.checkpoint by two processes: as torch's modules."""

import json

import processes
import pytest
import torch

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
    cases = [("wrappers.data_parallel", *case) for case in DATA_PARALLEL]
    cases += [("wrappers.sharded", name, parts) for name in MODELS for parts in PARTS[name]]
    cases += [("wrappers.checkpointed", name) for name in MODELS]
    results = processes.run(2, tmp_path_factory.mktemp("processes") / "two", cases)
    return {json.dumps(case): found for case, *found in zip(cases, *results, strict=True)}


@pytest.mark.parametrize("case", DATA_PARALLEL, ids=str)
def test_distributed_data_parallel(two, case):
    ranks = two[json.dumps(("wrappers.data_parallel", *case))]
    for ours, theirs in ranks:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert ranks[0][0][7:] == ranks[1][0][7:]  # the parameters, and the last norm
    assert ranks[0][0][0] != ranks[1][0][0]  # losses of different batches


@pytest.mark.parametrize(("name", "parts"), [(name, parts) for name in MODELS for parts in PARTS[name]], ids=str)
def test_fully_shard(two, name, parts):
    ranks = two[json.dumps(("wrappers.sharded", name, parts))]
    for ours, theirs in ranks:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert ranks[0][0][7:] == ranks[1][0][7:]


@pytest.mark.parametrize("name", MODELS)
def test_distributed_checkpoint(two, name):
    """Saved from shards; loaded into shards, which go on to the same numbers, and whole into torch's own module."""
    for result in two[json.dumps(("wrappers.checkpointed", name))]:
        ours, again, theirs = result["losses"]
        assert ours == again and theirs == pytest.approx(ours, abs=1e-9)
        assert result["after"][0] == result["after"][1]
