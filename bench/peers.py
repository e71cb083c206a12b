"""The sides of a comparison as plain adapters: each builds, for a problem and a task, a callable that does it once.

Tasks: "forward", "forward_backward" (gradients of the parameters, and of a dense input), "lm_step" (forward, loss,
backward, clip, SGD of a character language model) and, for the decoders, "generation".
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from bench.problems import Problem
from charrnn_fast import CharRNN, FusedRNN
from charrnn_fast.reference import generate as reference_generate
from charrnn_fast.reference.elman import elman
from charrnn_fast.reference.language_model import RNNLM
from charrnn_fast.reference.training import SGD, train_batches

Job = Callable[[], Any]
MAX_COMPILED_STEPS = 40  # torch.compile unrolls the time loop: minutes of compilation beyond this


def _data(x: Any) -> torch.Tensor:
    return x.data if isinstance(x, PackedSequence) else x


class Peer:
    """One side. `why_not` says in a clause why it cannot do a task, or returns None."""

    name = ""
    tasks: tuple[str, ...] = ("forward", "forward_backward", "lm_step")
    package: str | None = None

    def why_not(self, problem: Problem, task: str) -> str | None:
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if task not in self.tasks:
            return f"it has no {task}"
        return self.limits(problem, task)

    def limits(self, problem: Problem, task: str) -> str | None:
        return None

    def job(self, problem: Problem, task: str) -> Job:
        return getattr(self, task)(problem)


class _Module(Peer):
    """A torch.nn.RNN-like module."""

    def module(self, problem: Problem) -> nn.Module:
        return problem.rnn

    def call(self, module: nn.Module, problem: Problem) -> Any:
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
            _data(problem.input).requires_grad_()

        def job() -> None:
            for p in module.parameters():
                p.grad = None
            _data(problem.input).grad = None
            _data(self.call(module, problem)).backward(grad)

        return job

    def language_model(self, problem: Problem) -> CharRNN:
        torch.manual_seed(0)
        return CharRNN(problem.config.I, problem.config.H, cell="torch").to(problem.device, problem.dtype)

    def lm_step(self, problem: Problem) -> Job:
        return lm_step(self.language_model(problem), problem)


def lm_step(model: CharRNN, problem: Problem) -> Job:
    """One training step as Trainer makes it."""
    from charrnn_fast.lm.training import train_batches as fast_batches

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    X = problem.tokens.T.contiguous()  # (B, T)
    Y = X.roll(-1, 1)
    return lambda: list(fast_batches(model, [(X, Y)], optimizer, 1.0))


class Ours(_Module):
    name = "charrnn_fast"

    def module(self, problem: Problem) -> nn.Module:
        fused = FusedRNN(problem.config.I, problem.config.H, device=problem.device, dtype=problem.dtype)
        fused.load_state_dict(problem.rnn.state_dict())
        return fused

    def call(self, module: nn.Module, problem: Problem) -> Any:
        if problem.config.tokens:
            return module.forward_tokens(problem.tokens)[0]
        return module(problem.input)[0]

    def language_model(self, problem: Problem) -> CharRNN:
        torch.manual_seed(0)
        return CharRNN(problem.config.I, problem.config.H).to(problem.device, problem.dtype)


class TorchRNN(_Module):
    name = "torch.nn.RNN"


class Reference(Peer):
    """The from-scratch loop in tensor operations."""

    name = "reference"

    def limits(self, problem: Problem, task: str) -> str | None:
        return "it takes no packed input" if problem.config.packed else None

    def function(self) -> Callable:
        return elman

    def operands(self, problem: Problem) -> list[torch.Tensor]:
        rnn = problem.rnn
        bias = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach()
        state = torch.zeros(problem.config.B, problem.config.H, device=problem.device, dtype=problem.dtype)
        weights = [rnn.weight_ih_l0.detach().T.contiguous(), rnn.weight_hh_l0.detach().T.contiguous(), bias]
        return [problem.input.detach(), state, *weights]

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

    def lm_step(self, problem: Problem) -> Job:
        torch.manual_seed(0)
        net = CharRNN(problem.config.I, problem.config.H).to_reference()
        updater = SGD(net.parameters(), 0.1)
        X = problem.tokens.T.contiguous()
        Y = X.roll(-1, 1)
        return lambda: list(train_batches(net, [(X, Y)], updater, 1.0))


class CompiledReference(Reference):
    name = "torch.compile(reference)"
    tasks = ("forward", "forward_backward")

    def limits(self, problem: Problem, task: str) -> str | None:
        if problem.config.T > MAX_COMPILED_STEPS:
            return f"it unrolls the {problem.config.T} steps, which takes minutes to compile"
        return super().limits(problem, task)

    def function(self) -> Callable:
        return torch.compile(elman, dynamic=False)


class Jax(Peer):
    """lax.scan under jit, on arrays of JAX's own."""

    name = "JAX scan"
    package = "jax"

    def limits(self, problem: Problem, task: str) -> str | None:
        if problem.device != "cpu":
            return "it is compared on a CPU only"
        return "it takes no packed input" if problem.config.packed else None

    def _arrays(self, problem: Problem) -> tuple[Any, tuple]:
        import jax.numpy as jnp

        rnn = problem.rnn
        weights = (rnn.weight_ih_l0.T, rnn.weight_hh_l0.T, rnn.bias_ih_l0 + rnn.bias_hh_l0)
        x = problem.tokens if problem.config.tokens else problem.input
        return jnp.asarray(x.detach().numpy()), tuple(jnp.asarray(w.detach().contiguous().numpy()) for w in weights)

    def _scan(self, problem: Problem) -> Callable:
        import jax
        import jax.numpy as jnp

        def run(x: Any, weights: tuple) -> Any:
            W_xh, W_hh, b_h = weights
            projected = W_xh[x] + b_h if problem.config.tokens else x @ W_xh + b_h

            def step(h: Any, p: Any) -> tuple[Any, Any]:
                h = jnp.tanh(p + h @ W_hh)
                return h, h

            return jax.lax.scan(step, jnp.zeros((problem.config.B, problem.config.H)), projected)[1]

        return run

    def forward(self, problem: Problem) -> Job:
        import jax

        x, weights = self._arrays(problem)
        run = jax.jit(self._scan(problem))
        return lambda: run(x, weights).block_until_ready()

    def forward_backward(self, problem: Problem) -> Job:
        import jax
        import jax.numpy as jnp

        x, weights = self._arrays(problem)
        run, grad = self._scan(problem), jnp.asarray(problem.grad_output.numpy())
        wanted = (1,) if problem.config.tokens else (0, 1)
        both = jax.jit(jax.grad(lambda x, w: (run(x, w) * grad).sum(), argnums=wanted))
        return lambda: jax.block_until_ready(both(x, weights))

    def lm_step(self, problem: Problem) -> Job:
        import jax
        import jax.numpy as jnp

        x, weights = self._arrays(problem)
        y = jnp.roll(x, -1, 0)
        run = self._scan(problem)
        head = nn.Linear(problem.config.H, problem.config.I)
        parameters = [*weights, jnp.asarray(head.weight.detach().numpy().T), jnp.asarray(head.bias.detach().numpy())]

        def loss(parameters: list) -> Any:
            logits = run(x, tuple(parameters[:3])) @ parameters[3] + parameters[4]
            chosen = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
            return (jax.nn.logsumexp(logits, -1) - chosen).mean()

        @jax.jit
        def step(parameters: list) -> list:
            gradients = jax.grad(loss)(parameters)
            norm = jnp.sqrt(sum((g * g).sum() for g in gradients))
            scale = jnp.minimum(1.0, 1.0 / (norm + 1e-6))
            return [p - 0.1 * scale * g for p, g in zip(parameters, gradients, strict=True)]

        return lambda: jax.block_until_ready(step(parameters))


