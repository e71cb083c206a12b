"""The learning curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from charrnn_fast.lm.training import EpochRecord


def plot_curve(history: Sequence[EpochRecord], path: Path, title: str, unit: str = "epoch") -> None:
    """Write a PNG of perplexity against epochs: training, and validation where the run has it. Needs matplotlib
    (ImportError).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    epochs = [record.epoch for record in history]
    axes.plot(epochs, [record.train_ppl for record in history], label="training", color="#1f5fa8", linewidth=1.6)
    validated = [(record.epoch, record.val_ppl) for record in history if record.val_ppl is not None]
    if validated:
        axes.plot(*zip(*validated, strict=True), label="validation", color="#d1495b", linewidth=1.6, linestyle="--")
    axes.set(title=title, xlabel=unit, ylabel="perplexity (log scale)", yscale="log")
    low = min([r.train_ppl for r in history] + [p for _, p in validated])
    high = max([r.train_ppl for r in history] + [p for _, p in validated])
    ticks = [
        t for t in (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000) if low * 0.9 <= t <= high * 1.1
    ]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
