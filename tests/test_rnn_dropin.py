"""FusedRNN against torch.nn.RNN: torch's own module inputs and errors, random shapes and options, every float type."""

import copy
import functools
import re
import shutil
import subprocess
import sys
import warnings

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from rnn_modules import LAYOUTS, OPTIONS, differentiated, drawn, gradients, pair
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

from charrnn_fast import FusedRNN

INFO = next(info for info in module_db if info.module_cls is nn.RNN)


def fresh_arguments(sample, device):
    """Leaves that require gradients: what to pass, and the tensors in it."""
    arguments, leaves = [], []
    for x in sample.forward_input.args:
        leaves.append((x.data if isinstance(x, PackedSequence) else x).detach().to(device, copy=True).requires_grad_())
        arguments.append(x.to(device)._replace(data=leaves[-1]) if isinstance(x, PackedSequence) else leaves[-1])
    return arguments, leaves


# ---- torch's own ModuleInfo ---------------------------------------------------------------------------------------


def module_inputs(training):
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
    inputs = INFO.module_inputs_func(INFO, **options, with_packed_sequence=True)
    assert len(inputs) == 64
    return inputs


@pytest.mark.parametrize("training", [True, False])
def test_module_info_outputs_gradients_and_state_dicts(backend, device, training):
    for sample in module_inputs(training)[:: 1 if training or backend == "torch" else 5]:
        modules = pair(backend=backend, dtype=torch.float64, device=device, **sample.constructor_input.kwargs)
        theirs, ours = (module.train(training) for module in modules)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        found = []
        for module in (theirs, ours):
            arguments, leaves = fresh_arguments(sample, device)
            with torch.backends.cudnn.flags(enabled=False):  # cuDNN has no backward in eval mode
                found.append(differentiated(module, module(*arguments), *leaves))
        torch.testing.assert_close(found[1], found[0])


def test_module_info_double_gradients(backend, device):
    for sample in module_inputs(True)[:: 1 if backend == "torch" else 7]:
        second = []
        for module in pair(backend=backend, dtype=torch.float64, device=device, **sample.constructor_input.kwargs):
            arguments, leaves = fresh_arguments(sample, device)
            with torch.backends.cudnn.flags(enabled=False):  # nor a double backward
                result = module(*arguments)
            first = gradients(module, result, *leaves, create_graph=True)
            total = sum(grad.square().sum() for grad in first)
            second.append(torch.autograd.grad(total, [*leaves, *module.parameters()]))
        torch.testing.assert_close(second[1], second[0])


