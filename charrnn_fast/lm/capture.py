"""A step recorded once for each shape of batch, and replayed: one CUDA graph instead of its launches. A training step,
or an evaluation, which updates nothing.

The first steps of a shape run as they are, on the stream and the buffers that the recording will use, so that all that
is lazy is done by then: kernels compiled, workspaces allocated, the optimiser's state made. They are steps of the
training itself, so there is nothing to take back after them, and the curve is the one of the plain loop. Recording runs
nothing; from then on a step is a copy of what differs in its batch (where its windows begin), a replay, and one launch
that keeps loss and norm from being overwritten. A shape that is seen too rarely is never recorded.

Python does not run in a replay. What it fixed when the step was recorded is compared at the start of an epoch
(`RecordedSteps.refresh`): addresses of parameters and optimiser state, learning rate and other hyperparameters.
"""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm.batches import Batch, Pair, as_batch
from charrnn_fast.lm.language_model import LanguageModel, State

WARM_UP_STEPS = 3  # of a shape before it is recorded, as many as torch.cuda.make_graphed_callables makes
MAX_SHAPES = 8  # recorded at most; the samplers make two or three

Work = Callable[[], tuple[Tensor, ...]]  # returns scalars: a loss, and of a training step the gradients' norm


class Step(Protocol):
    """What is recorded: a training step, or an evaluation.

    Attributes: norm, a scalar that belongs to the last call, or None.
    """

    norm: Tensor | None

    def __call__(self, batch: Batch | Pair, state: State = None, into: Tensor | None = None) -> tuple[Tensor, State]:
        """A batch and the state (L, B, H), None for zeros -> a loss, a scalar, and the next state, put `into` that
        tensor, if there is one; both detached.
        """

    def run(self, batch: Batch | Pair, state: State = None, into: Tensor | None = None) -> tuple[Tensor, State]:
        """The same, and the next call may overwrite norm."""


def why_not_on(device: torch.device) -> str | None:
    """None if steps can be captured on this device, else one clause that says why not."""
    return None if device.type == "cuda" else "a CUDA graph needs a CUDA or ROCm device"


def why_not(model: LanguageModel, graph_batches: int = 1, asked: bool = True) -> str | None:
    """None if a training step of the model can be captured, else one clause that says why not. asked: is it asked for,
    rather than welcome?
    """
    if (why := model.why_not_captured(asked)) is not None:
        return why
    if graph_batches > 1:
        return f"the graph is kept across {graph_batches} batches, and a captured step is one batch"
    return why_not_on(model.device)


def why_not_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """None if the optimiser's step can be captured, else one clause that says why not."""
    name = type(optimizer).__name__
    if "capturable" not in optimizer.defaults:
        return None if type(optimizer) is torch.optim.SGD else f"{name} has no option capturable"
    if all(group["capturable"] for group in optimizer.param_groups):
        return None
    return f"{name} keeps its step count on the host: make it with capturable=True"


