"""The stages of bench/gate.py, each run as `python -m charrnn_fast.bench.gate_stages STAGE RESULT SECONDS`.

A stage writes RESULT, a JSON file, again and again as it goes, and stops by itself when its seconds are over.
"findings" are lines about what is wrong. Without a CUDA device everything is tiny, and the Triton kernels interpreted.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from charrnn_fast import CharRNN, Trainer
from charrnn_fast.bench import gate, gate_chip, gate_kernels, gate_parity, gate_tiles, measure, suite
from charrnn_fast.bench.grid import DTYPES, Config, Gradients
from charrnn_fast.bench.peers import Ours
from charrnn_fast.bench.suite import Case, Run
from charrnn_fast.lm import corpora
from charrnn_fast.lm.data import Windows
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.recipes import RECIPES, build_model, build_sampler, prepare_text
from charrnn_fast.lm.torch_model import TorchCharRNN
from charrnn_fast.ops import backends

SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048)
OUTCOMES = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
OUTCOME = re.compile(rf"^(?P<test>\S+::.*?) (?P<outcome>{OUTCOMES})\b")
OUTCOME_OF_A_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<outcome>{OUTCOMES}) (?P<test>\S+::.*?) *$")
MOST_WORKERS = 12  # each compiles and holds a part of the device's memory


@dataclass
class Context:
    """What a stage works with, and the result that it builds."""

    path: Path
    until: float  # of time.monotonic()
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result: dict[str, Any] = field(default_factory=lambda: {"findings": []})

    @property
    def tiny(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    def find(self, line: str) -> None:
        print(f"FINDING {line}", flush=True)
        self.result["findings"].append(line)

    def save(self) -> None:
        gate.save(self.result, self.path)


def _rates(context: Context, dtypes: Sequence[str]) -> dict[str, dict[str, float]]:
    if context.tiny:
        rate = {"gemm_flops": measure.gemm_rate(size=256), "copy_bytes": measure.copy_rate(numbers=1 << 20)}
        return dict.fromkeys(dtypes, rate)
    return {name: measure.rates(context.device, DTYPES[name]) for name in dtypes}


def environment(context: Context) -> None:
    """The machine, and for every hidden size and dtype the path that it takes, and why no other."""
    context.result["machine"] = measure.machine(context.device)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv"]
        context.result["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    context.result["pytest"] = find_spec("pytest") is not None
    paths = {}
    for name, dtype in DTYPES.items():
        for size in SIZES:
            explanation = backends.explain(size, dtype, context.device)
            paths[f"{name} H={size}"] = {"path": explanation.backend, "why_not": explanation.why_not}
    context.result["paths"] = paths
    context.save()
    context.result["rates"] = _rates(context, list(DTYPES))
    for line in (context.result["machine"], context.result["rates"], *paths.items()):
        print(line, flush=True)


def tests(context: Context) -> None:
    """pytest -m gpu, its outcomes counted as they come."""
    if find_spec("pytest") is None:
        context.result["not_run"] = "pytest is not installed here"
        print(context.result["not_run"], flush=True)
        return
    # Without a device they are all skipped, and one file of them shows it.
    chosen = "tests/kernels/test_gpu_elman.py" if context.tiny else "tests"
    options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--color=no"]
    if find_spec("xdist") is not None:  # most of the time is compiling
        context.result["workers"] = 2 if context.tiny else min(MOST_WORKERS, os.cpu_count() or 1)
        options += ["-n", str(context.result["workers"])]
    command = [sys.executable, "-m", "pytest", *options, chosen]
    process = subprocess.Popen(command, cwd=gate.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(max(1.0, context.until - time.monotonic()), process.kill)
    timer.start()
    counts: dict[str, int] = {}
    context.result["outcomes"] = counts
    assert process.stdout is not None  # it is a pipe
    for line in process.stdout:
        print(line, end="", flush=True)
        if outcome := OUTCOME.match(line) or OUTCOME_OF_A_WORKER.match(line):
            counts[outcome["outcome"]] = counts.get(outcome["outcome"], 0) + 1
            if outcome["outcome"] in ("FAILED", "ERROR", "XPASS"):
                context.find(f"{outcome['test']}: {outcome['outcome']}")
            context.save()
    timer.cancel()
    code = process.wait()
    context.result["exit_code"] = code
    if code < 0:
        context.find("the tests were stopped when their time was up")
    elif code not in (0, 5) and not context.result["findings"]:  # 5: none was collected
        context.find(f"pytest ended with exit code {code}; the log says why")


def _keep(context: Context, name: str, rows: Iterable[dict[str, Any]], fault: Callable[[dict[str, Any]], str]) -> None:
    """Keep row after row until the time is up; what `fault` says of a row is a finding."""
    context.result[name] = []
    for row in rows:
        print(row, flush=True)
        context.result[name].append(row)
        if found := fault(row):
            context.find(f"{name} {row['name']}: {found}")
        context.save()
        if context.is_over:
            break


def parity(context: Context) -> None:
    """Errors against fp64, and the language model against the reference."""
    _keep(context, "parity", gate_parity.rows(context.device), lambda row: "" if row["ok"] else str(row))
    if context.is_over:
        context.find("parity: the time was up before the last size")


def _run_cases(context: Context, cases: Sequence[Case], run: Run) -> None:
    """Rows into the result as they come; a row that could not be measured for another reason than time is a finding."""
    rows, sweeps = context.result.setdefault("rows", []), context.result.setdefault("sweeps", [])
    for row in suite.rows(cases, run, context.until):
        (sweeps if "sweep" in row else rows).append(row)
        ratios = {name: ratio["text"] for name, ratio in row.get("ratios", {}).items()}
        print(
            row["task"],
            row["name"],
            row.get("path", ""),
            row.get("ms"),
            ratios,
            {name: found.get("ms") for name, found in row.get("device", {}).items()},
            row.get("not_measured", ""),
            flush=True,
        )
        why = row.get("not_measured")
        if why is not None and why != suite.TIME_IS_UP:
            context.find(f"{row['task']} {row['name']}: {why}")
        context.save()


def _tiny(case: Case) -> Case:
    """The same kind of case at a size for the interpreter."""
    config = case.config
    if isinstance(config, Gradients):
        return replace(case, config=replace(config, shapes=config.shapes[:6]))
    small = {name: min(getattr(config, name), most) for name, most in (("B", 2), ("T", 4), ("I", 8), ("H", 8))}
    return replace(case, config=replace(config, **small))


def _run(context: Context, dtypes: Sequence[str], seconds: float) -> Run:
    rates = _rates(context, dtypes)
    context.result["rates"] = rates
    if context.tiny:
        return Run(rates, context.device, suite.PEERS[:2], seconds=0.0, least=1, ours=Ours("triton"), replays=True)
    peers = [peer for peer in suite.PEERS if not peer.takes_minutes]
    return Run(rates, context.device, peers, seconds=seconds, least=5, replays=True)


def grid(context: Context) -> None:
    """The grid against torch.nn.RNN, what matters most first. A row's `path` is the backend that ran it."""
    # A loop in Python takes too long.
    peers = [peer for peer in suite.PEERS if peer.key in ("torch.nn.RNN", "flaggems", "xma")]
    run = replace(_run(context, list(DTYPES), 0.15), peers=peers)
    cases = [*suite.ELMAN, *suite.sweep_cases(quick=False), *suite.GPU_ELMAN]
    if context.tiny:
        cases = [_tiny(case) for case in (*suite.ELMAN[:2], suite.ELMAN[-1], suite.sweep_cases(True)[0], *cases[-2:])]
    _run_cases(context, cases, run)


