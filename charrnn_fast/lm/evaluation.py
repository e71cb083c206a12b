"""Loss and perplexity of a model over batches, without training on them."""

from collections.abc import Callable, Iterable

import torch

from charrnn_fast.lm.data import Batch
from charrnn_fast.lm.model import CharRNN, evaluating
from charrnn_fast.lm.records import perplexity
from charrnn_fast.reference import training as reference
from charrnn_fast.reference.language_model import RNNLM


class Stopped(Exception):
    """An evaluation was told to stop before its end."""


def validate(
    model: CharRNN | RNNLM,
    batches: Iterable[Batch],
    *,
    carry_state: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """exp(mean loss over characters) and the mean of the per-batch perplexities; None if there are no batches.

    The model is in evaluation mode meanwhile. `stopped` is asked after each batch; Stopped is raised if it says so.
    """
    measured = []
    with evaluating(model):
        for figures in reference.evaluate_batches(model, batches, carry_state=carry_state):
            measured.append(figures)
            if stopped():
                raise Stopped
    if not measured:
        return None
    losses = torch.stack([loss for loss, _ in measured]).double().cpu()
    counts = torch.tensor([count for _, count in measured], dtype=torch.float64, device="cpu")
    return perplexity(float((losses * counts).sum() / counts.sum())), float(losses.exp().mean())
