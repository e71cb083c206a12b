"""Peers from outside PyTorch: JAX, onnxruntime, OpenVINO and FlashRNN, extras of this package; TensorFlow, FlagGems and
XMA, used where they are installed.
"""

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charrnn_fast.bench.grid import DTYPES
from charrnn_fast.bench.measure import Job
from charrnn_fast.bench.peers import LEARNING_RATE, MAX_NORM, Peer, without_grad
from charrnn_fast.bench.problems import Problem, data_of


class _CpuLibrary(Peer):
    """A library that is compared on a CPU, in float32, on padded input."""

    def limits(self, problem: Any, task: str) -> str | None:
        if problem.device.type != "cpu":
            return "it is compared on a CPU only"
        if problem.dtype != torch.float32:
            return "it is compared in float32 only"
        return "it takes no packed input" if problem.config.packed else None


class Jax(_CpuLibrary):
    """lax.scan under jit, on arrays of JAX's own."""

    name, key, package = "JAX scan", "jax", "jax"

    def _scan(self, problem: Problem) -> tuple[Callable, Any, tuple]:
        """The states (T, B, H) as a function of input and weights; these two."""
        import jax
        import jax.numpy as jnp

        def run(x: Any, weights: tuple) -> Any:
            W_xh, W_hh, b_h = weights
            projected = W_xh[x] + b_h if problem.config.tokens else x @ W_xh + b_h

            def step(h: Any, p: Any) -> tuple[Any, Any]:
                h = jnp.tanh(p + h @ W_hh)
                return h, h

            return jax.lax.scan(step, jnp.zeros((problem.config.B, problem.config.H)), projected)[1]

        return run, jnp.asarray(problem.given.numpy()), tuple(jnp.asarray(w.numpy()) for w in problem.weights)

    def forward(self, problem: Problem) -> Job:
        import jax

        run, x, weights = self._scan(problem)
        compiled = jax.jit(run)
        return lambda: compiled(x, weights).block_until_ready()

    def forward_backward(self, problem: Problem) -> Job:
        import jax
        import jax.numpy as jnp

        run, x, weights = self._scan(problem)
        grad = jnp.asarray(problem.grad_output.numpy())
        wanted = (1,) if problem.config.tokens else (0, 1)
        both = jax.jit(jax.grad(lambda x, w: (run(x, w) * grad).sum(), argnums=wanted))
        return lambda: jax.block_until_ready(both(x, weights))

    def lm_step(self, problem: Problem) -> Job:
        import jax
        import jax.numpy as jnp

        run, x, weights = self._scan(problem)
        y = jnp.roll(x, -1, 0)
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
            scale = jnp.minimum(1.0, MAX_NORM / (norm + 1e-6))
            return [p - LEARNING_RATE * scale * g for p, g in zip(parameters, gradients, strict=True)]

        return lambda: jax.block_until_ready(step(parameters))


class OnnxRuntime(_CpuLibrary):
    """onnxruntime's RNN operator, inference only."""

    name = key = package = "onnxruntime"
    tasks = ("forward",)

    def limits(self, problem: Problem, task: str) -> str | None:
        return "onnx is not installed" if find_spec("onnx") is None else super().limits(problem, task)

    def forward(self, problem: Problem) -> Job:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        config = problem.config
        weight_ih, weight_hh, bias_ih, bias_hh = problem.rnn.parameters()
        constants = {"W": weight_ih[None], "R": weight_hh[None], "B": torch.cat([bias_ih, bias_hh])[None]}
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
        x = data_of(problem.input).detach().numpy()
        return lambda: session.run(["Y"], {"X": x})


