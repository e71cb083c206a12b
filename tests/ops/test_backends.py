"""The backend table: what is chosen, what is refused and in which words."""

import copy

import pytest
import torch

from charrnn_fast import FusedRNN, clip_grad_norm_, linear_cross_entropy
from charrnn_fast.kernels import native
from charrnn_fast.ops import backends, elman_layer
from charrnn_fast.ops.clip_grad_norm import clip_and_sgd_step_
from charrnn_fast.ops.elman import elman
from charrnn_fast.ops.generate import generate
from charrnn_fast.ops.precision import rnn_precision
from charrnn_fast.ops.windows import windows

CPU = torch.device("cpu")
ON_CPU = "native" if native.available() is None else "torch"  # what auto chooses, with and without the C extension
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")


@pytest.fixture(autouse=True)
def no_default(monkeypatch, choices_anew):
    monkeypatch.delenv("CHARRNN_BACKEND", raising=False)


def choose(device, dtype, hidden_size, backend):
    return backends.choose("elman", device, dtype, hidden_size=hidden_size, backend=backend)


@interpreted
def test_auto_does_not_choose_the_interpreter():
    explanation = backends.explain(32)
    assert explanation.backend == ON_CPU
    assert "interpreted" in explanation.why_not["triton"]
    assert str(explanation).splitlines()[0] == f"{ON_CPU}: runs"


def test_without_the_c_extension_torch_serves(monkeypatch):
    monkeypatch.setattr(native.library, "missing", "the C extension is not built (for this test)")
    explanation = backends.explain(32)
    assert explanation.backend == "torch"
    assert explanation.why_not["native"] == "the C extension is not built (for this test)"
    with pytest.raises(
        RuntimeError, match=r"'native' cannot run elman with hidden_size=32 in .* the C extension is not built"
    ):
        choose(CPU, torch.float32, 32, "native")


@interpreted
def test_a_backend_asked_for_by_name():
    assert choose(CPU, torch.float32, 32, "triton") == "triton"
    assert choose(CPU, torch.float32, 32, "torch") == "torch"
    why_not = backends.explain(32, backend="triton").why_not
    assert why_not.keys() == {"native", "torch"} and why_not["torch"] == "'triton' was asked for"


