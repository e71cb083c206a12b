"""What a Trainer's options may be."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from charrnn_fast.lm.training import Trainer

MAX_GRAPH_BATCHES = 16  # each one more keeps the activations of one more batch alive
MAX_ACCUMULATE = 4096
ON_NAN = ("stop", "skip", "restore")


def check_options(t: "Trainer") -> None:
    """ValueError for one that is out of range, or two that do not go together."""
    if not 1 <= t.graph_batches <= MAX_GRAPH_BATCHES:
        raise ValueError(f"graph_batches must be 1 to {MAX_GRAPH_BATCHES}, got {t.graph_batches}")
    if not 1 <= t.accumulate <= MAX_ACCUMULATE:
        raise ValueError(f"accumulate must be 1 to {MAX_ACCUMULATE}, got {t.accumulate}")
    if t.clip is not None and not t.clip > 0:
        raise ValueError(f"clip must be above 0, or None for no clipping, got {t.clip}")
    if t.capture not in ("auto", True, False):
        raise ValueError(f"capture must be 'auto', True or False, got {t.capture!r}")
    if t.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {t.precision!r}")
    if t.on_nan not in ON_NAN:
        raise ValueError(f"on_nan must be one of {', '.join(ON_NAN)}, got {t.on_nan!r}")
    if t.patience is not None and t.patience < 1:
        raise ValueError(f"patience must be at least 1 epoch, or None, got {t.patience}")
    if t.accumulate > 1 and t.graph_batches > 1:
        raise ValueError(f"accumulate {t.accumulate} and graph_batches {t.graph_batches}: one of them at a time")