def dependencies(model: LanguageModel, optimizer: torch.optim.Optimizer | None) -> object:
    """What a recorded step holds fast beside its inputs; equal as long as a replay is what the step would be."""

    def fixed(value: object) -> object:
        return value.data_ptr() if isinstance(value, Tensor) else value

    parameters = [(p.data_ptr(), p.requires_grad) for p in model.parameters()]
    if optimizer is None:
        return parameters
    groups = [{k: fixed(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = [fixed(v) for values in optimizer.state.values() for v in values.values()]
    return parameters, groups, state


class Recorder(Protocol):
    """How work on the device is recorded."""

    def run(self, work: Work) -> tuple[Tensor, ...]:
        """Run work in the place where it will be recorded; returns what it returns."""

    def record(self, work: Work) -> Work:
        """Record work without running it; returns what runs it. Raises whatever keeps it from being recorded.

        The scalars that a replay returns may be overwritten by the next.
        """


_NEVER_ENDED: list[torch.cuda.CUDAGraph] = []  # the allocator goes on asking such a graph whether memory is for it


class CudaGraphRecorder:
    """Work on a CUDA or ROCm device, recorded as CUDA graphs, each with a pool of memory of its own.

    Gradients are born and freed inside the pool: a replay writes them where the recording put them, with nothing to
    clear before.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Work) -> tuple[Tensor, ...]:
        """Run work on the recording's stream, after all that was launched so far and before all that follows."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            # Capturable optimisers warn of steps that are not captured; these few are meant.
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            found = work()
        current.wait_stream(self.stream)
        return found

    def record(self, work: Work) -> Work:
        """Capture work as a CUDA graph; returns its replay."""
        graph = torch.cuda.CUDAGraph()
        found: tuple[Tensor, ...] | None = None
        failure: Exception | None = None
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    try:
                        found = work()
                    except Exception as error:
                        failure = error
            except Exception as error:  # a capture that work() has invalidated cannot be ended either
                failure = failure or error
                _NEVER_ENDED.append(graph)
            finally:
                torch.cuda.set_stream(current)  # which torch.cuda.graph leaves out where ending fails
        if failure is not None or found is None:
            raise failure or RuntimeError("the capture was left without a loss")
        captured = found

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return captured

        return replay


@dataclass
class _Slot:
    """What belongs to one kind of batch: its buffers, and how to replay its step once that is recorded."""

    batch: Batch  # on the buffers
    state: Tensor | None  # (L, B, H) carried from step to step, shared by the kinds of this B
    steps: int = 0
    replay: Work | None = None


class RecordedSteps:
    """A step with the arguments and results of the plain one, recorded after a few calls for each kind of batch.

    Args:
        step: the plain step. It must look at no value and update everything in place. Its norm is set at each call.
        recorder: what records it.
        fixed: what a recording depends on beside its inputs, to be compared; see `dependencies`.
        zero_state: batch size -> state (L, B, H) of zeros, if the state is carried; None if each step starts from zero.
        required: whether a step that cannot be recorded is a TrainingError.

    Attributes: reason, why steps are not recorded any more: one clause, or None. The state that a call returns is a
    buffer, which the next call overwrites.
    """

    def __init__(
        self,
        step: Step,
        recorder: Recorder,
        fixed: Callable[[], object],
        zero_state: Callable[[int], Tensor] | None,
        *,
        required: bool = False,
    ):
        self._step, self._recorder, self._fixed, self._zero_state = step, recorder, fixed, zero_state
        self._required = required
        self._slots: dict[Hashable, _Slot] = {}
        self._states: dict[int, Tensor] = {}
        self._recorded_with: object = None
        self.reason: str | None = None

    def refresh(self) -> None:
        """Forget what was recorded if something that it depends on has changed: to be called between epochs."""
        if self._recorded_with is not None and self._recorded_with != self._fixed():
            self._slots.clear()
            self._recorded_with = None

    def __call__(self, batch: Batch | Pair, state: State = None) -> tuple[Tensor, State]:
        """One step. batch: on the device; state: (L, B, H), None for zeros. Returns its loss and the next state."""
        batch = as_batch(batch)
        slot = self._find_slot(batch) if self.reason is None else None
        if slot is None or (state is not None and (slot.state is None or state.shape != slot.state.shape)):
            return self._step(batch, state)
        for buffer, given in zip(slot.batch.inputs(), batch.inputs(), strict=True):
            buffer.copy_(given)
        if slot.state is not None:
            if state is None:
                slot.state.zero_()
            elif state is not slot.state:
                slot.state.copy_(state)
        if slot.replay is None and slot.steps >= WARM_UP_STEPS:
            self._record(slot)
            if self.reason is not None:
                return self._step(batch, slot.state)
        found = self._recorder.run(lambda: self._run(slot)) if slot.replay is None else slot.replay()
        slot.steps += 1
        loss, *norms = _kept(found)
        self._step.norm = norms[0] if norms else None
        return loss, slot.state

    def _run(self, slot: _Slot) -> tuple[Tensor, ...]:
        """The plain step on a slot's buffers."""
        loss, _ = self._step.run(slot.batch, slot.state, slot.state)
        return (loss,) if self._step.norm is None else (loss, self._step.norm)

    def _record(self, slot: _Slot) -> None:
        try:
            slot.replay = self._recorder.record(lambda: self._run(slot))
        except Exception as error:  # whatever cannot be captured: a synchronisation, memory, a driver's limit
            message = str(error).strip().splitlines() or [""]
            self.reason = f"recording a step raised {type(error).__name__}: {message[0]}"
            self._slots.clear()
            if self._required:
                raise TrainingError(f"a training step cannot be captured: {self.reason}") from error
        else:
            self._recorded_with = self._fixed()

    def _find_slot(self, batch: Batch) -> _Slot | None:
        """The slot of this kind of batch, made if there is none yet; None if there are too many kinds."""
        kind = batch.kind()
        slot = self._slots.get(kind)
        if slot is None and len(self._slots) < MAX_SHAPES:
            rows, _ = batch.shape
            if self._zero_state is not None and rows not in self._states:
                self._states[rows] = self._zero_state(rows)
            buffers = [_buffer_like(given) for given in batch.inputs()]
            slot = self._slots[kind] = _Slot(batch.on(buffers), self._states.get(rows))
        return slot


def _kept(scalars: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The scalars where no replay overwrites them, in one launch if they are of one kind."""
    if len({s.dtype for s in scalars}) > 1:
        return tuple(s.clone() for s in scalars)
    return torch.stack(scalars).unbind()


def _buffer_like(given: Tensor) -> Tensor:
    """An empty tensor of these shape and strides: they decide in which order kernels lay out and add up rows."""
    if 0 in given.stride():
        return torch.empty_like(given)
    return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