class OpenVino(_CpuLibrary):
    """OpenVINO's RNN operator on its CPU plug-in in float32, inference only; batch-first, so between transposes."""

    name, key, package = "OpenVINO", "openvino", "openvino"
    tasks = ("forward",)

    def forward(self, problem: Problem) -> Job:
        import openvino
        from openvino import opset13 as ops

        config = problem.config
        weight_ih, weight_hh, bias_ih, bias_hh = problem.rnn.parameters()
        rows, states = [config.T, config.B, config.I], np.zeros((config.B, 1, config.H), np.float32)
        weights = (weight_ih[None], weight_hh[None], (bias_ih + bias_hh)[None])
        W, R, bias = (ops.constant(w.detach().numpy()) for w in weights)
        X = ops.parameter(rows, np.float32, "X")
        lengths = ops.constant(np.full(config.B, config.T, np.int64))
        by_batch = ops.transpose(X, ops.constant(np.array([1, 0, 2])))
        # Of the operator's results the first is (B, 1, T, H).
        layer = ops.rnn_sequence(by_batch, ops.constant(states), lengths, W, R, bias, config.H, "forward", ["tanh"])
        by_time = ops.transpose(layer.output(0), ops.constant(np.array([2, 1, 0, 3])))
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(openvino.Model([by_time], [X]), "CPU", options)
        request, given = compiled.create_infer_request(), data_of(problem.input).detach().contiguous().numpy()
        return lambda: request.infer([given], share_inputs=True, share_outputs=True)[0]


class TensorFlow(_CpuLibrary):
    """tf.scan under XLA, tf.function(jit_compile=True)."""

    name, key, package = "TensorFlow XLA", "tensorflow", "tensorflow"
    tasks = ("forward", "forward_backward")

    def _scan(self, problem: Problem) -> tuple[Callable, Any, list[Any]]:
        """The states (T, B, H) as a function of input and weights; these two."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or what it finds of the processor lands in the table
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # it may have begun to work, for the row before
            tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
        x, weights = tf.constant(problem.given.numpy()), [tf.constant(w.numpy()) for w in problem.weights]

        def run(x: Any, weights: list[Any]) -> Any:
            W_xh, W_hh, b_h = weights
            projected = tf.gather(W_xh, x) + b_h if problem.config.tokens else tf.tensordot(x, W_xh, 1) + b_h
            state = tf.zeros((problem.config.B, problem.config.H))
            return tf.scan(lambda h, p: tf.tanh(p + h @ W_hh), projected, state)

        return run, x, weights

    def forward(self, problem: Problem) -> Job:
        run, x, weights = self._scan(problem)
        import tensorflow as tf

        compiled = tf.function(run, jit_compile=True)
        return lambda: compiled(x, weights).numpy()

    def forward_backward(self, problem: Problem) -> Job:
        run, x, weights = self._scan(problem)
        import tensorflow as tf

        grad = tf.constant(problem.grad_output.numpy())

        @tf.function(jit_compile=True)
        def both(x: Any, weights: list[Any]) -> Any:
            wanted = weights if problem.config.tokens else [x, *weights]
            with tf.GradientTape() as tape:
                tape.watch(wanted)
                outputs = run(x, weights)
            # Of a table's, rows and their places; a dense one is what an optimiser takes.
            return [tf.convert_to_tensor(g) for g in tape.gradient(outputs, wanted, grad)]

        return lambda: [g.numpy() for g in both(x, weights)]


class _GpuLibrary(Peer, ABC):
    """A library with kernels of its own for a GPU, on padded input.

    Nothing of these has been run here, so a first result is compared with torch.nn.RNN's before it is timed.
    """

    tasks = ("forward", "forward_backward")

    def limits(self, problem: Any, task: str) -> str | None:
        if problem.device.type != "cuda":
            return "it runs on a CUDA device only"
        if problem.dtype not in DTYPES.values():
            return f"it has no kernel for {problem.dtype}"
        return "it takes no packed input" if problem.config.packed else None

    @abstractmethod
    def _run(self, problem: Problem, x: Tensor, weights: list[Tensor]) -> Callable[[], Tensor]:
        """The outputs (T, B, H) as a function of nothing, from x (T, B, I) and the layer's four parameters."""

    def _checked(self, problem: Problem) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """That function, and what gradients are asked of."""
        x, weights = data_of(problem.input).detach(), [p.detach().clone() for p in problem.rnn.parameters()]
        leaves = [leaf.requires_grad_() for leaf in (weights if problem.config.tokens else [x, *weights])]
        run = self._run(problem, x, weights)
        with torch.no_grad():
            torch.testing.assert_close(run().float(), problem.rnn(problem.input)[0].float(), rtol=0.05, atol=0.05)
        return run, leaves

    def forward(self, problem: Problem) -> Job:
        return without_grad(self._checked(problem)[0])

    def forward_backward(self, problem: Problem) -> Job:
        run, leaves = self._checked(problem)
        grad = problem.grad_output
        return lambda: torch.autograd.grad(run(), leaves, grad)


