"""The operations beside torch's own, on operands and gradients of every kind.

tests/test_unusual_tensors.py runs them in processes of their own. surroundings.py has what may be around a call.

An operation is a pair of functions of the same floating-point operands, this library's and the same by torch's own
modules and functions. `same_outcome` runs both: they must give the same numbers and gradients, or raise the same type.
"""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rnn_modules import OneHotRNN, one_hot
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import CharRNN, FusedRNN, clip_grad_norm_, linear_cross_entropy
from charrnn_fast.reference import generate as reference_generate

V, H, T, B = 11, 8, 6, 3


class Operation(NamedTuple):
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    operands: tuple[Tensor, ...]
    differentiable: bool = True
    own_errors: bool = False  # no function of torch's: what it refuses is a ValueError of this library

    def compare(self, run: Callable[[Callable[..., Any]], Any], *arguments: Any, **options: Any) -> None:
        """run(f) of this library's function and of torch's; arguments, options: of same_outcome."""
        same_outcome(lambda: run(self.ours), lambda: run(self.theirs), *arguments, **options)


class TorchLM(nn.Module):
    """CharRNN by torch alone, with parameters of the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(V, H, batch_first=True)
        self.head = nn.Linear(H, V)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.rnn(one_hot(tokens, V, self.rnn.weight_ih_l0.dtype), state)
        return self.head(outputs), state

    def loss(self, tokens: Tensor, targets: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits, state = self(tokens, state)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), state

    def generate_ids(self, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return reference_generate.generate(self, prompt, count)


class _Method(nn.Module):
    """A method of a model as the forward of a module, for torch.func.functional_call."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.model, self.name)(*arguments)


def _of_parameters(model: nn.Module, method: str, *arguments: Any) -> Callable[..., Any]:
    module = _Method(model, method)
    names = [name for name, _ in module.named_parameters()]
    return lambda *parameters: functional_call(module, dict(zip(names, parameters, strict=True)), arguments)


def _rnn(method: str, **options: Any) -> Operation:
    ours, theirs = FusedRNN(5, 7, **options), nn.RNN(5, 7, **options)
    theirs.load_state_dict(ours.state_dict())
    sizes = torch.tensor([3, 3, 2, 2, 1, 1])

    def call(model: nn.Module) -> Callable[..., Any]:
        def run(x: Tensor, hx: Tensor, *weights: Tensor) -> Any:
            input = PackedSequence(x, sizes) if method == "packed" else x
            output, hidden = _of_parameters(model, "forward", input, hx)(*weights)
            return (output.data if method == "packed" else output), hidden

        return run

    x = torch.randn(12, 5) if method == "packed" else torch.randn(T, B, 5)
    hx = torch.randn(len(ours._flat_weights) // 4, B, 7)
    return Operation(call(ours), call(theirs), (x, hx, *_detached(ours)))


def _tokens() -> Operation:
    ours, theirs = FusedRNN(5, 7), OneHotRNN(5, 7)
    ids = torch.randint(5, (T, B))

    def call(model: nn.Module) -> Callable[..., Any]:
        return lambda hx, *weights: _of_parameters(model, "forward_tokens", ids, hx)(*weights)

    return Operation(call(ours), call(theirs), (torch.randn(1, B, 7), *_detached(ours)))


def _detached(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _loss(classes: int) -> Operation:
    target = torch.randint(classes, (9,))
    return Operation(
        lambda h, w, b: linear_cross_entropy(h, w, target, linear_bias=b),
        lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target),
        (torch.randn(9, H), torch.randn(classes, H), torch.randn(classes)),
    )


def _model(method: str) -> Operation:
    ours, theirs = CharRNN(V, H), TorchLM()
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    arguments = {"forward": (tokens,), "loss": (tokens, targets), "generate_ids": (tokens, 5)}[method]
    return Operation(
        _of_parameters(ours, method, *arguments),
        _of_parameters(theirs, method, *arguments),
        tuple(_detached(ours)),
        differentiable=method != "generate_ids",
        own_errors=method == "generate_ids",
    )


def _clip() -> Operation:
    def run(clip: Callable[..., Tensor]) -> Callable[..., Any]:
        def of(*grads: Tensor) -> Any:
            parameters = []
            for grad in grads:
                parameters.append(nn.Parameter(torch.zeros_like(grad, layout=torch.strided)))
                parameters[-1].grad = grad
            return clip(parameters, 1.0), *(p.grad for p in parameters)

        return of

    grads = (torch.randn(4, 5), torch.randn(7, 5), torch.randn(6, 5))
    return Operation(run(clip_grad_norm_), run(nn.utils.clip_grad_norm_), grads, False)


OPERATIONS: dict[str, Callable[[], Operation]] = {
    "dense": lambda: _rnn("dense"),
    "dense, 2 layers, 2 directions": lambda: _rnn("dense", num_layers=2, bidirectional=True),
    "packed": lambda: _rnn("packed"),
    "tokens": _tokens,
    "loss": lambda: _loss(V),
    "loss, many classes": lambda: _loss(1100),
    "model forward": lambda: _model("forward"),
    "model loss": lambda: _model("loss"),
    "model generate": lambda: _model("generate_ids"),
    "clip": _clip,
}


# ---- outcomes -------------------------------------------------------------------------------------------------------


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors_of(part)]