class OnnxRuntime(Peer):
    """onnxruntime's RNN operator, inference only."""

    name = "onnxruntime"
    package = "onnxruntime"
    tasks = ("forward",)

    def limits(self, problem: Problem, task: str) -> str | None:
        if find_spec("onnx") is None:
            return "onnx is not installed"
        if problem.device != "cpu":
            return "it is compared on a CPU only"
        return "it takes no packed input" if problem.config.packed else None

    def forward(self, problem: Problem) -> Job:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        rnn, config = problem.rnn, problem.config
        constants = {
            "W": rnn.weight_ih_l0[None],
            "R": rnn.weight_hh_l0[None],
            "B": torch.cat([rnn.bias_ih_l0, rnn.bias_hh_l0])[None],
        }
        graph = helper.make_graph(
            [helper.make_node("RNN", ["X", "W", "R", "B"], ["Y"], hidden_size=config.H)],
            "elman",
            [helper.make_tensor_value_info("X", TensorProto.FLOAT, [config.T, config.B, config.I])],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [config.T, 1, config.B, config.H])],
            [numpy_helper.from_array(value.detach().numpy(), name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would spin in the others' turns
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        x = problem.input.detach().numpy()
        return lambda: session.run(["Y"], {"X": x})


PEERS = [TorchRNN(), Reference(), CompiledReference(), Jax(), OnnxRuntime()]


def decoders(hidden: int, batch: int, num_chars: int) -> dict[str, Job]:
    """Greedy decoding of num_chars characters: ours, and the step-by-step decoder over torch.nn.RNN and over the
    reference.
    """
    torch.manual_seed(0)
    ours = CharRNN(28, hidden)
    stepwise = CharRNN(28, hidden, cell="torch")
    stepwise.load_state_dict(ours.state_dict())
    net: RNNLM = ours.to_reference()
    prompt = torch.randint(28, (batch, 16), generator=torch.Generator().manual_seed(1))
    return {
        "charrnn_fast": lambda: ours.generate_ids(prompt, num_chars),
        "step by step, torch.nn.RNN": lambda: reference_generate.generate(stepwise, prompt, num_chars),
        "step by step, reference": lambda: reference_generate.generate(net, prompt, num_chars),
    }
