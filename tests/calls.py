"""Random calls of the Python API, well-formed and malformed, beside the same calls of torch's own functions.

The same numbers, or an exception of the same type; of what torch has no function for (token ids, decoding), one of the
documented ones. A call is made from (seed, index) alone, so that a failure can be made again by `one(seed, index)`.
tests/test_malformed_calls.py runs them in processes of their own.
"""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from drawn import NOT_TENSORS, REFUSALS, Call, Draw
from rnn_modules import OneHotRNN, pair
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from unusual import TorchLM, outcome, tensors_of

from charrnn_fast import CharRNN, FusedRNN, clip_grad_norm_, linear_cross_entropy


def _modules(draw: Draw) -> tuple[FusedRNN, "_CheckedRNN"]:
    """A FusedRNN and torch's, with random options; well-formed."""
    options: dict[str, Any] = {
        "num_layers": draw.choice([1, 1, 2]),
        "nonlinearity": draw.choice(["tanh", "relu"]),
        "bias": not draw.rarely(4),
        "batch_first": draw.rarely(3),
        "bidirectional": draw.rarely(4),
        "dtype": torch.float64 if draw.rarely(6) else torch.float32,
    }
    theirs, ours = _pair(draw.choice([1, 3, 5]), draw.choice([1, 4, 7]), kind=_CheckedRNN, **options)
    return ours, theirs


_pair = functools.cache(pair)


def _with_gradients(model: nn.Module, run: Callable[[], Any]) -> Callable[[], Any]:
    """What run returns and then the parameters' gradients."""

    def results() -> Any:
        returned = tensors_of(run())
        floats = [t for t in returned if t.requires_grad and t.device.type != "meta"]
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not floats:
            return returned
        total = sum(t.pow(2).sum() for t in floats)
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return [*returned, *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))]

    return results


def _unpacked(result: Any) -> Any:
    output, hidden = result
    if isinstance(output, PackedSequence):
        more = [t for t in output[1:] if t is not None]
        return output.data, hidden, *more
    return output, hidden


def _batch_sizes(draw: Draw, total: int, batch: int) -> Tensor:
    sizes, left = [], total
    while left > 0:
        sizes.append(min(left, draw.randint(1, sizes[-1] if sizes else max(batch, 1))))
        left -= sizes[-1]
    if draw.rarely(6) and sizes:
        sizes[draw.randrange(len(sizes))] = draw.choice([0, -1, 1, 7, 2**40, -(2**62)])
    if draw.rarely(25):
        draw.shuffle(sizes)
    result = torch.tensor(sizes, dtype=torch.int64)
    if draw.rarely(20):
        result = result.to(draw.choice([torch.int32, torch.float32, torch.uint8, torch.bool]))
    if draw.rarely(40):
        result = result.unsqueeze(0)
    return result


def _input(draw: Draw, rnn: nn.RNNBase, make: Callable[..., Any], *last: int) -> tuple[Any, int]:
    """Dense, unbatched or packed, and how many sequences it has."""
    steps, batch = draw.choice([1, 3, 4, 6]), draw.choice([1, 2, 4])
    kind = draw.randrange(6)
    if kind == 0:
        return make(steps, *last), 0
    if kind > 3:
        total = steps * batch
        data, sizes = make(total, *last), _batch_sizes(draw, total, batch)
        if not isinstance(data, Tensor):  # of which there is no such sequence
            data = torch.zeros(total, *last)
        return PackedSequence(data, sizes), int(sizes.reshape(-1)[0])
    return make(*((batch, steps) if rnn.batch_first else (steps, batch)), *last), batch


def _state(draw: Draw, rnn: nn.RNNBase, batch: int) -> Any:
    if draw.rarely(2):
        return None
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    shape = (layers, *([min(batch, 9)] if batch > 0 else []), rnn.hidden_size)
    return draw.floats(*shape, dtype=rnn.weight_hh_l0.dtype)


def rnn_call(draw: Draw) -> Call:
    ours, theirs = _modules(draw)
    dtype = ours.weight_hh_l0.dtype
    x, batch = _input(draw, ours, lambda *shape: draw.floats(*shape, dtype=dtype), ours.input_size)
    hx = _state(draw, ours, batch)
    arguments = (x,) if hx is None else (x, hx)
    return Call(
        _with_gradients(ours, lambda: _unpacked(ours(*arguments))),
        _with_gradients(theirs, lambda: _unpacked(theirs(*arguments))),
        spread=hx is not None,  # zeros that no one gave are not multiplied with the gradient of the first step
    )