def outcome(run: Callable[[], Any]) -> tuple[list[Tensor], Exception | None]:
    try:
        return tensors_of(run()), None
    except Exception as error:
        return [], error


def same_outcome(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    what: str = "",
    tolerance: float = 1e-4,
    numbers: bool = True,
    own_errors: bool = False,
) -> None:
    """The same numbers within tolerance times the largest, or exceptions of the same type."""
    expected, error = outcome(theirs)
    found, own_error = outcome(ours)
    if error is not None or own_error is not None:
        # Of an operator that is not there torch has two: NotImplementedError, and RuntimeError, its base.
        alike = error and own_error and (isinstance(own_error, type(error)) or isinstance(error, type(own_error)))
        own = own_errors and error is not None and isinstance(own_error, ValueError | NoneType)
        assert alike or own, f"{what}: torch {error!r}, here {own_error!r}"
        return
    if numbers:
        differs = difference(found, expected, tolerance)
        assert differs is None, f"{what}: {differs}"


def difference(
    found: list[Tensor], expected: list[Tensor], tolerance: float, spread: bool = True, slack: float = 0.0
) -> str | None:
    """How results differ, numbers by more than tolerance times the largest, and slack.

    spread: are numbers that are not finite where torch's are? What torch has finite is finite in any case.
    """
    if len(found) != len(expected):
        return f"{len(found)} results, not {len(expected)}"
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if (type(a), a.layout, a.device) != (type(b), b.layout, b.device):
            return f"result {index} is {type(a)} {a.layout} {a.device}, not {type(b)} {b.layout} {b.device}"
        on_meta = a.device.type == "meta"
        a, b = (a, b) if on_meta else (plain_values(a), plain_values(b))
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"result {index} is {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        if on_meta or not a.numel():
            continue
        if not a.dtype.is_floating_point and not a.dtype.is_complex:
            if not torch.equal(a, b):
                return f"result {index}: {a} is not {b}"
            continue
        a, b = a.to(torch.complex128), b.to(torch.complex128)
        finite = b.isfinite()
        if not torch.equal(a.isfinite() | (not spread), finite | (not spread)) or (finite & ~a.isfinite()).any():
            return f"result {index} is not finite elsewhere: {a} and {b}"
        largest = b[finite].abs().max().item() if finite.any() else 0.0
        if finite.any() and (a - b)[finite].abs().max().item() > tolerance * (1 + largest) + slack:
            return f"result {index}: {a} is not {b}"
    return None


def plain_values(x: Tensor) -> Tensor:
    x = x.detach()
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
    if x.layout != torch.strided:
        x = x.to_dense()
    if isinstance(x, Logged):
        x = x.inner
    return x.as_subclass(Tensor).clone()


def results_and_gradients(f: Callable[..., Any], operands: Sequence[Tensor], upstream: Callable[[Tensor], Tensor]):
    """What f returns and then, where a leaf wants one, the gradients for upstream(result) of each result."""
    results = tensors_of(f(*operands))
    leaves = [x for x in operands if x.requires_grad]
    if not leaves:
        return results
    outputs = [r for r in results if r.requires_grad]
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, leaves, [upstream(r) for r in outputs], allow_unused=True)
    return [*results, *(g for g in grads if g is not None)]


