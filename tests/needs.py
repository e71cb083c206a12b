"""What a test needs that not every machine has. The summary names what was skipped and why; .ci/run fails where the C
extension could not be built, so that its tests are never all skipped there unseen.
"""

from typing import Any

import pytest
import torch

from charrnn_fast.kernels import native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the Triton kernels run
CPU = torch.device("cpu")
ISAS = native.ISAS if native.available() else native._native.isas()  # without the C extension each is skipped
NATIVE = pytest.mark.skipif(native.available() is not None, reason=f"backend 'native': {native.available()}")


def native_kernels(isa: str | None = None) -> None:
    """Skip the test, with the reason, where there is no C extension; from here on it runs by this instruction set."""
    if (why := native.available()) is not None:
        pytest.skip(f"backend 'native': {why}")
    if isa is not None:
        native.set_isa(isa)


def each_backend(*, native: object, **triton: object) -> Any:
    """A fixture: each of Triton's, by these names, then C's by each instruction set."""

    @pytest.fixture(params=[*triton, *ISAS])
    def one(request: pytest.FixtureRequest) -> object:
        if request.param in triton:
            return triton[request.param]
        native_kernels(request.param)
        return native

    return one