@interpreted
def test_the_environment_sets_the_default_alone(monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    assert choose(CPU, torch.float32, 32, "auto") == "triton"
    assert choose(CPU, torch.float32, 32, "torch") == "torch"
    monkeypatch.setenv("CHARRNN_BACKEND", "")
    assert choose(CPU, torch.float32, 32, "auto") == ON_CPU


def test_unknown_names_list_the_known(monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown backend 'cuda'\. Select from 'auto', 'triton', .*'torch'\."):
        choose(CPU, torch.float32, 32, "cuda")
    monkeypatch.setenv("CHARRNN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"CHARRNN_BACKEND is 'fastest'\. Select from 'auto', 'triton', "):
        choose(CPU, torch.float32, 32, "auto")


@interpreted
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_backend_asked_for_that_cannot_run_says_why(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    with pytest.raises(
        RuntimeError, match=r"'triton' cannot run elman with hidden_size=5000 in torch\.float32 on cpu: hidden"
    ):
        choose(CPU, torch.float32, 5000, "auto" if by_environment else "triton")


@pytest.mark.parametrize(
    ("device", "dtype", "hidden_size", "chosen", "why"),
    [
        ("meta", torch.float32, 32, "torch", "no kernels for device type 'meta'"),
        ("cpu", torch.complex64, 32, "torch", "complex64|needs a CUDA"),
        ("cpu", torch.float32, 100_000, ON_CPU, "too large|needs a CUDA"),
    ],
)
def test_auto_falls_back_and_explain_tells(device, dtype, hidden_size, chosen, why):
    assert choose(torch.device(device), dtype, hidden_size, "auto") == chosen
    explanation = backends.explain(hidden_size, dtype, device)
    assert explanation.backend == chosen
    with pytest.raises(RuntimeError, match=why):
        choose(torch.device(device), dtype, hidden_size, "triton")


def test_without_the_package_triton(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert backends.explain(32).why_not["triton"] == "the package triton is not installed"


def test_compiled_kernels_do_not_run_on_a_cpu(monkeypatch):
    from charrnn_fast.kernels.triton import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert choose(CPU, torch.float32, 32, "auto") == ON_CPU
    assert "TRITON_INTERPRET=1" in backends.explain(32).why_not["triton"]


def test_the_last_row_of_every_operation_runs_everything():
    for rows in backends.TABLE.values():
        names = [row.name for row in rows]
        assert names == [name for name in backends.NAMES if name in names]  # in the order of preference
        assert rows[-1].name == "torch" and rows[-1].limits(CPU, torch.complex64, backends.Sizes(10**9)) is None
    with pytest.raises(ValueError, match="backend 'torch' has no kernels"):
        elman_layer.kernels_of("torch", CPU, torch.float32, 32)


@interpreted
@pytest.mark.parametrize("operation", backends.TABLE)
def test_every_operation_answers_the_same_questions(monkeypatch, operation):
    """Which backend by itself, by name and by the environment; why not the others; and that one cannot, in one form."""
    sizes = {"hidden_size": 32, "batch_size": 4, "num_classes": 28}
    automatic = backends.explain(dtype=torch.float32, operation=operation, **sizes)
    rows = [row.name for row in backends.TABLE[operation]]
    assert automatic.backend == (ON_CPU if "native" in rows else "torch")
    assert {automatic.backend, *automatic.why_not} == set(rows)
    for name in backends.NAMES[1:]:
        monkeypatch.setenv("CHARRNN_BACKEND", name)
        backends.forget()
        if name == "native" and "native" in rows and native.available():
            continue
        expected = name if name in rows else "torch"  # it is made of other operations there
        assert backends.choose(operation, CPU, torch.float32, **sizes) == expected
        explanation = backends.explain(dtype=torch.float32, operation=operation, **sizes)
        assert explanation.backend == expected
        assert all(why == f"'{expected}' was asked for" or " " in why for why in explanation.why_not.values())
        meta = torch.device("meta")
        if name in rows[:-1] and not backends.TABLE[operation][0].shortcut:
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run {operation} with hidden_size=32, "):
                backends.choose(operation, meta, torch.float32, **sizes)
        else:
            assert backends.choose(operation, meta, torch.float32, **sizes) == "torch"


IDS, SQUARE = torch.zeros(3, 3, dtype=torch.int64), torch.eye(3)
CALLS = {  # with a parameter that has a gradient
    "elman": lambda p: elman(IDS, None, SQUARE, SQUARE)[0],
    "linear_cross_entropy": lambda p: linear_cross_entropy(SQUARE, SQUARE, IDS[0]),
    "clip_grad_norm_": lambda p: clip_grad_norm_([p], 0.1),
    "clip_and_sgd_step_": lambda p: clip_and_sgd_step_([p], 0.1, 1.0),
    "windows": lambda p: windows(torch.arange(9), torch.zeros(2, dtype=torch.int64), 3)[0],
    "generate": lambda p: generate(IDS, 2, [(SQUARE, SQUARE, SQUARE[0])], SQUARE)[0],
}
CANNOT_RUN = [(operation, row.name) for operation in CALLS for row in backends.TABLE[operation][:-1]]


def test_every_operation_with_backends_of_its_own_is_called_here():
    """Those with a shortcut are made of others where they cannot run."""
    assert CALLS.keys() == {name for name, rows in backends.TABLE.items() if not rows[0].shortcut}


@pytest.mark.parametrize(("operation", "backend"), CANNOT_RUN)
def test_a_call_by_a_backend_that_cannot_run_says_so(monkeypatch, operation, backend):
    parameter = torch.ones(3)
    parameter.grad = torch.ones(3)
    monkeypatch.setattr(backends, "triton_cannot_run_on", lambda device: "there is no such device here")
    monkeypatch.setattr(native.library, "missing", "the C extension is not built")
    monkeypatch.setenv("CHARRNN_BACKEND", backend)
    with pytest.raises(RuntimeError, match=rf"backend '{backend}' cannot run {operation} .*on cpu: the"):
        CALLS[operation](parameter)
    assert torch.equal(parameter, torch.ones(3)) and torch.equal(parameter.grad, torch.ones(3))
    results = []
    for other in ("auto", "torch"):
        monkeypatch.setenv("CHARRNN_BACKEND", other)
        results.append(CALLS[operation](copy.deepcopy(parameter)))
    assert torch.equal(*results)


@pytest.mark.skipif(torch.version.hip is not None, reason="TF32 is NVIDIA's")
def test_tf32_follows_torchs_switch_for_rnns(monkeypatch):
    gpu = torch.device("cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert rnn_precision(gpu, torch.float32) == "tf32"
        assert rnn_precision(gpu, torch.float64) == rnn_precision(CPU, torch.float32) == "ieee"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert rnn_precision(gpu, torch.float32) == "ieee"


@pytest.mark.skipif(backends.triton_cannot_run_on(CPU) is not None, reason="Triton is not interpreted here")
def test_explain_says_which_kernel_and_why():
    few = str(backends.explain(128, backend="triton", batch_size=1))
    many = str(backends.explain(128, backend="triton", batch_size=4096))
    assert few.startswith("triton: runs: FMA, ")
    assert "cuDNN" in few
    assert many.startswith("triton: runs: tensor cores in three products, 8 rows and 8 warps a program (derived")


@pytest.mark.gpu
def test_auto_on_a_gpu():
    assert choose(torch.device("cuda"), torch.float32, 32, "auto") == "triton"
    assert choose(torch.device("cuda"), torch.float32, 5000, "auto") == "torch"
    with pytest.raises(RuntimeError, match="needs a CUDA or ROCm device"):
        choose(CPU, torch.float32, 32, "triton")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("biases", [0, 1, 2])
def test_rows_beyond_which_the_kernels_are_slower_go_to_torch_from_a_function_too(monkeypatch, reverse, biases):
    """ops.elman, recorded or not, one direction either way, any biases; and it can be differentiated twice."""
    if torch.cuda.is_available():
        pytest.skip("on a CPU, whose kernels are interpreted")
    from charrnn_fast.kernels.triton import elman as kernels

    monkeypatch.setattr(backends, "interpreted", lambda device: None)
    monkeypatch.setattr(backends, "_most_rows", lambda *arguments: 3)
    forward, taken = kernels.elman_forward, []

    def noted(x, *arguments, **options):
        taken.append(x.shape[1])
        return forward(x, *arguments, **options)

    monkeypatch.setattr(kernels, "elman_forward", noted)
    elman_layer.forget()
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 2), (8, 8), *[(8,)] * biases]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for B in (3, 4):
        x = torch.randn(5, B, 2, generator=generator, dtype=torch.float64)
        h0 = torch.randn(B, 8, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            found = elman(x, h0, *weights, reverse=reverse)
            wanted = elman(x, h0, *weights, reverse=reverse, backend="torch")
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(elman(x, h0, *weights, reverse=reverse), wanted)
    assert taken == [3, 3]
    assert elman(torch.zeros(0, 4, 2, dtype=torch.float64), None, *weights)[0].shape == (0, 4, 8)
    x = x.requires_grad_()

    def twice(**options):
        out, _ = elman(x, h0, *weights, reverse=reverse, **options)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return grad, *torch.autograd.grad(grad.square().sum(), x)

    torch.testing.assert_close(twice(), twice(backend="torch"))
    elman(x, h0, *weights, backend="triton")
    assert taken[-1] == 4  # it was asked for
    elman_layer.forget()


def test_rows_beyond_which_the_kernels_are_slower_go_to_torch(monkeypatch):
    """Of a hidden size whose kernels are a grid's, by batch; but not where they were asked for by name."""
    if torch.cuda.is_available():
        pytest.skip("on a CPU, whose kernels are interpreted")
    from charrnn_fast.kernels.triton import elman_grid

    monkeypatch.setattr(backends, "interpreted", lambda device: None)
    taken = []

    def launch(self, grid, device, x, *arguments):
        taken.append(x.shape[1])
        raise NotImplementedError

    monkeypatch.setattr(elman_grid.GridLaunch, "__call__", launch)
    rnn = FusedRNN(2, 384)
    most = backends.most_rows("auto", "triton", torch.device("cpu"), torch.float32, 384)
    assert most == 128
    with torch.no_grad():
        with pytest.raises(NotImplementedError):
            rnn(torch.zeros(4, most, 2))
        assert rnn(torch.zeros(4, most + 1, 2))[0].shape == (4, most + 1, 384)
        with pytest.raises(NotImplementedError):
            FusedRNN(2, 384, backend="triton")(torch.zeros(4, most + 1, 2))
    assert taken == [most, most + 1]
    assert "a grid by tensor cores in three products" in backends.explain(384, batch_size=most).how
    explanation = backends.explain(384, batch_size=most + 1)
    assert explanation.backend == ON_CPU  # the next row that can
    assert "not known to be faster than cuDNN" in explanation.why_not["triton"]
    assert backends.explain(384, backend="triton", batch_size=most + 1).backend == "triton"
