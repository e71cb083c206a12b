"""The sides of a comparison as plain adapters: each builds, for a problem and a task, a callable that does it once.

Tasks: "forward", "forward_backward" (gradients of the parameters, and of a dense input), "lm_step" (forward, loss,
backward, clip, SGD of a character language model), "generation" (greedy, as many characters as the problem has steps)
and "clip" (of a ClipProblem's gradients). Those of BEYOND are forward and backward of what torch.nn.RNN has no argument
for and its users write around it: "resets" (a state that is zero before some steps), "checkpoint_steps" (backward from
the states of every CHECKPOINT_STEPS-th step, of a loss of h_n) and "lengths" (padded sequences with lengths on the
device).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from charrnn_fast import CharRNN, FusedRNN, clip_grad_norm_
from charrnn_fast.bench.grid import BEYOND
from charrnn_fast.bench.measure import Job
from charrnn_fast.bench.problems import ClipProblem, Problem, data_of
from charrnn_fast.lm.torch_model import TorchCharRNN
from charrnn_fast.reference import generate as reference_generate
from charrnn_fast.reference.clip_grad_norm import clip_grad_norm
from charrnn_fast.reference.elman import elman
from charrnn_fast.reference.training import SGD, train_batches

TASKS = ("forward", "forward_backward", "lm_step", "generation", "clip")
CHECKPOINT_STEPS = 64
MAX_COMPILED_STEPS = 40  # torch.compile unrolls the time loop: minutes of compilation beyond this
PROMPT = 16  # characters that a decoder warms up on
LEARNING_RATE, MAX_NORM = 0.1, 1.0


def prompts(problem: Problem) -> Tensor:
    """(B, PROMPT) int64."""
    generator = torch.Generator().manual_seed(problem.seed)
    return torch.randint(problem.config.I, (problem.config.B, PROMPT), generator=generator).to(problem.device)


def without_grad(run: Callable[[], Any]) -> Job:
    def job() -> Any:
        with torch.no_grad():
            return run()

    return job


class Peer:
    """One side. `why_not` says in a clause why it cannot do a task, or returns None."""

    name = ""
    key = ""  # what the command line calls it
    tasks: tuple[str, ...] = ("forward", "forward_backward", "lm_step")
    package: str | None = None
    takes_minutes = False  # to build: not among the sides unless it is asked for

    def why_not(self, problem: Problem | ClipProblem, task: str) -> str | None:
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if task not in self.tasks:
            return f"it has no {task}"
        return self.limits(problem, task)

    def limits(self, problem: Any, task: str) -> str | None:
        return None

    def job(self, problem: Problem | ClipProblem, task: str) -> Job:
        return getattr(self, task)(problem)


class _WithModel(Peer, ABC):
    """A peer that has the whole language model, and a clip of its own."""

    clip_grad_norm: Callable[..., Tensor]

    @abstractmethod
    def language_model(self, problem: Problem) -> Any:
        """What its training loop or decoder asks of a model."""

    def clip(self, problem: ClipProblem) -> Job:
        parameters, bounds, clip = problem.parameters(), problem.bounds(), self.clip_grad_norm
        return lambda: clip(parameters, next(bounds))

    def generation(self, problem: Problem) -> Job:
        model, prompt = self.language_model(problem), prompts(problem)
        return lambda: reference_generate.generate(model, prompt, problem.config.T)[0]


class _Module(_WithModel):
    """A torch.nn.RNN-like module."""

    tasks = (*TASKS, *BEYOND)

    def module(self, problem: Problem) -> Any:
        return problem.rnn

    def call(self, module: Any, problem: Problem) -> Any:
        return module(problem.input)[0]

    def forward(self, problem: Problem) -> Job:
        return without_grad(partial(self.call, self.module(problem), problem))

    def forward_backward(self, problem: Problem) -> Job:
        module = self.module(problem)
        grad = problem.grad_output
        if not problem.config.tokens:
            data_of(problem.input).requires_grad_()

        def job() -> None:
            for p in module.parameters():
                p.grad = None
            data_of(problem.input).grad = None
            data_of(self.call(module, problem)).backward(grad)

        return job

    def training_step(self, parameters: list[nn.Parameter], forward: Callable[[], tuple[Tensor, ...]]) -> Job:
        """forward: gives the loss, and what a training loop holds until its step is over."""
        optimizer, clip = torch.optim.SGD(parameters, LEARNING_RATE), self.clip_grad_norm

        def job() -> None:
            loss, *_ = forward()
            loss.backward()
            clip(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return job

    def beyond(self, module: Any, problem: Problem, call: Callable[[Tensor], Tensor], grad: Tensor) -> Job:
        """Forward and backward of what ``call`` makes of the padded input."""
        x = problem.padded.detach().requires_grad_()

        def job() -> None:
            for leaf in (x, *module.parameters()):
                leaf.grad = None
            call(x).backward(grad)

        return job


class Ours(_Module):
    """This library, by its public names. `backend`: FusedRNN's."""

    name = "charrnn_fast"
    clip_grad_norm = staticmethod(clip_grad_norm_)

    def __init__(self, backend: str = "auto"):
        self.backend = backend

    def module(self, problem: Problem) -> Any:
        size = (problem.config.I, problem.config.H)
        fused = FusedRNN(*size, device=problem.device, dtype=problem.dtype, backend=self.backend)
        fused.load_state_dict(problem.rnn.state_dict())
        return fused

    def call(self, module: Any, problem: Problem) -> Any:
        if problem.config.tokens:
            return module.forward_tokens(problem.tokens)[0]
        return module(problem.input)[0]

    def language_model(self, problem: Problem) -> CharRNN:
        torch.manual_seed(0)
        model = CharRNN(problem.config.I, problem.config.H, backend=self.backend)
        return model.to(problem.device, problem.dtype)

    def lm_step(self, problem: Problem) -> Job:
        model, batch = self.language_model(problem), problem.batch
        return self.training_step(list(model.parameters()), lambda: model.loss(*batch))

    def generation(self, problem: Problem) -> Job:
        model, prompt = self.language_model(problem), prompts(problem)
        return lambda: model.generate_ids(prompt, problem.config.T)[0]

    def resets(self, problem: Problem) -> Job:
        module, mask = self.module(problem), problem.resets
        return self.beyond(module, problem, lambda x: module.forward_with_resets(x, mask)[0], problem.grad_padded)

    def checkpoint_steps(self, problem: Problem) -> Job:
        module = self.module(problem)
        module.checkpoint_steps = CHECKPOINT_STEPS
        return self.beyond(module, problem, lambda x: module(x)[1], problem.grad_h_n)

    def lengths(self, problem: Problem) -> Job:
        module, lengths = self.module(problem), problem.lengths
        return self.beyond(module, problem, lambda x: module.forward_with_lengths(x, lengths)[0], problem.grad_padded)


