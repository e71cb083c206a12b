"""Loss and perplexity of a model over batches, without training on them."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from charrnn_fast.lm.batches import Batch, Pair, as_batch
from charrnn_fast.lm.capture import RecordedSteps
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.forms import of
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.recordings import Recordings
from charrnn_fast.lm.records import EpochRecord, perplexity
from charrnn_fast.lm.step import Evaluation


def epochs_since_best(history: Sequence[EpochRecord]) -> int:
    """Epochs since the one with the lowest loss, the first of such."""
    losses = [record.loss for record in history]
    return len(losses) - 1 - losses.index(min(losses))


class Stopped(Exception):
    """An evaluation was told to stop before its end."""


def validate(
    model: LanguageModel,
    batches: Iterable[Batch | Pair],
    *,
    carry_state: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
    step: Evaluation | RecordedSteps | None = None,
) -> tuple[float, float] | None:
    """exp(mean loss over characters) and the mean of the per-batch perplexities; None if there are no batches.

    The model is in evaluation mode meanwhile. `stopped` is asked after each batch, of several processes after each
    16th; Stopped is raised if it says so. Of `processes` each takes its rows of every batch, and all return the same.
    `step` computes a batch's loss, by default recorded where that can be. A device is waited for once, at the end.
    """
    sizes: list[int] = []  # characters of every batch
    own: list[int] = []  # the batches in which this process has rows
    losses: list[Tensor] = []  # of these
    counts: list[int] = []  # its own characters in each of them
    model = of(model)
    run = step or Recordings(model).evaluation(carry_state)
    state = None
    with model.evaluating():
        for batch in map(as_batch, batches):
            sizes.append(batch.count)
            if processes is not None:
                batch = batch.share(processes)
            if batch.count:
                loss, state = run(batch, state if carry_state else None)
                own.append(len(sizes) - 1)
                losses.append(loss)
                counts.append(batch.count)
            if (processes is None or len(sizes) % 16 == 0) and stopped():
                raise Stopped
    if not sizes:
        return None
    found = torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
    if losses:
        found[own] = torch.stack(losses).cpu().double()
    whole = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    if processes is not None:
        shares = torch.zeros_like(found)
        shares[own] = torch.tensor(counts, dtype=torch.float64, device="cpu")
        found *= shares / whole
        processes.add_up(found)
    return perplexity(float((found * whole).sum() / whole.sum())), float(found.exp().mean())