def built_and_called(kind, sample):
    built, called = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
    module = kind(*built.args, **built.kwargs)
    assert sample.error_on == ModuleErrorEnum.FORWARD_ERROR
    module(*called.args, **called.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_info_error_inputs(dtype):
    samples = INFO.module_error_inputs_func(INFO, device="cpu", dtype=dtype, requires_grad=False, training=True)
    assert len(samples) >= 10
    for sample in samples:
        kind, message = refusal(built_and_called, FusedRNN, sample)
        assert (kind, message) == refusal(built_and_called, nn.RNN, sample)
        assert kind is sample.error_type and re.search(sample.error_regex, message)


# ---- everything torch.nn.RNN refuses, in its words ----------------------------------------------------------------


def refusal(call, *given, **options):
    """The type and the words of the error that a call ends in."""
    with pytest.raises(Exception) as caught:
        call(*given, **options)
    return caught.type, str(caught.value)


BAD_CONSTRUCTIONS = [
    {"nonlinearity": "gelu"},
    {"nonlinearity": None},
    {"proj_size": 2},
    {"dropout": 1.5},
    {"dropout": True},
    {"dropout": "half"},
    {"num_layers": 0},
    {"hidden_size": 0},
    {"input_size": -3},
    {"input_size": 2.0},
    {"batch_first": None},
    {"bias": 1},
    {"peephole": True},
    {"dtype": torch.int64},
    {"device": "nowhere"},
]


@pytest.mark.parametrize("bad", BAD_CONSTRUCTIONS, ids=str)
def test_constructions_refused_alike(bad):
    options = {"input_size": 3, "hidden_size": 4, **bad}
    assert refusal(FusedRNN, **options) == refusal(nn.RNN, **options)


def test_dropout_of_a_single_layer_warns_alike():
    messages = []
    for kind in (nn.RNN, FusedRNN):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kind(3, 4, dropout=0.5)
        messages.append([(w.category, str(w.message)) for w in caught])
    assert messages[1] == messages[0] != []


def packed_input(*shape, lengths, dtype=torch.float32):
    return pack_padded_sequence(torch.zeros(*shape, dtype=dtype), lengths, enforce_sorted=False)


BAD_CALLS = {
    "one dimension": lambda: (torch.zeros(3),),
    "four dimensions": lambda: (torch.zeros(1, 1, 1, 3),),
    "features": lambda: (torch.zeros(5, 2, 4),),
    "features, unbatched": lambda: (torch.zeros(5, 4),),
    "no steps": lambda: (torch.zeros(0, 2, 3),),
    "integers": lambda: (torch.zeros(5, 2, 3, dtype=torch.int64),),
    "integers, right shape for tokens": lambda: (torch.zeros(5, 2, dtype=torch.int64),),
    "complex": lambda: (torch.zeros(5, 2, 3, dtype=torch.complex64),),
    "double": lambda: (torch.zeros(5, 2, 3, dtype=torch.float64),),
    "h0 unbatched for batched": lambda: (torch.zeros(5, 2, 3), torch.zeros(4, 4)),
    "h0 batched for unbatched": lambda: (torch.zeros(5, 3), torch.zeros(4, 1, 4)),
    "h0 of another batch": lambda: (torch.zeros(5, 2, 3), torch.zeros(4, 3, 4)),
    "h0 of other layers": lambda: (torch.zeros(5, 2, 3), torch.zeros(2, 2, 4)),
    "h0 of another type": lambda: (torch.zeros(5, 2, 3), torch.zeros(4, 2, 4, dtype=torch.float64)),
    "h0 of integers": lambda: (torch.zeros(5, 2, 3), torch.zeros(4, 2, 4, dtype=torch.int64)),
    "h0 a tuple": lambda: (torch.zeros(5, 2, 3), (torch.zeros(4, 2, 4),)),
    "input a list": lambda: ([1.0, 2.0],),
    "input on another device": lambda: (torch.zeros(5, 2, 3, device="meta"),),
    "h0 on another device": lambda: (torch.zeros(5, 2, 3), torch.zeros(4, 2, 4, device="meta")),
    "packed, features": lambda: (packed_input(5, 2, 4, lengths=[5, 3]),),
    "packed, dimensions": lambda: (packed_input(5, 2, lengths=[5, 3]),),
    "packed, type": lambda: (packed_input(5, 2, 3, lengths=[5, 3], dtype=torch.float64),),
    "packed, integers": lambda: (packed_input(5, 2, lengths=[5, 3], dtype=torch.int64),),
    "packed, h0 of another batch": lambda: (pack_padded_sequence(torch.zeros(5, 2, 3), [5, 3]), torch.zeros(4, 3, 4)),
    "packed, h0 of too small a batch": lambda: (packed_input(5, 2, 3, lengths=[5, 3]), torch.zeros(4, 1, 4)),
    "packed, h0 of another type": lambda: (packed_input(5, 2, 3, lengths=[5, 3]), torch.zeros(4, 2, 4).double()),
}


@pytest.fixture
def on_cpu(backend, device):
    """The backend's name for calls on a CPU, where compiled Triton kernels cannot be asked for."""
    return backend if device.type == "cpu" else "auto"


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_refused_alike(on_cpu, case, batch_first):
    theirs, ours = pair(3, 4, batch_first=batch_first, backend=on_cpu, **OPTIONS)
    given = BAD_CALLS[case]()
    if case == "no steps" and batch_first:
        given = (given[0].transpose(0, 1),)
    assert refusal(ours, *given) == refusal(theirs, *given)


def test_calls_refused_alike_with_mixed_parameters(on_cpu):
    for modules in (pair(3, 4, backend=on_cpu), pair(3, 4, backend=on_cpu, bidirectional=True)):
        for module in modules:
            module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.double())
        given = torch.zeros(5, 2, 3)
        assert refusal(modules[1], given) == refusal(modules[0], given)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_calls_refused_alike_under_autocast(on_cpu, dtype):
    theirs, ours = pair(3, 4, backend=on_cpu)
    given = torch.zeros(5, 2, 3, dtype=dtype)
    with torch.autocast("cpu"):
        assert refusal(ours, given) == refusal(theirs, given)