# ---- kinds of operands ----------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


class Logged(Tensor):
    """A wrapper that sees every operator through __torch_dispatch__ and has no memory of its own."""

    seen = 0

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=False
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        unwrapped = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        result = func(*unwrapped[0], **unwrapped[1])
        return torch.utils._pytree.tree_map_only(Tensor, cls, result)


def _strided(x: Tensor) -> Tensor:
    """Elements two apart, dimensions in the other order of memory."""
    memory = torch.zeros(*(2 * n for n in reversed(x.shape)))
    view = memory.permute(*reversed(range(x.dim())))[tuple(slice(0, None, 2) for _ in x.shape)]
    return view.copy_(x)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative view": torch._neg_view,
    "imaginary part of a conjugate": lambda x: torch.complex(x, x).conj().imag,
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "subclass": lambda x: x.as_subclass(Subclass),
    "logging subclass": Logged,
    "zero stride": lambda x: x[:1].expand_as(x),
    "zero strides": lambda x: x.new_ones(()).expand(x.shape),
    "overlapping": lambda x: x.new_ones(sum(x.shape)).as_strided(x.shape, [1] * x.dim()),
    "strided": _strided,
    "reversed": lambda x: x.flip(0),
    "meta": lambda x: x.to("meta"),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "integers": lambda x: x.long(),
    "booleans": lambda x: x > 0,
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "nested": lambda x: torch.nested.nested_tensor(list(x.unsqueeze(0))),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "mkldnn": lambda x: x.to_mkldnn(),
    "inference tensor": lambda x: _inference(x),
    "not a tensor": lambda x: x.tolist(),
    "nothing": lambda x: None,
}


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _random_like(x: Tensor) -> Tensor:
    """Whatever the strides of x, which torch.randn_like fills in their order."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


def operands_of_a_kind(name: str, kind: str) -> int:
    """Each operand alone, and all of them, of this kind: results and gradients, with and without a graph."""
    operation, make = OPERATIONS[name](), KINDS[kind]
    count = len(operation.operands)
    tried = 0
    for chosen in [*((i,) for i in range(count)), *([] if kind == "nothing" else [tuple(range(count))])]:
        for graph in (False, True):

            def fresh(chosen=chosen, graph=graph):
                made = []
                for index, x in enumerate(operation.operands):
                    x = make(x.clone()) if index in chosen else x.clone()
                    wants = graph and operation.differentiable and isinstance(x, Tensor) and x.is_floating_point()
                    if wants and not x.is_inference():
                        x = x.detach().requires_grad_()
                    made.append(x)
                return made

            try:
                fresh()
            except Exception:
                continue  # there is no such tensor of this shape
            # What torch computes from one operand on "meta" and others with memory is whatever was there; and between
            # logits that are nearly equal, a rounding in 16 bit decides what a decoder says.
            operation.compare(
                lambda f, fresh=fresh: results_and_gradients(f, fresh(), _random_like),
                f"operands {chosen}, graph {graph}",
                0.1 if kind == "bfloat16" else 1e-4,
                numbers=(kind != "meta" or len(chosen) == count) and not (operation.own_errors and kind == "bfloat16"),
                own_errors=operation.own_errors,
            )
            tried += 1
    return tried


# ---- kinds of gradients ---------------------------------------------------------------------------------------------

_NO_GRADIENTS = ("nested", "quantized", "mkldnn", "not a tensor", "nothing")
GRADIENTS = {kind: make for kind, make in KINDS.items() if kind not in _NO_GRADIENTS}


def gradients_of_a_kind(name: str, kind: str) -> int:
    operation, make = OPERATIONS[name](), GRADIENTS[kind]
    if not operation.differentiable:
        return 0

    def upstream(result: Tensor) -> Tensor:
        grad = torch.randn(result.shape)
        return make(grad) if grad.dim() or kind not in ("zero stride", "overlapping", "reversed") else grad

    def run(f):
        return results_and_gradients(f, [x.clone().requires_grad_() for x in operation.operands], upstream)

    operation.compare(run, kind)
    return 1
