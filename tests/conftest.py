"""For all tests: without a GPU the Triton kernels are interpreted, and what needs a GPU is skipped."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # what test files in different folders share
import malformed
from children import Server
from gpu_too import is_gpu_test

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False  # torch.nn.RNN is compared with in full float32
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import needs  # what imports the package follows the variable
from rnn_modules import OPTIONS, pair

from charrnn_fast import FusedRNN
from charrnn_fast.ops import backends, elman_layer


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.option.markexpr:  # pytest says how many are deselected; `-m slow` runs them
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
    for item in items:
        if not torch.cuda.is_available():
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
            continue
        path = Path(os.path.relpath(item.path, Path(__file__).parent)).as_posix()  # bench's are not below it
        if is_gpu_test(path, item.callspec.params if hasattr(item, "callspec") else {}):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=["torch", "triton", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        needs.native_kernels()
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels run here, a GPU or else the CPU; for another ``backend`` the CPU."""
    plain = "backend" in request.fixturenames and request.getfixturevalue("backend") != "triton"
    return torch.device("cuda" if torch.cuda.is_available() and not plain else "cpu")


@pytest.fixture
def rnn(backend: str, device: torch.device) -> FusedRNN:
    """Two layers of two directions, for input of 3 features."""
    return pair(3, 4, backend=backend, device=device, **OPTIONS)[1]


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    """Input of ``rnn``: 5 steps of 2 sequences."""
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Runs functions of the modules in tests/ in processes of their own."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def choices_anew() -> Iterator[None]:
    """No choice of a backend is remembered from before, nor after, where a test changes the grounds of choosing."""
    for forget in (backends.forget, elman_layer.forget):
        forget()
    yield
    for forget in (backends.forget, elman_layer.forget):
        forget()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["malformed"] = dict(malformed.counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    malformed.counts.update(getattr(node, "workeroutput", {}).get("malformed", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if malformed.counts:
        terminalreporter.section("malformed inputs tried")
        for kind, n in sorted(malformed.counts.items()):
            terminalreporter.write_line(f"{n:>10,} {kind}")
        terminalreporter.write_line(f"{sum(malformed.counts.values()):>10,} in all")
