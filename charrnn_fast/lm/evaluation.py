"""Loss and perplexity of a model over batches, without training on them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from charrnn_fast.lm.data import Batch
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.forms import of
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.records import EpochRecord, perplexity
from charrnn_fast.reference import training as reference


def epochs_since_best(history: Sequence[EpochRecord]) -> int:
    """Epochs since the one with the lowest loss, the first of such."""
    losses = [record.loss for record in history]
    return len(losses) - 1 - losses.index(min(losses))


class Stopped(Exception):
    """An evaluation was told to stop before its end."""


def validate(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    carry_state: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> tuple[float, float] | None:
    """exp(mean loss over characters) and the mean of the per-batch perplexities; None if there are no batches.

    The model is in evaluation mode meanwhile. `stopped` is asked after each batch, of several processes after each
    16th; Stopped is raised if it says so. Of `processes` each takes its rows of every batch, and all return the same.
    """
    sizes: list[int] = []  # characters of every batch
    own: list[int] = []  # the batches in which this process has rows

    def mine() -> Iterator[Batch]:
        for X, Y in batches:
            sizes.append(Y.numel())
            if processes is not None:
                X, Y = processes.share(X), processes.share(Y)
            if len(Y):
                own.append(len(sizes) - 1)
                yield X, Y
            if (processes is None or len(sizes) % 16 == 0) and stopped():
                raise Stopped

    model = of(model)
    with model.evaluating():
        measured = list(reference.evaluate_batches(model, mine(), carry_state=carry_state))
    if not sizes:
        return None
    losses = torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
    if measured:
        losses[own] = torch.stack([loss for loss, _ in measured]).double().cpu()
    counts = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    if processes is not None:
        shares = torch.zeros_like(losses)
        shares[own] = torch.tensor([count for _, count in measured], dtype=torch.float64, device="cpu")
        losses *= shares / counts
        processes.add_up(losses)
    return perplexity(float((losses * counts).sum() / counts.sum())), float(losses.exp().mean())
