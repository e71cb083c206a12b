"""What a Trainer's options may be."""

MAX_GRAPH_BATCHES = 16  # each one more keeps the activations of one more batch alive
MAX_ACCUMULATE = 4096
ON_NAN = ("stop", "skip", "restore")


def check_options(
    graph_batches: int,
    accumulate: int,
    clip: float | None,
    capture: bool | str,
    precision: str,
    on_nan: str,
    patience: int | None,
) -> None:
    """ValueError for one that is out of range, or two that do not go together."""
    if not 1 <= graph_batches <= MAX_GRAPH_BATCHES:
        raise ValueError(f"graph_batches must be 1 to {MAX_GRAPH_BATCHES}, got {graph_batches}")
    if not 1 <= accumulate <= MAX_ACCUMULATE:
        raise ValueError(f"accumulate must be 1 to {MAX_ACCUMULATE}, got {accumulate}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None for no clipping, got {clip}")
    if capture not in ("auto", True, False):
        raise ValueError(f"capture must be 'auto', True or False, got {capture!r}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
    if on_nan not in ON_NAN:
        raise ValueError(f"on_nan must be one of {', '.join(ON_NAN)}, got {on_nan!r}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1 epoch, or None, got {patience}")
    if accumulate > 1 and graph_batches > 1:
        raise ValueError(f"accumulate {accumulate} and graph_batches {graph_batches}: one of them at a time")
