"""Learning curves as pictures: one run, or several beside each other. Needs matplotlib (ImportError).

Perplexity is drawn on a logarithmic axis; its logarithm to base 2 is bits per character, which the right axis shows.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from charrnn_fast.lm.records import EpochRecord

COLORS = ("#1f5fa8", "#d1495b", "#2e8b57", "#edae49", "#66578c", "#4d9de0", "#8d6346", "#555555")
TICKS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000)
MOST_TICKS = 12


@dataclass(frozen=True)
class Curve:
    """What a picture says of a run: its name, the text, the model with its sizes, and the figures by epoch."""

    name: str
    text: str
    model: str
    history: Sequence[EpochRecord]
    unit: str = "epoch"

    @property
    def figures(self) -> str:
        """The last figures, and the best validation where the last is not the best."""
        last = self.history[-1]
        line = f"{self.unit} {last.epoch}: training perplexity {last.train_ppl:.3f}"
        if last.val_ppl is not None:
            line += f", validation {last.val_ppl:.3f} ({math.log(last.val_ppl):.3f} nats)"
            best = min((r for r in self.history if r.val_ppl is not None), key=lambda r: r.loss)
            line += f", best {best.val_ppl:.3f} at {best.epoch}" if best.epoch != last.epoch else ""
        return line


AXES: dict[str, Callable[[Sequence[EpochRecord]], list[float]]] = {
    "epoch": lambda history: [r.epoch for r in history],
    "million tokens trained on": lambda history: [
        tokens / 1e6 for tokens in itertools.accumulate(r.tokens for r in history)
    ],
    "seconds of training": lambda history: list(itertools.accumulate(r.seconds for r in history)),
}


def plot_curve(curve: Curve, path: Path) -> None:
    """Write a PNG of one run: perplexity and bits per character against epochs, training and validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    _draw(axes, curve, AXES["epoch"], "#1f5fa8", "#d1495b")
    axes.set_xlabel(curve.unit)
    _scales(axes, [curve])
    axes.legend(frameon=False)
    axes.set_title(f"{curve.name}: {curve.model}\n{curve.text}\n{curve.figures}", fontsize=9, loc="left")
    figure.savefig(path, dpi=150)


def plot_runs(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG that compares runs: perplexity and bits per character against epochs, tokens and seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4 + 0.45 * len(curves)), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    colors = [COLORS[i % len(COLORS)] for i in range(len(curves))]
    for panel, (label, along) in zip(panels, AXES.items(), strict=True):
        for curve, color in zip(curves, colors, strict=True):
            _draw(panel, curve, along, color, color)
        panel.set_xlabel(label)
        _scales(panel, curves, left=panel is panels[0], right=panel is panels[-1])
    handles = [panels[0].plot([], [], color=color, linewidth=2)[0] for color in colors]
    lines = [f"{curve.name}: {curve.model}, {curve.text}\n{curve.figures}" for curve in curves]
    figure.legend(handles, lines, loc="outside upper left", frameon=False, fontsize=9)
    figure.supxlabel("solid: training, dashed: validation", fontsize=8, color="#555555")
    figure.savefig(path, dpi=120)


def _draw(axes, curve: Curve, along: Callable[[Sequence[EpochRecord]], list[float]], color: str, other: str) -> None:
    x = along(curve.history)
    marker = "o" if len(x) == 1 else None
    axes.plot(x, [r.train_ppl for r in curve.history], label="training", color=color, linewidth=1.6, marker=marker)
    validated = [(at, r.val_ppl) for at, r in zip(x, curve.history, strict=True) if r.val_ppl is not None]
    if validated:
        axes.plot(
            *zip(*validated, strict=True), label="validation", color=other, linewidth=1.6, linestyle="--", marker=marker
        )


def _scales(axes, curves: Sequence[Curve], left: bool = True, right: bool = True) -> None:
    """The same values as perplexity on the left, and as bits per character on the right."""
    values = [v for c in curves for r in c.history for v in (r.train_ppl, r.val_ppl) if v is not None]
    values = [v for v in values if math.isfinite(v)] or [1.0]
    low, high = max(1.0, min(values) * 0.95), max(values) * 1.05
    ticks = [t for t in TICKS if low <= t <= high]
    if len(ticks) < 2:
        ticks = [round(low, 3), round(high, 3)]
    axes.set(yscale="log", ylim=(low, high))
    axes.set_yticks(ticks[:: -(-len(ticks) // MOST_TICKS)])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    if left:
        axes.set_ylabel("perplexity (log scale)")
    if right:
        bits = axes.twinx()
        bits.set_ylim(math.log2(low), math.log2(high))
        bits.set_ylabel("bits per character")
