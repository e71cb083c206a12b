"""What a run has come to: after a step, after an epoch, and in the middle of one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WHAT_TO_TRY = (
    "expected a finite number; try a lower learning rate (--lr), clipping (--clip), or to go on with --on-nan skip or "
    "restore"
)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to. Losses are means over characters in nats; train_ppl and val_ppl are their exponentials.

    val_ppl_batch_mean is the mean of the per-batch perplexities, which D2L plots. tokens_per_s counts training only.
    step counts the updates since the run began, lr is the last one's learning rate; grad_norm is the mean norm of the
    gradients before clipping, clipped the share of updates above `clip`, skipped how many were not made because they
    were not finite. None stands for what was not measured.
    """

    epoch: int
    train_loss: float
    train_ppl: float
    val_ppl: float | None
    val_ppl_batch_mean: float | None
    tokens: int
    seconds: float
    step: int = 0
    lr: float | None = None
    grad_norm: float | None = None
    clipped: float | None = None
    skipped: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def loss(self) -> float:
        """The loss in nats that a run is judged by: of the validation where there is one, else of the training."""
        return self.train_loss if self.val_ppl is None else math.log(self.val_ppl)


@dataclass(frozen=True)
class StepRecord:
    """One update: its number since the run began, from 1; its epoch, from 1; its learning rate; its batches' tokens.

    Reading loss (the mean in nats of its last batch) or grad_norm (before clipping; None where it is not measured)
    waits for the device.
    """

    step: int
    epoch: int
    batch: int  # batches of the epoch that are done
    lr: float
    tokens: int  # of the epoch so far
    loss_on_device: Tensor
    norm_on_device: Tensor | None

    @property
    def loss(self) -> float:
        return float(self.loss_on_device)

    @property
    def grad_norm(self) -> float | None:
        return None if self.norm_on_device is None else float(self.norm_on_device)


@dataclass
class EpochSoFar:
    """An epoch in progress: all of it that is neither in the model nor in the optimizer."""

    generator: Tensor  # the sampler's generator at the start of the epoch
    counts: list[int] = field(default_factory=list)  # characters of each batch
    tokens: int = 0  # their sum
    losses: list[Tensor] = field(default_factory=list)  # of each batch: scalars on the device
    norms: list[Tensor] = field(default_factory=list)  # of each update
    updates: int = 0
    skipped: int = 0
    seconds: float = 0.0
    state: Any = None  # (L, B, H) that the next batch starts from
    checked: int = 0  # losses that are known to be finite
    _read: tuple[int, int] = (0, 0)  # losses and norms that are on the host

    @property
    def batches(self) -> int:
        return len(self.counts)

    def read(self) -> None:
        """Bring what is still on the device to the host: losses and norms in one transfer. Waits for the device."""
        losses, norms = self._read
        new = [*self.losses[losses:], *self.norms[norms:]]
        if new:
            found = list(_on_host(new))
            self.norms[norms:] = found[len(self.losses) - losses :]
            self.losses[losses:] = found[: len(self.losses) - losses]
            self._read = len(self.losses), len(self.norms)

    def mean_loss(self) -> float:
        """In nats over the characters so far. Waits for the device."""
        self.read()
        weights = torch.tensor(self.counts, dtype=torch.float64, device="cpu")
        return float((_numbers(self.losses) * weights).sum() / weights.sum())

    def norm_figures(self, clip: float | None) -> tuple[float | None, float | None]:
        """The mean norm of the updates that were made, and the share of them above clip; None without any."""
        self.read()
        norms = _numbers(self.norms)
        norms = norms[norms.isfinite()]
        if not len(norms):
            return None, None
        return float(norms.mean()), 0.0 if clip is None else float((norms > clip).double().mean())

    def first_not_finite(self) -> int | None:
        """The index of the first batch, among those not looked at before, whose loss is not finite; None if all are.
        Waits for the device.
        """
        self.read()
        losses = self.losses[self.checked :]
        if losses:
            bad = (~torch.stack(losses).isfinite()).nonzero().flatten().tolist()
            if bad:
                return self.checked + bad[0]
            self.checked = len(self.losses)
        return None

    def what_happened(self, batch: int, step: int, epoch: int) -> str:
        """One line on the batch whose loss or gradient is not finite; step and epoch: where the run is now."""
        loss, update = float(self.losses[batch]), batch * self.updates // max(1, self.batches)
        norms = [float(norm) for norm in self.norms[max(0, update - 1) : update + 1]]
        what = f"the training loss is {loss}"
        if math.isfinite(loss) and norms:
            what = f"the gradient norm is {norms[-1]}"
        at = f"at step {step - self.updates + update + 1} (epoch {epoch}, batch {batch + 1})"
        trend = f", the gradient norm was {norms[0]:.3g} a step before" if len(norms) == 2 else ""
        return f"{what} {at}{trend}: {WHAT_TO_TRY}"

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. Waits for the device."""
        self.read()
        return {
            "generator": self.generator,
            "counts": torch.tensor(self.counts, dtype=torch.int64, device="cpu"),
            "losses": _numbers(self.losses),
            "norms": _numbers(self.norms),
            "updates": self.updates,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "state": self.state,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "EpochSoFar":
        counts = [int(count) for count in state["counts"]]
        losses, norms = list(state["losses"].double()), list(state["norms"].double())
        found = cls(state["generator"], counts, sum(counts), losses, norms)
        found.updates, found.skipped = int(state["updates"]), int(state["skipped"])
        if len(found.losses) != len(counts) or len(found.norms) not in (0, found.updates):
            raise ValueError(
                f"{len(counts)} batches and {found.updates} updates with {len(found.losses)} losses and "
                f"{len(found.norms)} norms"
            )
        torch.Generator().set_state(found.generator.cpu())  # raises for what is no generator's state
        found.seconds, found.state = float(state["seconds"]), state["state"]
        found.checked = len(counts)
        return found


def parts_of(state: Any) -> list[Tensor]:
    """A state's tensors: itself, or those of a tuple, as an LSTM has it; none of None."""
    if state is None or isinstance(state, Tensor):
        return [] if state is None else [state]
    return [part for item in state for part in parts_of(item)]


def each_part(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A state with what the function makes of each of its tensors; None of None."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else function(state)
    return tuple(each_part(part, function) for part in state)


def _numbers(scalars: list[Tensor]) -> Tensor:
    """Scalars on the host as one float64 tensor."""
    return torch.stack(scalars) if scalars else torch.zeros(0, dtype=torch.float64, device="cpu")


def _on_host(scalars: list[Tensor]) -> Tensor:
    """Scalars as one float64 tensor on the CPU, in a transfer for each device and dtype: some may be there already."""
    result = torch.empty(len(scalars), dtype=torch.float64, device="cpu")
    for kind in {(s.device, s.dtype) for s in scalars}:
        places = [i for i, s in enumerate(scalars) if (s.device, s.dtype) == kind]
        result[places] = torch.stack([scalars[i] for i in places]).cpu().double()
    return result
