"""What a test needs that not every machine has. The summary names what was skipped and why; .ci/run fails where the C
extension could not be built, so that its tests are never all skipped there unseen.
"""

import pytest

from charrnn_fast.kernels import native


def native_kernels() -> None:
    """Skip the test, with the reason, where there is no C extension."""
    if (why := native.available()) is not None:
        pytest.skip(f"backend 'native': {why}")