class FlashRNN(_GpuLibrary):
    """FlashRNN's Elman function with one head, its fused CUDA kernel, behind the input projection that it leaves out.

    K. Poeppel, M. Beck, S. Hochreiter, "FlashRNN: I/O-aware optimization of traditional RNNs on modern hardware",
    2024; shapes as its README gives them: Wx (B, T, gates, heads, D), R (gates, heads, D, D), b (gates, heads, D). It
    compiles its kernels when they are first called, so it needs nvcc.
    """

    name, key, package = "FlashRNN", "flashrnn", "flashrnn"
    takes_minutes = True

    def limits(self, problem: Any, task: str) -> str | None:
        found = super().limits(problem, task)
        if found is None and shutil.which("nvcc") is None:
            return "it compiles its kernels with nvcc, which is not installed"
        return found

    def _run(self, problem: Problem, x: Tensor, weights: list[Tensor]) -> Callable[[], Tensor]:
        from flashrnn import flashrnn

        name = str(problem.dtype).removeprefix("torch.")
        tokens = problem.config.tokens

        def run() -> Tensor:
            weight_ih, weight_hh, bias_ih, bias_hh = weights
            projected = weight_ih.T[problem.tokens] if tokens else F.linear(x, weight_ih)  # (T, B, H)
            states, _ = flashrnn(
                projected.transpose(0, 1)[:, :, None, None],
                weight_hh[None, None],
                (bias_ih + bias_hh)[None, None],
                function="elman",
                backend="cuda_fused",
                dtype=name,
            )
            return states[0, :, :, 0].transpose(0, 1)

        return run


class FlagGems(_GpuLibrary):
    """FlagGems' rnn_tanh, Triton kernels behind the arguments of torch.rnn_tanh."""

    name, key, package = "FlagGems", "flaggems", "flag_gems"

    def _run(self, problem: Problem, x: Tensor, weights: list[Tensor]) -> Callable[[], Tensor]:
        from flag_gems import rnn_tanh

        state = x.new_zeros(1, problem.config.B, problem.config.H)

        def run() -> Tensor:
            # has_biases, num_layers, dropout, train, bidirectional, batch_first
            return rnn_tanh(x, state, weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)[0]

        return run


class XMA(_GpuLibrary):
    """XMA's rnn with one head, tanh(h W + x) in Triton, behind the input projection that it leaves out.

    Shapes as it documents them: x (B, T, heads, H), W (heads, H, H); it returns the states and the last of them.
    """

    name, key, package = "XMA", "xma", "xma"

    def _run(self, problem: Problem, x: Tensor, weights: list[Tensor]) -> Callable[[], Tensor]:
        from xma.functional import rnn

        tokens = problem.config.tokens

        def run() -> Tensor:
            weight_ih, weight_hh, bias_ih, bias_hh = weights
            bias = bias_ih + bias_hh
            projected = (weight_ih.T + bias)[problem.tokens] if tokens else F.linear(x, weight_ih, bias)
            states, _ = rnn(projected.transpose(0, 1)[:, :, None].contiguous(), weight_hh.T[None].contiguous())
            return states[:, :, 0].transpose(0, 1)

        return run