def test_tokens_refused(backend, device):
    rnn = FusedRNN(3, 4, backend=backend, device=device)
    ids = torch.zeros(5, 2, dtype=torch.int64, device=device)
    zeros = functools.partial(torch.zeros, device=device)
    for error, message, arguments in [
        (ValueError, "expects int64 or int32 token ids, got torch.float32", (ids.float(),)),
        (ValueError, "Expected input to be 1D or 2D, got 3D tensor", (ids[None],)),
        (RuntimeError, r"Expected hidden size \(1, 2, 4\), got \[1, 3, 4\]", (ids, zeros(1, 3, 4))),
        (RuntimeError, "batched 3-D input, hx should also be 3-D", (ids, zeros(1, 4))),
        (RuntimeError, "Expected sequence length to be larger than 0", (ids[:0],)),
        (RuntimeError, "packed token ids must have 1 dimension, got 2", (pack_sequence([ids, ids]),)),
    ]:
        with pytest.raises(error, match=message):
            rnn.forward_tokens(*arguments)


def test_a_backend_that_cannot_run_is_an_error_at_the_call():
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"):
        FusedRNN(3, 4, backend="cuda")
    rnn = FusedRNN(3, 3000, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run elman with hidden_size=3000"):
        rnn(torch.zeros(1, 1, 3))


def test_any_size_runs():
    theirs, ours = pair(3, 1500)
    input = torch.randn(2, 1, 3)
    torch.testing.assert_close(ours(input), theirs(input))


# ---- random shapes, strides and options ---------------------------------------------------------------------------


FORMS = ["plain", "every other column", "one step for all", "all turned", "unbatched", "packed", "tokens"]


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    # With 16 bits a relu near its kink may fall on either side, and gradients then differ by their whole size.
    nonlinearities = ["tanh"] if dtype.itemsize == 2 else ["tanh", "relu"]
    return {
        "form": draw(st.sampled_from(FORMS)),
        "dtype": dtype,
        "steps": draw(st.integers(1, 4)),
        "batch": draw(st.integers(0, 5)),
        "h0": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "options": {
            "input_size": draw(st.integers(1, 5)),
            "hidden_size": draw(st.sampled_from([1, 3, 7, 16, 17, 33])),
            "num_layers": draw(st.integers(1, 2)),
            "nonlinearity": draw(st.sampled_from(nonlinearities)),
            "bias": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
            "bidirectional": draw(st.booleans()),
        },
    }


def make_given(problem, exact):
    """Input (token ids for form "tokens") of a module in fp64, and h0 or None."""
    form, steps = problem["form"], problem["steps"]
    batch = {"unbatched": 1, "packed": max(problem["batch"], 1)}.get(form, problem["batch"])
    input, h0 = (x if x is None else x.detach() for x in drawn(exact, steps, batch, problem["h0"], problem["seed"]))
    if form == "unbatched":
        input, h0 = input.squeeze(0 if exact.batch_first else 1), None if h0 is None else h0[:, 0]
    elif form == "tokens":
        input = input.argmax(-1)
    elif form == "packed":
        input = pack_padded_sequence(input, torch.randint(1, steps + 1, (batch,)), exact.batch_first, False)
    return input, h0


def evaluate(module, input, h0, dtype, form):
    """Outputs and gradients by name, in fp64 on the CPU. Ids go to torch.nn.RNN as one-hot rows."""
    where = next(module.parameters()).device
    h0 = None if h0 is None else h0.to(where, dtype).requires_grad_()
    if form == "tokens":
        result = module.forward_tokens(input.to(where), h0)
    else:
        leaf = (input.data if form == "packed" else input).to(where, dtype).requires_grad_()
        given = input.to(where)._replace(data=leaf) if form == "packed" else LAYOUTS.get(form, LAYOUTS["plain"])(leaf)
        result = module(given, h0)
    leaves = {} if form == "tokens" else {"input": leaf}
    leaves |= {} if h0 is None else {"h0": h0}
    names = ["output", "h_n", *leaves, *dict(module.named_parameters())]
    values = differentiated(module, result, *leaves.values())
    return {name: x.detach().double().cpu() for name, x in zip(names, values, strict=True)}


def check_against_torch(problem, backend, device):
    """At most twice torch.nn.RNN's own error in the same type, against torch.nn.RNN in fp64 (and a few ulp)."""
    dtype, form = problem["dtype"], problem["form"]
    theirs, ours = pair(**problem["options"], backend=backend, seed=problem["seed"], dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    input, h0 = make_given(problem, exact)
    if form == "packed":
        input = input._replace(data=input.data.to(dtype).double())
    elif form != "tokens":
        input = input.to(dtype).double()
    h0 = None if h0 is None else h0.to(dtype).double()
    right = evaluate(exact, input, h0, torch.float64, form)
    their = evaluate(theirs.to(device), input, h0, dtype, form)
    our = evaluate(ours.to(device), input, h0, dtype, form)
    for name, value in right.items():
        assert our[name].shape == value.shape, name
        if value.numel():
            scale = 4 * torch.finfo(dtype).eps * (1 + value.abs().max().item())
            allowed = 2 * (their[name] - value).abs().max().item() + scale
            assert (our[name] - value).abs().max().item() <= allowed, name


def two_way_problem(form, dtype, steps=3, batch=3, hidden_size=33, **options):
    """A problem with a state and two directions."""
    options = {"input_size": 4, "num_layers": 2, "nonlinearity": "tanh", "bias": True, "batch_first": False} | options
    options |= {"hidden_size": hidden_size, "bidirectional": True}
    return {"form": form, "dtype": dtype, "steps": steps, "batch": batch, "h0": True, "seed": 1, "options": options}


FIXED = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **FIXED)
@hypothesis.given(problem=problems())
def test_random_problems_by_tensor_operations(problem):
    check_against_torch(problem, "torch", torch.device("cpu"))


@settings(max_examples=40, **FIXED)
@hypothesis.given(problem=problems())
def test_random_problems_by_the_kernels(problem):
    check_against_torch(problem, "triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["plain", "packed", "tokens"])
def test_every_float_type(backend, device, dtype, form):
    check_against_torch(two_way_problem(form, dtype), backend, device)
    check_against_torch(two_way_problem(form, dtype, hidden_size=5, nonlinearity="relu"), backend, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("steps", "batch", "hidden_size"), [(4096, 2, 32), (3, 4096, 32), (50, 64, 100), (20, 16, 128), (20, 16, 512)]
)
def test_large_problems_on_a_gpu(dtype, steps, batch, hidden_size):
    for form in ("plain", "tokens", "packed"):
        problem = two_way_problem(form, dtype, steps, batch, hidden_size, input_size=28, num_layers=1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            check_against_torch(problem, "auto", torch.device("cuda"))


@pytest.mark.gpu
def test_results_are_bitwise_repeatable_on_a_gpu():
    torch.manual_seed(0)
    rnn = FusedRNN(28, 32, num_layers=2, bidirectional=True, device="cuda", backend="triton")
    input = torch.randn(64, 1000, 28, device="cuda")
    tokens = torch.randint(0, 28, (64, 1000), device="cuda")
    for call, given in ((rnn, input), (rnn.forward_tokens, tokens)):
        runs = [differentiated(rnn, call(given)) for _ in range(20)]
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_compute_sanitizer_finds_nothing():
    program = """
import torch
from charrnn_fast import FusedRNN
rnn = FusedRNN(5, 33, num_layers=2, bidirectional=True, device="cuda", backend="triton")
packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(7, 3, 5, device="cuda"), [7, 4, 1])
for output, h_n in (rnn(packed), rnn.forward_tokens(torch.randint(0, 5, (7, 3), device="cuda"))):
    (getattr(output, "data", output).sum() + h_n.sum()).backward()
"""
    command = ["compute-sanitizer", "--error-exitcode", "1", sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


WRONG_PACKINGS = {
    "thousands of steps more": torch.tensor([4] * 5000),
    "a sum above the rows": torch.tensor([4, 4, 4]),
    "a sum below the rows": torch.tensor([4, 3]),
    "increasing": torch.tensor([3, 3, 4]),
    "too large at once": torch.tensor([2**40]),
    "negative": torch.tensor([12, -2]),
    "a step without rows": torch.tensor([5, 5, 0]),
    "floats": torch.tensor([4.0, 3.0, 3.0]),
    "no vector": torch.tensor([[4, 3, 3]]),
    "int32": torch.tensor([4, 3, 3], dtype=torch.int32),
}


@pytest.mark.parametrize("wrong", WRONG_PACKINGS)
@pytest.mark.parametrize("initial", [False, True])
def test_batch_sizes_that_cannot_be_are_torchs_matter(backend, wrong, initial):
    theirs, ours = pair(5, 7, backend=backend)
    packed = PackedSequence(torch.randn(10, 5), WRONG_PACKINGS[wrong])
    hx = torch.randn(1, 4, 7) if initial else None
    try:
        expected = theirs(packed, hx)
    except Exception as error:
        assert refusal(ours, packed, hx) == (type(error), str(error))
    else:
        torch.testing.assert_close(ours(packed, hx), expected)
    ids = PackedSequence(torch.zeros(10, dtype=torch.int64), packed.batch_sizes)
    with pytest.raises(ValueError, match="batch_sizes must"):
        ours.forward_tokens(ids, hx)
