"""The sides of a comparison as plain adapters: each builds, for a problem and a task, a callable that does it once.

Tasks: "forward", "forward_backward" (gradients of the parameters, and of a dense input), "lm_step" (forward, loss,
backward, clip, SGD of a character language model), "generation" (greedy, as many characters as the problem has steps)
and "clip" (of a ClipProblem's gradients). Those of BEYOND are forward and backward of what torch.nn.RNN has no argument
for and its users write around it: "resets" (a state that is zero before some steps), "checkpoint_steps" (backward from
the states of every CHECKPOINT_STEPS-th step, of a loss of h_n) and "lengths" (padded sequences with lengths on the
device).
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from charrnn_fast import CharRNN, FusedRNN, clip_grad_norm_
from charrnn_fast.bench.measure import Job
from charrnn_fast.bench.problems import ClipProblem, Problem
from charrnn_fast.lm.torch_model import TorchCharRNN
from charrnn_fast.reference import generate as reference_generate
from charrnn_fast.reference.clip_grad_norm import clip_grad_norm
from charrnn_fast.reference.elman import elman
from charrnn_fast.reference.language_model import RNNLM
from charrnn_fast.reference.training import SGD, train_batches

TASKS = ("forward", "forward_backward", "lm_step", "generation", "clip")
BEYOND = ("resets", "checkpoint_steps", "lengths")
CHECKPOINT_STEPS = 64
MAX_COMPILED_STEPS = 40  # torch.compile unrolls the time loop: minutes of compilation beyond this
PROMPT = 16  # characters that a decoder warms up on
LEARNING_RATE, CLIP = 0.1, 1.0


def data_of(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _batch(problem: Problem) -> tuple[Tensor, Tensor]:
    """X and Y (B, T): each character's successor is the next one."""
    X = problem.tokens.T.contiguous()
    return X, X.roll(-1, 1)


def prompts(problem: Problem) -> Tensor:
    """(B, PROMPT) int64."""
    generator = torch.Generator().manual_seed(problem.seed)
    return torch.randint(problem.config.I, (problem.config.B, PROMPT), generator=generator).to(problem.device)


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


class _Module(Peer):
    """A torch.nn.RNN-like module."""

    tasks = (*TASKS, *BEYOND)

    def module(self, problem: Problem) -> nn.Module:
        return problem.rnn

    def call(self, module: Any, problem: Problem) -> Any:
        return module(problem.input)[0]

    def forward(self, problem: Problem) -> Job:
        module = self.module(problem)
        call = self.call
        assert problem.input is not None and problem.tokens is not None  # made here, not in the timed call

        def job() -> Any:
            with torch.no_grad():
                return call(module, problem)

        return job

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

    def beyond(self, module: Any, x: Tensor, call: Callable[[Tensor], Tensor], grad: Tensor) -> Job:
        """Forward and backward of what ``call`` makes of x."""
        x = x.detach().requires_grad_()

        def job() -> None:
            for leaf in (x, *module.parameters()):
                leaf.grad = None
            call(x).backward(grad)

        return job


class Ours(_Module):
    """This library, by its public names. `backend`: FusedRNN's."""

    name = "charrnn_fast"

    def __init__(self, backend: str = "auto"):
        self.backend = backend

    def module(self, problem: Problem) -> nn.Module:
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
        model = self.language_model(problem)
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, LEARNING_RATE)
        X, Y = _batch(problem)

        def job() -> None:
            loss, _ = model.loss(X, Y)
            loss.backward()
            clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return job

    def generation(self, problem: Problem) -> Job:
        model, prompt = self.language_model(problem), prompts(problem)
        return lambda: model.generate_ids(prompt, problem.config.T)[0]

    def clip(self, problem: ClipProblem) -> Job:
        parameters, bounds = problem.parameters(), problem.bounds()
        return lambda: clip_grad_norm_(parameters, next(bounds))

    def resets(self, problem: Problem) -> Job:
        module: Any = self.module(problem)
        mask = problem.resets
        return self.beyond(
            module, problem.padded, lambda x: module.forward_with_resets(x, mask)[0], problem.grad_padded
        )

    def checkpoint_steps(self, problem: Problem) -> Job:
        module: Any = self.module(problem)
        module.checkpoint_steps = CHECKPOINT_STEPS
        return self.beyond(module, problem.padded, lambda x: module(x)[1], problem.grad_h_n)

    def lengths(self, problem: Problem) -> Job:
        module: Any = self.module(problem)
        lengths = problem.lengths
        return self.beyond(
            module, problem.padded, lambda x: module.forward_with_lengths(x, lengths)[0], problem.grad_padded
        )


