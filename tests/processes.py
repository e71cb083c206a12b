"""What tests/lm/test_distributed.py runs in several processes that talk through gloo, not a test itself:

    python processes.py RANK COUNT FOLDER CASES

with the cases as JSON, [[name, argument, ...], ...], a name being a function of this file or module.function of this
folder. Each process writes one JSON file with what each case returned. `run` starts them.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_problems import TEXT, VOCAB, Listener

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm import checkpoint, data
from charrnn_fast.lm.callbacks import Callback
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.evaluation import validate
from charrnn_fast.lm.keeping import Every, Keeper
from charrnn_fast.lm.recipes import RECIPES, Recipe, build_model, build_sampler, build_trainer
from charrnn_fast.lm.training import Trainer

TOKENS = TEXT[:5_306]
IDENTITY: dict[str, Any] = {"kind": "fused", "seed": 0, "source": "a book"}

# Small forms of the recipes, with the whole batch; each ends in a batch that the processes cannot share evenly.
FORMS: dict[str, dict[str, Any]] = {
    "windows": {"recipe": "scratch", "batch_size": 130, "hidden_size": 12, "split": (0.9, 0.1)},
    "carried": {"recipe": "ch8", "batch_size": 6, "num_steps": 20, "hidden_size": 12, "split": (0.9, 0.1)},
    "torch": {"recipe": "concise", "batch_size": 130, "hidden_size": 12, "kind": "torch"},
    "layers": {
        "recipe": "shakespeare",
        "batch_size": 6,
        "num_steps": 20,
        "hidden_size": 10,
        "embedding": 5,
        "dropout": 0.0,
        "letters": True,
        "warmup": 0,
    },
    "random": {"recipe": "ch8", "sampler": "random", "batch_size": 15, "num_steps": 20, "hidden_size": 12},
}


def built(form: str, processes: Processes | None, **options: Any) -> tuple[Trainer, data.Sampler, Recipe]:
    """The trainer and sampler of a form, of the same seed in every process."""
    changes = {"clip": 0.5, "epochs": 3, "max_chars": None, **FORMS[form], **options}
    kind = changes.pop("kind", "fused")
    recipe = replace(RECIPES[changes.pop("recipe")], **changes)
    recipe = replace(recipe, lr=min(recipe.lr, 0.5))
    model = build_model(recipe, len(VOCAB), seed=0, kind=kind, dtype=torch.float64)
    trainer = build_trainer(recipe, model, processes=processes)
    return trainer, build_sampler(recipe, TOKENS, seed=0), recipe


def curve(processes: Processes | None, folder: Path, form: str, options: dict[str, Any]) -> Any:
    """Losses and norms of every update, the epochs' figures, and the parameters at the end."""
    trainer, sampler, _ = built(form, processes, **options)
    if processes is not None and not processes.first:  # what the first has is what counts
        for p in trainer.model.parameters():
            p.data.add_(processes.rank)
        sampler.generator.manual_seed(99)
    listener = Listener()
    history = trainer.fit(sampler, callbacks=[listener])
    figures = [(r.train_loss, r.val_ppl, r.val_ppl_batch_mean, r.tokens, r.grad_norm, r.step) for r in history]
    batches = sampler.walk(TOKENS[:21])
    validated = validate(trainer.model, batches, carry_state=sampler.carry_state, processes=processes)
    steps = list(zip(listener.losses, listener.norms, strict=True))
    return {"steps": steps, "epochs": figures, "validated": validated, "parameters": _parameters_of(trainer)}


def _parameters_of(trainer: Trainer) -> list[float]:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()


