"""The programs of a grid, interpreted, in a process for each, on a memory that they share: by children.py, for tests.

A process has one program of every team. The launcher is told that all of a launch run at once. What they make, all
steps in one launch, is bit for bit what a step a launch makes, where nobody waits.
"""

import multiprocessing
import random
import time
from types import ModuleType

import torch
from elman_problems import GRID, biases
from generate_problems import Decoder, across
from triton.runtime import interpreter

from charrnn_fast.kernels.triton import (
    elman_grid,
    elman_grid_forms,
    elman_grid_kernels,
    generate_grid,
    generate_grid_kernels,
)


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


def together(program, count: int, *arguments) -> None:
    """Run program(n, *arguments) for each n below count in a process of its own, and see them all end well."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=program, args=(n, *arguments), daemon=True) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0, process


def _forward(p, **options):
    return GRID.forward(p.x, p.weight_hh, p.h0, **biases(p), **p.options, **options)


def _backward(p, out):
    more = {"num_tokens": p.x.shape[0]} if p.options["tokens"] is not None else {}
    return GRID.backward(p.grad_out, p.grad_h_n, out, p.weight_hh, p.h0, **p.options, **more)


def _elman_program(n, p, out, grad_x, counters, found) -> None:
    for name in ("elman_grid_forward_kernel", "elman_grid_backward_kernel"):
        setattr(elman_grid, name, Own(getattr(elman_grid, name), n))
    late_announcements(elman_grid_kernels, n)
    launches = []
    elman_grid.new_counters = lambda teams, form, device: launches.append(teams) or counters[len(launches) - 1]
    own = slice(16 * n, 16 * n + 16)
    _, h_n = _forward(p, out=out)
    found[0][..., own] = h_n[..., own]
    empty, given = torch.empty, [grad_x]  # what is exchanged is the first that is shaped as the output
    torch.empty = lambda shape, **kind: given.pop() if given and shape == out.shape else empty(shape, **kind)
    _, _, grad_h0, _ = _backward(p, out)
    found[1][..., own] = grad_h0[..., own]


def elman() -> None:
    """The recurrence, by three programs a team and by two."""
    T = 4
    for H, options in (
        (40, {"B": 3, "packed": False, "reverse": (False, True)}),
        (31, {"B": 9, "packed": True, "tokens": True, "reverse": (True,), "seed": 1}),
    ):
        p = GRID.problem(T, H, **options)
        out, h_n = _forward(p)  # a step a launch
        wanted = [out, h_n, _backward(p, out)[2]]
        out = shared(*p.grad_out.shape)
        grad_x, counters = shared(*out.shape), [shared(32, 32, dtype=torch.int32, value=0) for _ in range(2)]
        found = shared(*h_n.shape), shared(*h_n.shape)
        programs = -(-H // 16)
        together(_elman_program, programs, p, out, grad_x, counters, found)
        for counter, most in zip(counters, (T, T + 1), strict=True):
            assert not counter[0].any(), "a program waited in vain"
            assert counter[1:3, 0].sum() == programs * most, counter
        for ours, right in zip((out, *found), wanted, strict=True):
            assert torch.equal(ours, right), (H, (ours - right).abs().max())


def _decoding_program(n, decoder, given, memory) -> None:
    generate_grid.generate_grid_kernel = Own(generate_grid.generate_grid_kernel, n)
    late_announcements(generate_grid_kernels, n)
    generate_grid._shared_memory = lambda *arguments: memory
    decoder.run(across, *given[:2], **given[2])


def decoders() -> None:
    """The decoder, by three programs a sequence."""
    own_memory, N, programs = generate_grid._shared_memory, 4, 3
    for H, V, L, P, sampled, options in (
        (48, 90, 1, 3, True, {"temperature": 0.7, "top_k": 6}),
        (40, 20, 2, 2, False, {}),
    ):
        decoder, made = Decoder(H, V, L, P=P), []
        generate_grid._shared_memory = lambda *arguments, made=made: made.append(own_memory(*arguments)) or made[-1]
        ids, _ = decoder.run(across, N, sampled, **options)  # a step a launch
        states, partials, _, counters = made[0]
        first = torch.zeros_like(states)
        first[:, 0, :, :H] = decoder.state.transpose(0, 1)
        memory = [first.share_memory_(), shared(*partials.shape, dtype=partials.dtype)]
        memory += [shared(*ids.shape, dtype=torch.int64, value=-1)]
        memory += [shared(*counters.shape, dtype=torch.int32, value=0)]
        together(_decoding_program, programs, decoder, (N, sampled, options), memory)
        assert not memory[3][0].any(), "a program waited in vain"
        assert memory[3][1:, 0].sum() == programs * ((P + N - 1) * L + 1), memory[3]
        assert torch.equal(memory[2], ids), (memory[2], ids)
        assert torch.equal(memory[0], states) and torch.equal(memory[1], partials)