class TorchRNN(_Module):
    """PyTorch alone, as one writes it: nn.RNN on one-hot rows, nn.Linear, cross_entropy, its clip and its SGD."""

    name = key = "torch.nn.RNN"

    def lm_step(self, problem: Problem) -> Job:
        rnn, V = problem.rnn, problem.config.I
        torch.manual_seed(0)
        head = nn.Linear(problem.config.H, V, device=problem.device, dtype=problem.dtype)
        parameters = [*rnn.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, LEARNING_RATE)
        tokens, targets = problem.tokens, problem.tokens.roll(-1, 0).flatten()

        def job() -> None:
            outputs, _ = rnn(F.one_hot(tokens, V).to(problem.dtype))
            F.cross_entropy(head(outputs).flatten(0, 1), targets).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return job

    def generation(self, problem: Problem) -> Job:
        torch.manual_seed(0)
        model = TorchCharRNN(problem.config.I, problem.config.H).to(problem.device, problem.dtype)
        prompt = prompts(problem)
        return lambda: reference_generate.generate(model, prompt, problem.config.T)[0]

    def clip(self, problem: ClipProblem) -> Job:
        parameters, bounds = problem.parameters(), problem.bounds()
        return lambda: nn.utils.clip_grad_norm_(parameters, next(bounds))

    def resets(self, problem: Problem) -> Job:
        """A step at a time, the state masked between."""
        rnn, keep = problem.rnn, (~problem.resets).to(problem.dtype).unsqueeze(-1)

        def call(x: Tensor) -> Tensor:
            state, outputs = x.new_zeros(1, problem.config.B, problem.config.H), []
            for x_t, keep_t in zip(x.split(1), keep, strict=True):
                output, state = rnn(x_t, state * keep_t)
                outputs.append(output)
            return torch.cat(outputs)

        return self.beyond(rnn, problem.padded, call, problem.grad_padded)

    def checkpoint_steps(self, problem: Problem) -> Job:
        """Pieces under torch.utils.checkpoint."""
        rnn = problem.rnn

        def call(x: Tensor) -> Tensor:
            state = x.new_zeros(1, problem.config.B, problem.config.H)
            for piece in x.split(CHECKPOINT_STEPS):
                _, state = checkpoint(rnn, piece, state, use_reentrant=False)
            return state

        return self.beyond(rnn, problem.padded, call, problem.grad_h_n)

    def lengths(self, problem: Problem) -> Job:
        """Packed and padded again, the lengths copied to the host."""
        rnn, lengths = problem.rnn, problem.lengths

        def call(x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
            return pad_packed_sequence(rnn(packed)[0], total_length=problem.config.T)[0]

        return self.beyond(rnn, problem.padded, call, problem.grad_padded)


class Reference(Peer):
    """The from-scratch loop in tensor operations."""

    name = key = "reference"
    tasks: tuple[str, ...] = TASKS

    def limits(self, problem: Any, task: str) -> str | None:
        return "it takes no packed input" if task != "clip" and problem.config.packed else None

    def function(self) -> Callable:
        return elman

    def operands(self, problem: Problem) -> list[Tensor]:
        weight_ih, weight_hh, bias_ih, bias_hh = (p.detach() for p in problem.rnn.parameters())
        state = torch.zeros(problem.config.B, problem.config.H, device=problem.device, dtype=problem.dtype)
        weights = [weight_ih.T.contiguous(), weight_hh.T.contiguous(), bias_ih + bias_hh]
        return [data_of(problem.input).detach(), state, *weights]

    def forward(self, problem: Problem) -> Job:
        run, operands = self.function(), self.operands(problem)

        def job() -> Any:
            with torch.no_grad():
                return run(*operands)[0]

        return job

    def forward_backward(self, problem: Problem) -> Job:
        run, operands = self.function(), self.operands(problem)
        leaves = [p.requires_grad_() for p in (operands[2:] if problem.config.tokens else [operands[0], *operands[2:]])]
        grad = problem.grad_output

        def job() -> Any:
            return torch.autograd.grad(run(*operands)[0], leaves, grad)

        return job

    def language_model(self, problem: Problem) -> RNNLM:
        torch.manual_seed(0)
        return CharRNN(problem.config.I, problem.config.H).to(problem.device, problem.dtype).to_reference()

    def lm_step(self, problem: Problem) -> Job:
        net = self.language_model(problem)
        updater = SGD(net.parameters(), LEARNING_RATE)
        batch = _batch(problem)
        return lambda: list(train_batches(net, [batch], updater, CLIP))

    def generation(self, problem: Problem) -> Job:
        net, prompt = self.language_model(problem), prompts(problem)
        return lambda: reference_generate.generate(net, prompt, problem.config.T)[0]

    def clip(self, problem: ClipProblem) -> Job:
        parameters, bounds = problem.parameters(), problem.bounds()
        return lambda: clip_grad_norm(parameters, next(bounds))


class _CompiledLoss:
    """A reference model whose loss is compiled; what the training loop asks of a model."""

    def __init__(self, net: RNNLM):
        self.loss = torch.compile(net.loss, dynamic=False)


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

    def lm_step(self, problem: Problem) -> Job:
        net = self.language_model(problem)
        updater = SGD(net.parameters(), LEARNING_RATE)
        compiled, batch = _CompiledLoss(net), _batch(problem)
        return lambda: list(train_batches(compiled, [batch], updater, CLIP))
