"""Several processes that train one model together, on torch.distributed's group as torchrun starts it.

    g = sum over processes of n_r g_r / sum of n_r        n_r: characters of process r in this update

Every process draws the same batches from the same seed and takes its share of the rows. Gradients and losses go through
one flat buffer, weighed by characters and added up over the processes, before they are clipped. So what every process
does next is decided by the same numbers, parameters stay the same everywhere, and the curve is the one of a single
process with the whole batch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm.records import each_part

if TYPE_CHECKING:
    from charrnn_fast.lm.language_model import LanguageModel

T = TypeVar("T")


class ProcessLost(TrainingError):
    """Another process of the run has ended, or cannot be reached."""


class Processes:
    """The processes of a group, by default torch.distributed's own, which has to be there (init_process_group).

    Every method is to be called by all of them, in the same order; `share` and `own` alone talk to nobody. One that is
    gone is a ProcessLost in the others.

    Attributes: rank, this process's number; count, how many there are; first, whether this is rank 0, the one that
    prints and writes.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):  # a build of torch may have none
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.first = self.rank == 0

    def share(self, whole: Tensor) -> Tensor:
        """This process's rows of a batch (B, ...), a view: as many as the others', or one more or less."""
        return whole.tensor_split(self.count)[self.rank]

    def add_up(self, values: Tensor) -> None:
        """Replace values by their sum over all processes."""
        with _together():
            held = self._taken(values)
            dist.all_reduce(held, group=self.group)
            if held is not values:
                values.copy_(held)

    def spread(self, values: Tensor) -> None:
        """Replace values by those of the first process."""
        with _together(), torch.no_grad():
            held = self._taken(values.detach())
            dist.broadcast(held, group=self.group, group_src=0)
            values.copy_(held)

    def meet(self, model: "LanguageModel", generator: torch.Generator) -> None:
        """Begin together: with the first process's parameters, buffers and state of the generator."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.spread(tensor)
        generator.set_state(self.from_first(generator.get_state()))

    def any(self, here: bool) -> bool:
        """Whether it is so in one process at least."""
        flag = torch.tensor([int(here)], dtype=torch.int32, device="cpu")
        self.add_up(flag)
        return bool(flag.item())

    def from_first(self, value: T) -> T:
        """What the first process has here; the others' own values are dropped."""
        values = [value]
        with _together():
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def of_all(self, value: T) -> list[T]:
        """What every process has here, by rank."""
        values: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def whole(self, state: Any) -> Any:
        """The states (L, B, H) of all rows, on the CPU, from each process's own, None where it has no rows; tuples part
        by part.
        """
        held = [s for s in self.of_all(each_part(state, lambda part: part.detach().cpu())) if s is not None]
        return None if not held else _joined(held)

    def own(self, state: Any) -> Any:
        """This process's rows of such a state, on which `whole` is undone; None if it has none."""
        if isinstance(state, Tensor):
            part = state.tensor_split(self.count, dim=1)[self.rank]
            return part.contiguous() if part.shape[1] else None
        parts = None if state is None else [self.own(part) for part in state]
        return None if parts is None or any(part is None for part in parts) else tuple(parts)

    def why_not_captured(self) -> str | None:
        """None if what these processes tell each other can be part of a CUDA graph, else one clause."""
        return None if self._has("cuda", "nccl") else "only NCCL's collectives can be part of a CUDA graph"

    def _taken(self, values: Tensor) -> Tensor:
        """The values where the group's backends take them, which NCCL's alone do on a GPU only; contiguous."""
        return (values if self._has(values.device.type) else values.cuda()).contiguous()

    def _has(self, device: str, backend: str | None = None) -> bool:
        """Whether the group takes tensors of such a device (by that backend)."""
        config = dist.get_backend_config(self.group)
        return any(
            entry.partition(":")[0] == device and (backend is None or entry.partition(":")[2] == backend)
            for entry in str(config).split(",")
        )