def _per_step(model: LanguageModel, sampler: Windows, epochs: int) -> float:
    """Seconds of a training step in Trainer, by its last epoch; the ones before it warm up and capture."""
    history = Trainer(model, optimizer="sgd", lr=0.1, clip=1.0, epochs=epochs).fit(sampler)
    return history[-1].seconds / -(-sampler.num_train // sampler.batch_size)


def _trainer(context: Context, config: Config) -> None:
    """Trainer's step beside the step written by hand; as it captures where it can, this is captured against eager."""
    generator = torch.Generator().manual_seed(0)
    steps = 2 if context.tiny else 200
    tokens = torch.randint(config.I, (steps * config.B + config.B + config.T,), generator=generator)
    size = {"batch_size": config.B, "num_steps": config.T, "num_train": steps * config.B, "num_val": config.B}
    found = {}
    for name, kind in (("charrnn_fast", CharRNN), ("torch.nn.RNN", TorchCharRNN)):
        torch.manual_seed(0)
        model = kind(config.I, config.H).to(context.device)
        sampler = Windows(tokens.to(context.device), torch.Generator().manual_seed(0), **size)
        found[name] = 1e3 * _per_step(model, sampler, epochs=2 if context.tiny else 3)
    context.result.setdefault("trainer_step_ms", {})[config.name] = found
    print(f"Trainer {config.name}: {found} ms a step", flush=True)
    context.save()


def _scratch_recipe(context: Context) -> None:
    """Seconds of the whole recipe with its validation, after a first epoch of another model has compiled everything."""
    recipe = RECIPES["scratch"]
    book = corpora.BOOKS[recipe.book]
    corpus = corpora.fallback(book, "tiny") if context.tiny else corpora.load_book(recipe.book)
    vocab, tokens = prepare_text(recipe, corpus.text)
    tokens = tokens[:2000].to(context.device) if context.tiny else tokens.to(context.device)

    def fit(epochs: int) -> tuple[float, float | None]:
        model = build_model(recipe, len(vocab), 0, device=context.device)
        trainer = Trainer(model, optimizer=recipe.optimizer, lr=recipe.lr, clip=recipe.clip, epochs=epochs)
        start = time.perf_counter()
        history = trainer.fit(build_sampler(recipe, tokens, 0))
        return time.perf_counter() - start, history[-1].val_ppl

    fit(1)
    epochs = 1 if context.tiny else recipe.epochs
    seconds, perplexity = fit(epochs)
    context.result["scratch_recipe"] = {
        "seconds": seconds,
        "epochs": epochs,
        "validation_perplexity": perplexity,
        "text": corpus.source,
    }
    print(f"scratch: {context.result['scratch_recipe']}", flush=True)
    context.save()


def language_model(context: Context) -> None:
    """Training steps by hand and by Trainer, the whole recipe, clip and generation."""
    run = replace(_run(context, ["fp32"], 0.4), ours=Ours())
    steps, clips, decoders = suite.LM, suite.CLIPS, suite.GENERATION
    if context.tiny:
        steps, clips, decoders = ([_tiny(cases[0])] for cases in (steps, clips, decoders))
    _run_cases(context, steps, run)
    for case in steps:
        if isinstance(case.config, Config) and not context.is_over:
            _trainer(context, case.config)
    if not context.is_over:
        _scratch_recipe(context)
    _run_cases(context, [*clips, *decoders], run)


def kernels(context: Context) -> None:
    """The kernels of the recurrence beside cuDNN's, by the profiler."""
    _keep(context, "kernels", gate_kernels.rows(context.device), itemgetter("finding"))


def registers(context: Context) -> None:
    """What the driver says of the kernels that the launchers compile, beside the recorded figures."""
    _keep(context, "registers", gate_tiles.registers(context.device), itemgetter("finding"))


def tiles(context: Context) -> None:
    """The shipped tiles and their neighbours, timed by turns."""
    _keep(context, "tiles", gate_tiles.neighbours(context.device), itemgetter("wrong"))


def chip(context: Context) -> None:
    """The recurrence across the chip, its tiles and torch.nn.RNN timed by turns; before it the decoder, both ways."""
    _keep(context, "decoders", gate_chip.decoders(context.device), itemgetter("wrong"))
    _keep(context, "chip", gate_chip.rows(context.device), itemgetter("wrong"))


STAGES = {
    stage.__name__: stage
    for stage in (environment, tests, parity, grid, language_model, kernels, registers, tiles, chip)
}


def main(arguments: list[str]) -> int:
    name, path, seconds = arguments
    context = Context(Path(path), time.monotonic() + float(seconds))
    context.save()
    STAGES[name](context)
    context.save()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
