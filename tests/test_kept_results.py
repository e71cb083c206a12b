"""A loss that is kept after its backward pass holds nothing but its number: no gradients, no states."""

import ctypes
import sys

import kept
import pytest

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="reads Linux's /proc and trims glibc's allocator",
)


@pytest.mark.parametrize("case", [case for case in kept.CASES if case != "a leak"])
def test_kept_losses_hold_no_gradients(server, case):
    assert server.call("kept", "growth", case) < 15 * kept.MEGABYTE  # of at least 50 that their gradients have


def test_the_measure_sees_what_is_held(server):
    assert server.call("kept", "growth", "a leak") > 75 * kept.MEGABYTE