def stopped_and_resumed(processes: Processes | None, folder: Path, form: str, dropout: float, at: int) -> Any:
    """Stopped by the last process alone, saved by the first, resumed by all; and the same without a stop."""
    trainer, sampler, recipe = built(form, processes, dropout=dropout)
    torch.manual_seed(processes.rank if processes else 0)
    trainer.fit(sampler)
    straight = _parameters_of(trainer)

    trainer, sampler, recipe = built(form, processes, dropout=dropout)
    torch.manual_seed(processes.rank if processes else 0)
    keeper = Keeper(folder, trainer, sampler, VOCAB, recipe, identity=IDENTITY, every=Every(1e9, seconds=True))
    last = processes is None or processes.rank == processes.count - 1
    stopping = Listener(lambda trainer: trainer.stop("enough") if last and trainer.step == at else None)
    trainer.fit(sampler, callbacks=[stopping, keeper])
    found = {"stopped": trainer.stopped, "step": trainer.step, "between": trainer.between_epochs}
    assert keeper.write()

    trainer, sampler, recipe = built(form, processes, dropout=dropout)
    checkpoint.resume(checkpoint.load(folder), trainer, sampler, recipe)
    trainer.fit(sampler)
    return found | {"straight": straight, "resumed": _parameters_of(trainer)}


def not_finite(processes: Processes | None, folder: Path, on_nan: str) -> Any:
    """A weight of the last process alone is not finite for one step: all of them skip it, or stop, or go back."""
    trainer, sampler, _ = built("carried", processes, on_nan=on_nan)

    class Break(Callback):
        times = 0

        def on_step(self, trainer, step):
            self.times += step.step == 20
            if step.step == 20 and self.times == 1 and processes is not None and processes.rank == processes.count - 1:
                trainer.model.head.bias.data[0] = float("nan")
            if step.step == 21 and on_nan == "skip":
                trainer.model.head.bias.data[0] = 0.0

    try:
        trainer.fit(sampler, callbacks=[Break()])
        error = None
    except TrainingError as raised:
        error = str(raised)
    return {"error": error, "skipped": [r.skipped for r in trainer.history], "step": trainer.step}


def a_write_that_fails(processes: Processes, folder: Path) -> Any:
    """The first process's folder is gone: all know, and none goes on as if it were saved."""
    trainer, sampler, recipe = built("windows", processes)
    notices: list[str] = []
    gone = folder / "gone"
    keeper = Keeper(gone, trainer, sampler, VOCAB, recipe, identity=IDENTITY, notice=notices.append)
    wrote = keeper.write()
    if processes.first:
        gone.mkdir()
    dist.barrier()
    return {"wrote": wrote, "failure": keeper.failure, "then": keeper.write(), "after": keeper.failure}


def one_dies(processes: Processes, folder: Path) -> Any:
    """The last process ends in the middle; the first says so."""
    trainer, sampler, _ = built("windows", processes, on_nan="restore")
    last = processes.rank == processes.count - 1
    try:
        trainer.fit(sampler, callbacks=[Listener(lambda trainer: os._exit(7) if last and trainer.step == 5 else None)])
    except TrainingError as error:
        return {"error": str(error), "step": trainer.step}
    return {"error": None}


def run(count: int, folder: Path, cases: Any, codes: list[int] | None = None) -> list[Any]:
    """What each of so many processes returned of each case; None for one that was not to come to its end."""
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    given = [map(str, (rank, count, folder, json.dumps(cases))) for rank in range(count)]
    started = [subprocess.Popen([*command, *of], stderr=subprocess.PIPE, env=environment) for of in given]
    try:
        said = [process.communicate(timeout=300)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == (codes or [0] * count), "\n".join(said)
    files = [folder / f"{rank}.json" for rank in range(count)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def main() -> None:
    rank, count, folder, cases = sys.argv[1:]
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    options: dict[str, Any] = {"rank": int(rank), "world_size": int(count), "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=meeting, **options)
    processes, results = Processes(), []
    for i, (case, *arguments) in enumerate(json.loads(cases)):
        print(case, *arguments, file=sys.stderr, flush=True)
        module, _, name = case.rpartition(".")
        function = getattr(importlib.import_module(module or __name__), name)
        own = Path(folder, str(i))
        own.mkdir(exist_ok=True)
        results.append(function(processes, own, *arguments))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # at once: ending a group may wait for ever


if __name__ == "__main__":
    main()