class TorchRNN(_Module):
    """PyTorch alone, as one writes it: nn.RNN on one-hot rows, nn.Linear, cross_entropy, its clip and its SGD."""

    name = key = "torch.nn.RNN"
    clip_grad_norm = staticmethod(nn.utils.clip_grad_norm_)

    def language_model(self, problem: Problem) -> TorchCharRNN:
        torch.manual_seed(0)
        return TorchCharRNN(problem.config.I, problem.config.H).to(problem.device, problem.dtype)

    def lm_step(self, problem: Problem) -> Job:
        rnn, V = problem.rnn, problem.config.I
        torch.manual_seed(0)
        head = nn.Linear(problem.config.H, V, device=problem.device, dtype=problem.dtype)
        tokens, targets = problem.tokens, problem.tokens.roll(-1, 0).flatten()

        def forward() -> tuple[Tensor, ...]:
            outputs, h_n = rnn(F.one_hot(tokens, V).to(problem.dtype))
            return F.cross_entropy(head(outputs).flatten(0, 1), targets), outputs, h_n

        return self.training_step([*rnn.parameters(), *head.parameters()], forward)

    def resets(self, problem: Problem) -> Job:
        """A step at a time, the state masked between."""
        rnn, keep = problem.rnn, (~problem.resets).to(problem.dtype).unsqueeze(-1)

        def call(x: Tensor) -> Tensor:
            state, outputs = x.new_zeros(1, problem.config.B, problem.config.H), []
            for x_t, keep_t in zip(x.split(1), keep, strict=True):
                output, state = rnn(x_t, state * keep_t)
                outputs.append(output)
            return torch.cat(outputs)

        return self.beyond(rnn, problem, call, problem.grad_padded)

    def checkpoint_steps(self, problem: Problem) -> Job:
        """Pieces under torch.utils.checkpoint."""
        rnn = problem.rnn

        def call(x: Tensor) -> Tensor:
            state = x.new_zeros(1, problem.config.B, problem.config.H)
            for piece in x.split(CHECKPOINT_STEPS):
                _, state = checkpoint(rnn, piece, state, use_reentrant=False)
            return state

        return self.beyond(rnn, problem, call, problem.grad_h_n)

    def lengths(self, problem: Problem) -> Job:
        """Packed and padded again, the lengths copied to the host."""
        rnn, lengths = problem.rnn, problem.lengths

        def call(x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
            return pad_packed_sequence(rnn(packed)[0], total_length=problem.config.T)[0]

        return self.beyond(rnn, problem, call, problem.grad_padded)


class Reference(_WithModel):
    """The from-scratch loop in tensor operations."""

    name = key = "reference"
    tasks: tuple[str, ...] = TASKS
    clip_grad_norm = staticmethod(clip_grad_norm)

    def limits(self, problem: Any, task: str) -> str | None:
        return "it takes no packed input" if task != "clip" and problem.config.packed else None

    def function(self) -> Callable:
        return elman

    def operands(self, problem: Problem) -> list[Tensor]:
        state = torch.zeros(problem.config.B, problem.config.H, device=problem.device, dtype=problem.dtype)
        return [data_of(problem.input).detach(), state, *problem.weights]

    def forward(self, problem: Problem) -> Job:
        run, operands = self.function(), self.operands(problem)
        return without_grad(lambda: run(*operands)[0])

    def forward_backward(self, problem: Problem) -> Job:
        run, operands = self.function(), self.operands(problem)
        leaves = [p.requires_grad_() for p in (operands[2:] if problem.config.tokens else [operands[0], *operands[2:]])]
        grad = problem.grad_output
        return lambda: torch.autograd.grad(run(*operands)[0], leaves, grad)

    def language_model(self, problem: Problem) -> Any:
        torch.manual_seed(0)
        return CharRNN(problem.config.I, problem.config.H).to(problem.device, problem.dtype).to_reference()

    def lm_step(self, problem: Problem) -> Job:
        net, batches = self.language_model(problem), [problem.batch]
        updater = SGD(net.parameters(), LEARNING_RATE)
        return lambda: list(train_batches(net, batches, updater, MAX_NORM))


class CompiledReference(Reference):
    """torch.compile of the reference: of the recurrence, or of the language model from the ids to the loss."""

    name, key = "torch.compile(reference)", "torch.compile"
    tasks = ("forward", "forward_backward", "lm_step")
    takes_minutes = True

    def limits(self, problem: Any, task: str) -> str | None:
        if problem.config.T > MAX_COMPILED_STEPS:
            return f"it unrolls the {problem.config.T} steps, which takes minutes to compile"
        return super().limits(problem, task)

    def function(self) -> Callable:
        return torch.compile(elman, dynamic=False)

    def language_model(self, problem: Problem) -> Any:
        """What the training loop asks of a model, with a loss that is compiled."""
        net = super().language_model(problem)
        return SimpleNamespace(parameters=net.parameters, loss=torch.compile(net.loss, dynamic=False))
