"""For the tests of kernels: C by each instruction set that this machine has, on one thread or several."""

from collections.abc import Iterator

import needs
import pytest
import torch

from charrnn_fast.kernels import native


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """After each test the threads and the instruction set are again what they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if native.available() is None:
        native.set_isa(None)


@pytest.fixture(params=needs.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """The instruction set that C runs by."""
    needs.native_kernels(request.param)
    return request.param
