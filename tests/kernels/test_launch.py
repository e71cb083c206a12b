"""Launches without Triton's dispatch: what reaches the driver, and which calls are not for it. No GPU is needed: a
library in C stands for the driver.
"""

import contextlib
import ctypes
import inspect
import random
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl

from charrnn_fast.kernels import native
from charrnn_fast.kernels.native import library
from charrnn_fast.kernels.triton import launch as launches
from charrnn_fast.kernels.triton.launch import Launch, codes_of, record_of

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(native.available() is not None, reason=f"native: {native.available()}"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the driver in use is not to be replaced"),
]
MANY = 2**31


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The stand-in, used by the C extension; its arrays `asked` and `given`."""
    path = tmp_path_factory.mktemp("driver") / "libcuda.so"
    source = Path(__file__).parent / "fake_cuda.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    library.extension.use_driver(str(path))
    fake = ctypes.CDLL(str(path))
    return SimpleNamespace(
        path=str(path),
        asked=(ctypes.c_int64 * 9).in_dll(fake, "asked"),
        given=(ctypes.c_int64 * 80).in_dll(fake, "given"),
    )


def start(parameters: int, codes: bytes, values: tuple[int, ...], cooperative: int = 0) -> bool:
    return library.extension.launch(parameters, 7, 2, 1, 128, 5000, cooperative, 1 << 40, codes, values)


def test_what_the_driver_is_given(driver):
    assert start(1, b"W", (5,)) is start(1, b"W", (MANY,)) is True
    values = (1 << 44, -1, 24, 1, 16, 7, MANY, -5, -(2**40))
    assert start(9, b"Pnp1DiLII"[:8] + b"X", values) is True
    assert list(driver.asked) == [7, 2, 1, 128, 1, 1, 5000, 1 << 40, 0]
    passed = [1 << 44, 24, 16, 7, MANY, -5, -(2**40)]
    assert list(driver.given[:9]) == [*passed, 0, 0]  # and two addresses of scratch memory that is not there
    assert start(2, b"", (), cooperative=1) is True
    assert driver.asked[8] == 1


@pytest.mark.parametrize(
    ("code", "fitting", "others"),
    [
        ("P", [0, 16, 1 << 40], [8, -1, 17]),
        ("p", [8, 17], [0, 16, -1]),
        ("n", [-1], [0, 16]),
        ("1", [1], [0, 2, 17]),
        ("D", [0, 16, -32], [1, 8, MANY]),
        ("i", [2, 17, -1], [1, 16, 0, MANY + 1]),
        ("I", [0, 1, 2, 16, -7], [MANY, -MANY - 1]),
        ("L", [MANY, 2**40], [16, MANY + 8]),
        ("l", [MANY + 1], [MANY, 17]),
        ("X", [MANY, MANY + 1], [0, 1, 16]),
        ("?", [], [0, 1]),
    ],
)
def test_a_code_takes_its_values_alone(driver, code, fitting, others):
    assert all(start(2, code.encode(), (value,)) for value in fitting)
    driver.asked[0] = -1
    assert not any(start(2, code.encode(), (value,)) for value in others)
    assert driver.asked[0] == -1  # nothing was launched


def test_errors(driver):
    with pytest.raises(RuntimeError, match="refuses a launch: CUDA_ERROR_INVALID_VALUE"):
        start(99, b"", ())
    with pytest.raises(ValueError, match="1 values for 2 codes"):
        start(2, b"PP", (0,))
    with pytest.raises(ValueError, match="at most 64"):
        start(2, b"P" * 65, (0,) * 65)
    with pytest.raises(TypeError, match="expected 10 arguments, got 1"):
        library.extension.launch(1)
    with pytest.raises(TypeError):
        start(3, b"P", ("0",))
    with pytest.raises(RuntimeError, match=r"no CUDA driver: .*no-such"):
        library.extension.use_driver("no-such-library.so")


def kernel_like(a_ptr, b_ptr, n, m, k, wide: tl.int64, F):
    """Parameters of a kernel, for Triton to look at."""


def test_codes_are_how_triton_specializes():
    """Against Triton's own dispatch, over random arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = JITFunction(kernel_like, do_not_specialize=["k", "wide"])
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(inspect.signature(kernel_like), kernel.params, backend)
    numbers, draw = torch.zeros(64), random.Random(0)
    meanings: dict[str, set[Any]] = {}
    for _ in range(500):
        pointers = [draw.choice([None, numbers[draw.randrange(8) :]]) for _ in range(2)]
        sizes = [draw.choice([0, 1, 2, 7, 16, -16, 48, MANY - 1, MANY, MANY + 1, 2**40, -MANY]) for _ in range(4)]
        _, specialization, _ = bind(*pointers, *sizes, 0, num_warps=4)
        for code, found in zip(codes_of(kernel.params, (*pointers, *sizes)), specialization, strict=False):
            meanings.setdefault(code, set()).add(tuple(map(str, found)))
    assert set(meanings) == set("PpnDi1LlIXW")
    found = {code: next(iter(kinds)) for code, kinds in meanings.items() if len(kinds) == 1}
    assert found.keys() == meanings.keys()  # one code is never two kinds to Triton
    assert found.pop("W") == found["X"]  # 64 bits: a parameter's own, whatever its value
    assert len(set(found.values())) == len(found)  # nor one kind two codes
    assert found["n"][0] == found["1"][0] == "constexpr"


