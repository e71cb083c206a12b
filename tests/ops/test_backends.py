"""The backend table: what is chosen, what is refused and in which words."""

from dataclasses import replace

import pytest
import torch

from charrnn_fast import FusedRNN
from charrnn_fast.kernels import native
from charrnn_fast.ops import backends, elman_layer

CPU = torch.device("cpu")
ON_CPU = "native" if native.available() is None else "torch"  # what auto chooses, with and without the C extension
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")


@pytest.fixture(autouse=True)
def no_default(monkeypatch):
    """No default from outside, and no choice remembered that a test changes the grounds of."""
    monkeypatch.delenv("CHARRNN_BACKEND", raising=False)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


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
    with pytest.raises(RuntimeError, match=r"'native' cannot run hidden_size=32, .* the C extension is not built"):
        backends.choose("native", CPU, torch.float32, 32)


@interpreted
def test_a_backend_asked_for_by_name():
    assert backends.choose("triton", CPU, torch.float32, 32) == "triton"
    assert backends.choose("torch", CPU, torch.float32, 32) == "torch"
    why_not = backends.explain(32, backend="triton").why_not
    assert why_not.keys() == {"native", "torch"} and why_not["torch"] == "'triton' was asked for"


@interpreted
def test_the_environment_sets_the_default_alone(monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    assert backends.choose("auto", CPU, torch.float32, 32) == "triton"
    assert backends.choose("torch", CPU, torch.float32, 32) == "torch"
    monkeypatch.setenv("CHARRNN_BACKEND", "")
    assert backends.choose("auto", CPU, torch.float32, 32) == ON_CPU


def test_unknown_names_list_the_known(monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown backend 'cuda'\. Select from 'auto', 'triton', .*'torch'\."):
        backends.choose("cuda", CPU, torch.float32, 32)
    monkeypatch.setenv("CHARRNN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"CHARRNN_BACKEND is 'fastest'\. Select from 'auto', 'triton', "):
        backends.choose("auto", CPU, torch.float32, 32)


@interpreted
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_backend_asked_for_that_cannot_run_says_why(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run hidden_size=5000, torch\.float32 on cpu: hidden"):
        backends.choose("auto" if by_environment else "triton", CPU, torch.float32, 5000)


@pytest.mark.parametrize(
    ("device", "dtype", "hidden_size", "chosen", "why"),
    [
        ("meta", torch.float32, 32, "torch", "no kernels for device type 'meta'"),
        ("cpu", torch.complex64, 32, "torch", "complex64|needs a CUDA"),
        ("cpu", torch.float32, 100_000, ON_CPU, "too large|needs a CUDA"),
    ],
)
def test_auto_falls_back_and_explain_tells(device, dtype, hidden_size, chosen, why):
    assert backends.choose("auto", torch.device(device), dtype, hidden_size) == chosen
    explanation = backends.explain(hidden_size, dtype, device)
    assert explanation.backend == chosen
    with pytest.raises(RuntimeError, match=why):
        backends.choose("triton", torch.device(device), dtype, hidden_size)


def test_without_the_package_triton(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert backends.explain(32).why_not["triton"] == "the package triton is not installed"


def test_compiled_kernels_do_not_run_on_a_cpu(monkeypatch):
    from charrnn_fast.kernels.triton import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert backends.choose("auto", CPU, torch.float32, 32) == ON_CPU
    assert "TRITON_INTERPRET=1" in backends.explain(32).why_not["triton"]


def test_every_row_but_the_last_has_kernels():
    assert [row.name for row in backends.BACKENDS if row.kernels is None] == [backends.BACKENDS[-1].name] == ["torch"]
    with pytest.raises(ValueError, match="backend 'torch' has no kernels"):
        backends.kernels_of("torch", CPU, torch.float32, 32)


@pytest.mark.skipif(torch.version.hip is not None, reason="TF32 is NVIDIA's")
def test_tf32_follows_torchs_switch_for_rnns(monkeypatch):
    gpu = torch.device("cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert backends._precision(gpu, torch.float32) == "tf32"
        assert backends._precision(gpu, torch.float64) == backends._precision(CPU, torch.float32) == "ieee"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert backends._precision(gpu, torch.float32) == "ieee"


@pytest.mark.skipif(backends.triton_cannot_run_on(CPU) is not None, reason="Triton is not interpreted here")
def test_explain_says_which_kernel_and_why():
    few = str(backends.explain(128, backend="triton", batch_size=1))
    many = str(backends.explain(128, backend="triton", batch_size=4096))
    assert few.startswith("triton: runs: FMA, ")
    assert "cuDNN" in few
    assert many.startswith("triton: runs: tensor cores in three products, 8 rows and 8 warps a program (derived")


@pytest.mark.gpu
def test_auto_on_a_gpu():
    assert backends.choose("auto", torch.device("cuda"), torch.float32, 32) == "triton"
    assert backends.choose("auto", torch.device("cuda"), torch.float32, 5000) == "torch"
    with pytest.raises(RuntimeError, match="needs a CUDA or ROCm device"):
        backends.choose("triton", CPU, torch.float32, 32)


def test_rows_beyond_which_the_kernels_are_slower_go_to_torch(monkeypatch):
    """Of a hidden size whose kernels are a grid's, by batch; but not where they were asked for by name."""
    if torch.cuda.is_available():
        pytest.skip("on a CPU, whose kernels are interpreted")
    from charrnn_fast.kernels.triton import elman_grid

    rows = tuple(replace(row, should_not=backends._never) for row in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", rows)
    for kept in (backends._choose, elman_layer._choose_layer):
        kept.cache_clear()
    taken = []

    def forward(x, weight_hh, *arguments, **options):
        taken.append(x.shape[1])
        raise NotImplementedError

    monkeypatch.setattr(elman_grid, "elman_grid_forward", forward)
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
    assert explanation.backend == "torch"
    assert "not known to be faster than cuDNN" in explanation.why_not["triton"]
    assert backends.explain(384, backend="triton", batch_size=most + 1).backend == "triton"
    for kept in (backends._choose, elman_layer._choose_layer):
        kept.cache_clear()
