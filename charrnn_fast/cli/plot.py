"""charrnn-fast plot: the curves of one run or of several in one picture."""

import argparse
from pathlib import Path

from charrnn_fast.errors import InputError
from charrnn_fast.lm import checkpoint
from charrnn_fast.lm.plots import Curve, plot_runs
from charrnn_fast.lm.records import EpochRecord


def add_parser(commands) -> None:
    p = commands.add_parser(
        "plot",
        help="compare runs in one picture",
        description="Draw perplexity and bits per character of runs against epochs, tokens and seconds.",
    )
    p.add_argument("runs", metavar="RUN", nargs="+", help="the --out folder of a run, or a checkpoint file")
    p.add_argument("--out", type=Path, default=Path("runs.png"), metavar="FILE", help="the picture (default: runs.png)")
    p.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> int:
    curves = [curve_of(Path(run)) for run in options.runs]
    try:
        plot_runs(curves, options.out)
    except ImportError:
        raise InputError("plot needs matplotlib: pip install matplotlib") from None
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture's
        raise InputError(
            f"cannot write the picture {options.out}: {getattr(error, 'strerror', None) or error}"
        ) from None
    for curve in curves:
        print(f"{curve.name}: {curve.figures}")
    print(options.out)
    return 0


def curve_of(run: Path) -> Curve:
    """The curve of a run's last state. Raises InputError if there is none, or it has no whole epoch yet."""
    last = run / checkpoint.LAST
    written = checkpoint.load(last if last.is_file() else run)
    history = [EpochRecord(**record) for record in written.trainer["history"]]
    if not history:
        raise InputError(f"{written.path} is in its first epoch: there is no curve yet")
    name = run.name if run.is_dir() else run.stem
    frozen = () if written.config.get("second_bias", True) else (".bias_hh_",)  # zeros that no optimizer sees
    count = sum(p.numel() for key, p in written.parameters.items() if not any(part in key for part in frozen))
    unit = "iteration" if written.recipe.get("sampler") == "pieces" else "epoch"
    return Curve(name, text_name(written.source), describe(written.kind, written.config, count), history, unit)


def text_name(source: str) -> str:
    """What a picture calls a text: a book's title, or a file's name without its folders."""
    title, bracket, _ = source.partition(" (")
    return f"on {title if bracket else Path(source).name}"


def describe(kind: str, config: dict, parameters: int) -> str:
    """A model in a few words."""
    layers, plural = config["num_layers"], "s" if config["num_layers"] > 1 else ""
    units = f"{layers} layer{plural} of {config['hidden_size']} {config['nonlinearity']} units"
    return f"{kind}, {units}, {parameters:,} parameters"