def rnn_constructor(draw: Draw) -> Call:
    values = [0, 1, 3, -1, 2.5, "x", None, True, math.nan, "relu", "tanh", torch.float64, torch.int64, "meta"]
    names = ("num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional", "device", "dtype")
    options = {name: draw.choice(values) for name in draw.sample([*names, "proj_size", "other"], draw.randrange(3))}
    sizes = [draw.choice(values) if draw.rarely(4) else 3 for _ in range(2)]

    def make(kind: type) -> Callable[[], Any]:
        def run() -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                return list(kind(*sizes, **options).parameters())

        return run

    return Call(make(FusedRNN), make(nn.RNN))


def _checked(ids: Tensor, below: int) -> Tensor:
    """The documented errors for ids that are none."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError("not ids")
    ids = ids.long()
    if ids.device.type == "cpu" and ids.numel() and not (ids.min() >= 0 and ids.max() < below):
        raise IndexError("no such id")
    return ids


class _CheckedRNN(OneHotRNN):
    def rows_of(self, ids: Tensor) -> Tensor:
        return super().rows_of(_checked(ids, self.input_size))


def tokens_call(draw: Draw) -> Call:
    ours, theirs = _modules(draw)
    ids, batch = _input(draw, ours, lambda *shape: draw.ids(*shape, below=ours.input_size))
    hx = _state(draw, ours, batch)
    wrong = () if outcome(lambda: theirs.forward_tokens(ids, hx))[1] is None else REFUSALS
    return Call(
        _with_gradients(ours, lambda: _unpacked(ours.forward_tokens(ids, hx))),
        _with_gradients(theirs, lambda: _unpacked(theirs.forward_tokens(ids, hx))),
        wrong,
        spread=False,
    )


def loss_call(draw: Draw) -> Call:
    rows, hidden, classes = draw.choice([1, 4, 9]), draw.choice([1, 5, 8]), draw.choice([1, 3, 7, 1100])
    dtype = torch.float64 if draw.rarely(6) else torch.float32
    if draw.rarely(10):  # (H,) and a scalar target
        h, target = draw.floats(hidden, dtype=dtype), draw.ids(below=classes)
    else:
        h, target = draw.floats(rows, hidden, dtype=dtype), draw.ids(rows, below=classes)
    if draw.rarely(15):
        target = draw.floats(rows, classes, dtype=dtype)
    w, b = draw.floats(classes, hidden, dtype=dtype), draw.floats(classes, dtype=dtype)
    options = draw.options(
        reduction=(3, ["mean", "sum", "none", "none", "x", "", 3]),
        ignore_index=(5, [0, 1, -100, -1, 2**40, -(2**63), 2**64, "x", 1.5]),
    )
    if draw.rarely(8):
        options["weight"] = draw.floats(classes, dtype=dtype)
    options |= draw.options(label_smoothing=(8, [0.0, 0.1, 1.0, 1.5, -0.1, math.nan, "x", None]))
    bias = None if draw.rarely(4) else b
    if isinstance(w, Tensor) and w.dim() > 2:  # a K-dimensional loss, of which torch's linear knows nothing
        w = w.flatten(0, -2)

    def run(function: Callable[..., Any]) -> Callable[[], Any]:
        leaves = [
            x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in (h, w, bias)
        ]

        def results() -> Any:
            loss = function(*leaves)
            wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            if not (wanted and loss.requires_grad and loss.device.type == "cpu"):
                return loss
            return loss, *torch.autograd.grad(loss.sum() * 3, wanted)

        return results

    return Call(
        run(lambda h, w, b: linear_cross_entropy(h, w, target, linear_bias=b, **options)),
        run(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target, **options)),
        operands=(h, w, bias),
    )


def clip_call(draw: Draw) -> Call:
    grads = []
    for _ in range(draw.choice([0, 1, 2, 5])):
        shape = draw.choice([(3,), (2, 4), (), (0,), (5, 1)])
        grads.append(None if draw.rarely(8) else draw.floats(*shape))
    grads = [g if g is None or isinstance(g, Tensor) else torch.ones(2) for g in grads]
    shared = draw.rarely(6)
    max_norm = draw.choice([0.1, 1.0, 100, 0, -1.0, math.inf, math.nan, "x", None, torch.tensor(0.5), True])
    options = draw.options(
        norm_type=(3, [2, 2.0, 1, 0, math.inf, "inf", -1, 3.5, "x", None, math.nan]),
        error_if_nonfinite=(5, [True, False, 1]),
        foreach=(5, [True, False, None]),
    )
    form = draw.choice([list, tuple, iter, "generator", "one", "dict", "wrong"] if draw.rarely(4) else [list])
    odd = draw.choice(NOT_TENSORS)

    def run(clip: Callable[..., Any]) -> Callable[[], Any]:
        parameters = []
        for grad in grads:
            shape = () if grad is None else grad.shape
            kind = {} if grad is None else {"dtype": grad.dtype, "device": grad.device}
            parameters.append(torch.zeros(shape, **kind))
            parameters[-1].grad = None if grad is None else grad.clone()
        if shared and parameters:
            parameters.append(parameters[0])
        forms: dict[Any, Callable[[], Any]] = {
            "generator": lambda: (p for p in parameters),
            "one": lambda: parameters[0] if parameters else torch.zeros(1),
            "dict": lambda: dict.fromkeys(map(str, range(len(parameters)))),
            "wrong": lambda: odd,
        }

        def results() -> Any:
            given = forms[form]() if form in forms else form(parameters)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                norm = clip(given, max_norm, **options)
            return norm, *(p.grad for p in parameters if p.grad is not None)

        return results

    return Call(run(clip_grad_norm_), run(nn.utils.clip_grad_norm_))


class _CheckedLM(TorchLM):
    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(_checked(tokens, 11), state)


@functools.cache
def _models() -> tuple[CharRNN, TorchLM]:
    torch.manual_seed(0)
    ours, theirs = CharRNN(11, 8), _CheckedLM()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def model_loss_call(draw: Draw) -> Call:
    ours, theirs = _models()
    batch, steps = draw.choice([1, 3, 16]), draw.choice([1, 3, 5])
    tokens, targets = draw.ids(batch, steps, below=11), draw.ids(batch, steps, below=11)
    state = None if draw.rarely(2) else draw.floats(1, batch, 8)
    arguments = (tokens, targets, state)
    right = outcome(lambda: theirs.loss(*arguments))[1] is None and targets.shape == tokens.shape
    wrong = () if right else REFUSALS
    return Call(
        _with_gradients(ours, lambda: ours.loss(*arguments)),
        _with_gradients(theirs, lambda: theirs.loss(*arguments)),
        wrong,
        spread=False,
    )


def generate_call(draw: Draw) -> Call:
    from charrnn_fast.reference.generate import generate

    ours, theirs = _models()
    batch, count = draw.choice([1, 3]), draw.choice([0, 1, 4])
    prompt = draw.ids(batch, draw.choice([1, 3]), below=11)
    options: dict[str, Any] = {}
    if not draw.rarely(3):
        uniforms = draw.floats(batch, count)
        if isinstance(uniforms, Tensor) and uniforms.is_floating_point():
            uniforms = uniforms.nan_to_num(0.5, 0.5, 0.5).abs().fmod(1)
        options["uniforms"] = uniforms
        options["temperature"] = draw.choice([1.0, 0.7, 1e-30, 1e-310, 0.0, -1.0, math.nan, math.inf, "x", None])
        options["alpha"] = draw.choice([1.0, 2.0, 1e308, 0.0, -1.0, math.nan, None]) if draw.rarely(4) else 1.0
        options["top_k"] = draw.choice([None, 1, 3, 11, 10**9, 2**70, 0, -1, 1.5, "x"]) if draw.rarely(3) else None
    if draw.rarely(2):
        options["state"] = draw.floats(1, batch, 8)
    count = draw.choice([-1, 1.5, "x", None, 2**70]) if draw.rarely(12) else count
    # What does not fit is refused in this library's words, before anything runs.
    return Call(
        lambda: [t for t in ours.generate_ids(prompt, count, **options) if t is not None],
        lambda: [t for t in generate(theirs, prompt, min(count, 9), **options) if t is not None],
        REFUSALS,
    )


OPERATIONS: dict[str, tuple[Callable[[Draw], Call], int]] = {
    "FusedRNN": (rnn_call, 6),
    "FusedRNN()": (rnn_constructor, 1),
    "forward_tokens": (tokens_call, 4),
    "linear_cross_entropy": (loss_call, 5),
    "clip_grad_norm_": (clip_call, 4),
    "CharRNN.loss": (model_loss_call, 3),
    "CharRNN.generate_ids": (generate_call, 2),
}


def one(seed: int, index: int) -> tuple[str, str | None]:
    """The operation that was called, and None or how the call here and torch's differ."""
    draw = Draw(f"{seed} {index}")
    name = draw.choices(list(OPERATIONS), [weight for _, weight in OPERATIONS.values()])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return name, OPERATIONS[name][0](draw).disagreement()


def run(seed: int, start: int, count: int) -> dict[str, int]:
    """How many calls of each operation were tried; AssertionError if any differs from torch's."""
    print(f"seed {seed}, calls {start} to {start + count - 1}", flush=True)
    tried: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    for index in range(start, start + count):
        name, why = one(seed, index)
        tried[name] += 1
        if why is not None:
            wrong.setdefault(f"{name}: {why[:60]}", f"calls.one({seed}, {index}): {name}: {why[:600]}")
    assert not wrong, f"{len(wrong)} kinds of difference\n" + "\n".join(wrong.values())
    return tried
