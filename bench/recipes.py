"""Run the five recipes to their end and record their curves: python bench/recipes.py --runs DIR [--only NAME ...]

Each run goes to DIR/NAME as `charrnn-fast train --out` writes it; a run that is complete there is not run again. The
curves and last perplexities go to bench/results/recipes.json, the Markdown table of README to standard output.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from charrnn_fast.lm import checkpoint
from charrnn_fast.lm.generation import generate

RESULTS = Path(__file__).parent / "results" / "recipes.json"


@dataclass(frozen=True)
class Training:
    """One row: what to train, how many epochs, and the range that the recipe's headline figure has to be in."""

    name: str
    arguments: str
    epochs: int
    low: float
    high: float
    figure: str  # val_ppl, train_ppl, val_nats (loss of the validation), mean_loss_240_250


RUNS = [
    *(
        Training(f"scratch-reference-{s}", f"--recipe scratch --model reference --seed {s}", 100, 7.0, 7.6, "val_ppl")
        for s in range(3)
    ),
    Training("scratch-fused-0", "--recipe scratch", 100, 7.0, 7.6, "val_ppl"),
    *(
        Training(f"concise-torch-{s}", f"--recipe concise --model torch --seed {s}", 100, 6.9, 7.5, "val_ppl")
        for s in range(3)
    ),
    Training("concise-fused-0", "--recipe concise", 100, 6.9, 7.5, "val_ppl"),
    Training("ch8-sequential-0", "--recipe ch8 --sampler sequential", 500, 1.0, 1.1, "train_ppl"),
    Training("ch8-random-0", "--recipe ch8 --sampler random", 500, 1.0, 1.65, "train_ppl"),
    Training("santa-0", "--recipe santa --epochs 251", 251, 0.0, 1.75, "mean_loss_240_250"),
    Training("shakespeare-0", "--recipe shakespeare", 8, 0.0, 1.60, "val_nats"),
]


def train(run: Training, folder: Path) -> dict:
    """Train unless the folder holds the finished run; its figures, curve and decoded text."""
    history_file = folder / "history.json"
    if not history_file.exists() or len(json.loads(history_file.read_text())) < run.epochs:
        resume = ["--resume"] if (folder / checkpoint.LAST).exists() else []
        command = [sys.executable, "-m", "charrnn_fast", "train", *run.arguments.split(), "--out", str(folder), *resume]
        subprocess.run(command, check=True)
    history = json.loads(history_file.read_text())
    last = history[-1]
    figures = {name: last[name] for name in ("train_ppl", "val_ppl", "val_ppl_batch_mean")}
    if last["val_ppl"] is not None:
        figures["val_nats"] = math.log(last["val_ppl"])
    if run.figure == "mean_loss_240_250":
        figures[run.figure] = sum(r["train_loss"] for r in history[-11:]) / 11
    written = checkpoint.load(folder / checkpoint.LAST)
    prompt = written.recipe["prompts"][0]
    sampled = prompt["temperature"] is not None
    text = generate(
        written.build(),
        written.vocab,
        prompt["text"],
        prompt["num_chars"],
        temperature=prompt["temperature"],
        seed=0 if sampled else None,
    )
    every = max(1, run.epochs // 50)
    curve = [
        [r["epoch"], round(r["train_loss"], 4), r["val_ppl"] and round(r["val_ppl"], 4)]
        for r in history
        if r["epoch"] % every == 0 or r["epoch"] in (1, run.epochs)
    ]
    return {
        "command": f"charrnn-fast train {run.arguments}",
        "figure": run.figure,
        "value": figures[run.figure],
        "accepted": [run.low, run.high],
        **figures,
        "text": text,
        "curve": curve,  # epoch, training loss in nats, validation perplexity
    }


def table(results: dict) -> str:
    """README's table."""
    names = {
        "val_ppl": "validation perplexity",
        "train_ppl": "training perplexity",
        "mean_loss_240_250": "mean loss, iterations 240-250",
        "val_nats": "validation, nats a character",
    }
    lines = ["| command | figure | measured | accepted |", "|---|---|---|---|"]
    for run in RUNS:
        if run.name in results:
            row = results[run.name]
            low, high = row["accepted"]
            accepted = f"{low:g} to {high:g}" if run.figure == "val_ppl" else f"at most {high:g}"
            value = f"{row['value']:.{3 if run.figure == 'val_nats' else 2}f}"
            lines.append(f"| `{row['command']}` | {names[run.figure]} | {value} | {accepted} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS], help="these runs only")
    options = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    for run in RUNS:
        if options.only is None or run.name in options.only:
            content["runs"][run.name] = train(run, options.runs / run.name)
            content["machine"] = {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content["runs"]))
    outside = [n for n, r in content["runs"].items() if not r["accepted"][0] <= r["value"] <= r["accepted"][1]]
    if outside:
        print(f"outside the accepted range: {', '.join(outside)}", file=sys.stderr)
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