@dataclass
class Kernel:
    """Stands for a compiled kernel's function: counts the launches that Triton is left with."""

    metadata: dict[str, Any] = field(default_factory=dict)
    launched: int = 0
    pre_run_hooks: list[Any] = field(default_factory=list)
    params: Any = tuple(
        SimpleNamespace(do_not_specialize=name == "T", annotation_type="") for name in ("x", "T", "stride")
    )
    types: Any = ("*fp32", "i32", "i32")

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.launched += 1
            target = SimpleNamespace(warp_size=32)
            known = {"num_ctas": 1, "num_warps": 4, "shared": 64, "target": target, **self.metadata}
            source = SimpleNamespace(signature=dict(zip("abcF", (*self.types, "constexpr"), strict=True)))
            return SimpleNamespace(metadata=SimpleNamespace(**known), src=source, function=5)

        return run


@pytest.fixture
def as_on_a_gpu(driver, monkeypatch):
    monkeypatch.setattr(launches, "INTERPRETED", False)
    monkeypatch.setattr(launches, "DRIVER", driver.path)
    monkeypatch.setattr(launches, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 9, raising=False)
    launches.driver_missing.cache_clear()
    yield driver
    launches.driver_missing.cache_clear()


GPU = torch.device("cuda", 0)


def test_the_first_call_of_a_kind_is_tritons_and_the_others_the_drivers(as_on_a_gpu):
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launch(kernel, F=1)
    launch((3, 2, 1), GPU, x, 5, 32)
    assert kernel.launched == 1
    for steps in (5, 1, 16, 1000):  # which is not specialized
        launch((3, 2, 1), GPU, x, steps, 64)
        assert kernel.launched == 1
        assert list(as_on_a_gpu.asked) == [3, 2, 1, 128, 1, 1, 64, 9, 0]
        assert list(as_on_a_gpu.given[:5]) == [x.data_ptr(), steps, 64, 0, 0]
    kernel.types = ("*fp32", "i32", "constexpr")
    launch((3, 2, 1), GPU, x, 5, 1)
    kernel.types = ("*fp32", "i32", "i32")
    launch((3, 2, 1), GPU, x[1:], 5, 32)  # no multiple of 16 bytes
    assert kernel.launched == 3
    for arguments in ((x, 6, 1), (x[1:], 6, 32), (x, 6, 32)):
        launch((3, 2, 1), GPU, *arguments)
    assert kernel.launched == 3


@pytest.mark.parametrize(
    "metadata",
    [{"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"launch_pdl": True}, {"num_ctas": 2}],
)
def test_kernels_that_the_launch_does_not_know_stay_tritons(as_on_a_gpu, metadata):
    kernel = Kernel(metadata)
    launch = Launch(kernel)
    for _ in range(3):
        launch((1, 1, 1), GPU, torch.zeros(4), 5, 32)
    assert kernel.launched == 3


def test_another_device_and_profilers_are_tritons(as_on_a_gpu, monkeypatch):
    kernel = Kernel()
    launch = Launch(kernel)
    launch((1, 1, 1), GPU, torch.zeros(4), 5, 32)
    launch((1, 1, 1), torch.device("cuda", 1), torch.zeros(4), 5, 32)
    assert kernel.launched == 2
    kernel.pre_run_hooks.append(print)
    launch((1, 1, 1), GPU, torch.zeros(4), 5, 32)
    assert kernel.launched == 3
    kernel.pre_run_hooks.clear()
    monkeypatch.setattr("triton.knobs.runtime.launch_enter_hook", lambda metadata: None)
    launch((1, 1, 1), GPU, torch.zeros(4), 5, 32)
    assert kernel.launched == 4


def test_without_a_driver_everything_is_tritons(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(launches, "DRIVER", "no-such-library.so")
    kernel = Kernel()
    launch = Launch(kernel)
    for _ in range(3):
        launch((1, 1, 1), GPU, torch.zeros(4), 5, 32)
    assert kernel.launched == 3


def test_a_signature_that_is_not_as_expected_is_not_launched():
    kernel = Kernel(types=("*fp32", "i64", "i32"))
    compiled = kernel[1]()
    assert record_of(compiled, kernel.params, (torch.zeros(4), 5, 32)) is None


def test_a_parameter_of_64_bits_has_them_whatever_its_value(as_on_a_gpu):
    """The decoder's sharpness, the bits of a double: 0.0 is as narrow as an int32."""
    of_bits = SimpleNamespace(do_not_specialize=True, annotation_type="i64")
    kernel, x = Kernel(types=("*fp32", "i64", "i32")), torch.zeros(64)
    kernel.params = (kernel.params[0], of_bits, kernel.params[2])
    launch = Launch(kernel)
    for bits in (0, 0x3FF0000000000000, 7, -(2**63)):
        launch((1, 1, 1), GPU, x, bits, 32)
        assert kernel.launched == 1
    assert as_on_a_gpu.given[1] == -(2**63)
