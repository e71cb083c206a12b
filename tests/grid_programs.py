"""The programs of a grid, interpreted, in a process for each, on a memory that they share: for the tests' children.

A child has one program of every team. The launcher is told that all of a launch run at once.
"""

import random
import time
from types import ModuleType

import torch
from triton.runtime import interpreter

from charrnn_fast.kernels.triton import elman_grid, elman_grid_forms


class Own:
    """A kernel whose launches run program n of each team."""

    def __init__(self, kernel, n: int) -> None:
        self.kernel, self.n = kernel, n

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            builder = interpreter.interpreter_builder
            set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
            builder.set_grid_dim = lambda x, y, z: set_grid_dim(*grid)
            builder.set_grid_idx = lambda x, y, z: set_grid_idx(self.n, y, z)
            self.kernel[1, grid[1]](*arguments, **options)
            builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx

        return launch


def late_announcements(kernels: ModuleType, n: int) -> None:
    """Have program n announce itself late at times, and not poll all the time; and the launcher launch them together.

    kernels: the module whose kernels call `announce`.
    """
    announce, delay = kernels.announce, random.Random(n)

    def announce_late(*arguments):
        time.sleep(0.005 * delay.random() ** 4)
        announce(*arguments)

    def any_behind(value, axis):
        time.sleep(0.001)
        return greatest(value, axis)

    wait_gl = elman_grid_forms.gl
    greatest, wait_gl.max = wait_gl.max, any_behind  # `wait` asks so
    kernels.announce = announce_late
    elman_grid.INTERPRETED_AT_ONCE = 10**6


def shared(*shape: int, dtype: torch.dtype = torch.float32, value: float = float("nan")) -> torch.Tensor:
    """A tensor that processes share."""
    return torch.full(shape, value, dtype=dtype).share_memory_()