class SharedGradients:
    """The gradients of parameters, and the losses behind them, made those of the whole batch in every process.

    Args:
        processes: who takes part. parameters: the same in each of them, of any sizes and floating-point types.

    Attributes: wish, a number (1,) on the parameters' device, which the same message adds up into `wishes` (1,); None
    before the first call.
    """

    def __init__(self, processes: Processes, parameters: Sequence[Tensor]):
        self.processes, self.parameters = processes, list(parameters)
        self.wish = torch.zeros(1, dtype=torch.float32, device=self.parameters[0].device)
        self.wishes: Tensor | None = None
        self._used = [True] * len(self.parameters)  # which of them get a gradient where there are rows
        self._flat: Tensor | None = None

    @torch.no_grad()
    def __call__(self, losses: Sequence[Tensor], counts: Sequence[int]) -> None:
        """Bring gradients and losses up to date, in place: .grad of each parameter from the mean over this process's
        characters to the mean over all processes', and each batch's loss likewise.

        Args:
            losses: scalars on the parameters' device, the mean loss of each batch over this process's rows.
            counts: characters of each of these batches in this process; 0 where it has no row of one.
        """
        if any(counts):
            self._used = [p.grad is not None for p in self.parameters]
        sizes, k = [p.numel() for p in self.parameters], len(losses)
        flat, count = self._buffer(sum(sizes) + 2 * k + 1), sum(counts)
        all_gradients, summed, weights, self.wishes = flat.split([sum(sizes), k, k, 1])
        gradients = [part.view(p.shape) for part, p in zip(all_gradients.split(sizes), self.parameters, strict=True)]
        self.wishes.copy_(self.wish)
        for p, place in zip(self.parameters, gradients, strict=True):
            if p.grad is None:
                place.zero_()
            else:
                torch.mul(p.grad, count, out=place) if p.dtype == flat.dtype else place.copy_(p.grad).mul_(count)
        for i, (loss, weight) in enumerate(zip(losses, counts, strict=True)):
            summed[i].copy_(loss).mul_(weight)
            weights[i].fill_(weight)
        self.processes.add_up(flat)
        all_gradients.div_(weights.sum())
        summed.div_(weights)
        for p, place, used in zip(self.parameters, gradients, self._used, strict=True):
            if used:
                p.grad = place if p.dtype == flat.dtype else place.to(p.dtype)
        for i, loss in enumerate(losses):
            loss.copy_(summed[i])

    def _buffer(self, size: int) -> Tensor:
        """So many numbers, the same memory every time; float32 at least, as characters are counted in them."""
        if self._flat is None or self._flat.numel() != size:
            dtype = torch.float32
            for p in self.parameters:
                dtype = torch.promote_types(dtype, p.dtype)
            self._flat = torch.empty(size, dtype=dtype, device=self.parameters[0].device)
        return self._flat


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are such: a closed connection, a time-out
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessLost(f"another process of this run has ended or cannot be reached: {reason}") from error


def _joined(states: Sequence[Any]) -> Any:
    if isinstance(states[0], Tensor):
        return torch.cat(list(states), dim=1)
    return tuple(_joined(parts) for parts in zip(*states, strict=True))


# ---- as torchrun starts them --------------------------------------------------------------------------------------


def launched() -> int:
    """How many processes torchrun, or whoever has set its variables, has started for this run; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def restarts() -> int:
    """How often torchrun has started this run anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_rank() -> int:
    """This process's number among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def speaks() -> bool:
    """Whether this process prints for the run: the first of several, or the only one."""
    return launched() == 1 or os.environ["RANK"] == "0"


def join() -> Processes:
    """Meet the other processes that torchrun has started. On a CPU they talk through gloo, on GPUs through NCCL.

    Raises ProcessLost if they cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _together():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart, with the addresses of processes that are gone.
            rank, count = int(os.environ["RANK"]), launched()
            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.PrefixStore(f"charrnn_fast/{restarts()}", dist.TCPStore(*where, count, is_master=False))
            dist.init_process_group(backend, store=store, rank=rank, world_size=count)
        else:
            dist.init_process_group(backend)
    return Processes()


def leave() -> None:
    """End what `join` has begun, if it has."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
