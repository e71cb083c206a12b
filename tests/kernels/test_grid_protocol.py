"""How the programs of a grid wait for each other (kernels/triton/elman_grid_forms.py), without a GPU.

Two ways. The kernels' own `announce` and `wait` with a memory of this file beneath them, whose stores stay with a
program until it releases them: thousands of rounds by threads with random delays. And the whole kernels, interpreted in
a process for each program, all steps in one launch.
"""

import random
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl

from charrnn_fast.kernels.triton import elman_grid, elman_grid_forms, gluon_interpreter
from charrnn_fast.kernels.triton.elman_grid_tiles import (
    CHIPS,
    GRID_TILES,
    Chip,
    GridTile,
    find_grid_tile,
    programs_at_once,
)

needs_interpreter = pytest.mark.skipif(
    not gluon_interpreter.INTERPRETED.value, reason="with a GPU the functions are compiled: test_gpu_elman_grid.py"
)


class Memory:
    """Of a device: plain stores are seen by others when the storing program releases, or at any moment before."""

    def __init__(self, delay: random.Random) -> None:
        self.values: dict = {}
        self.lock, self.own, self.delay = threading.Lock(), threading.local(), delay

    def store(self, place, value) -> None:
        self.own.__dict__.setdefault("pending", []).append((place, value))
        if self.delay.random() < 0.1:
            self._flush()

    def _flush(self) -> None:
        pending = self.own.__dict__.pop("pending", ())
        with self.lock:
            self.values.update(pending)

    def load(self, place):
        time.sleep(0)
        return self.values.get(place, 0)

    def atomic_add(self, place, value, sem, scope) -> None:
        if sem == "release" and scope == "gpu":
            self._flush()
        with self.lock:
            self.values[place] = self.values.get(place, 0) + value


class Counters:
    """A pointer to a team's counters: an addition gives another, one of an array an array of them."""

    def __init__(self, team: int, offset: int = 0) -> None:
        self.place = team, "counter", offset

    def __add__(self, offset):
        team, _, mine = self.place
        if isinstance(offset, np.ndarray):
            return [Counters(team, mine + int(each)) for each in offset]
        return Counters(team, mine + offset)


@pytest.fixture
def memory(monkeypatch):
    """A memory under elman_grid_forms' functions, with numpy for the rest of the language."""
    memory = Memory(random.Random(0))
    gl = SimpleNamespace(
        load=lambda counters: np.array([memory.load(counter.place) for counter in counters]),
        atomic_add=lambda counter, value, sem, scope: memory.atomic_add(counter.place, value, sem, scope),
        arange=lambda start, end, layout: np.arange(start, end),
        SliceLayout=lambda *arguments: None,
        **{name: getattr(np, name) for name in ("where", "minimum", "maximum", "max")},
    )
    monkeypatch.setattr(elman_grid_forms, "gl", gl)
    monkeypatch.setattr(elman_grid_forms, "COUNTER_STRIDE", 32)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield memory
    sys.setswitchinterval(interval)


def form_of(programs: int, by_part: bool, most_polls: int = 1 << 24) -> SimpleNamespace:
    """A grid of programs of one unit, whose warps have two units each to sum over."""
    sizes = {"hidden": programs, "units": 1, "part": 2, "warps": -(-programs // 2), "programs": programs}
    return SimpleNamespace(**sizes, by_part=by_part, most_polls=most_polls, warp_sums=None)


def run(memory, teams: list[int], rounds: int, announce, wait, by_part: bool = True) -> list[str]:
    """Teams of so many programs, each in a thread, exchange the numbers of their rounds. What went wrong."""
    faults: list[str] = []

    def program(team: int, programs: int, n: int) -> None:
        form = form_of(programs, by_part)
        counters, added = elman_grid_forms.part_counters(Counters(team), form)
        delay, late = random.Random(1000 * team + n), [np.array([False])] * form.warps
        for i in range(rounds):
            for warp in range(form.warps):
                own = slice(warp, warp + 1)
                late[warp] = wait(counters[own], i * added[own], late[warp], form)
                others = range(2 * warp, min(2 * warp + 2, programs))
                read = [memory.load((team, i - 1, other)) for other in others] if i else []
                if late[warp].any() or read != [i] * len(read):
                    faults.append(f"team {team} program {n} warp {warp} read {read} in step {i}, late: {late[warp]}")
                    return
            if delay.random() < 0.002:
                time.sleep(1e-4)
            memory.store((team, i, n), i + 1)
            announce(Counters(team), n, form)
        finished.append((team, n))

    finished: list[tuple[int, int]] = []
    members = [(team, programs, n) for team, programs in enumerate(teams) for n in range(programs)]
    threads = [threading.Thread(target=program, args=member, daemon=True) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        if thread.is_alive():
            faults.append("a program never came to its end")
    if not faults and len(finished) < len(members):
        faults.append(f"of {members} only {finished} came to their end")
    return faults


@needs_interpreter
@pytest.mark.parametrize("by_part", [True, False])
def test_ten_thousand_rounds_without_an_early_or_a_lost_release(memory, by_part):
    assert run(memory, [3], 10_000, elman_grid_forms.announce, elman_grid_forms.wait, by_part) == []


@needs_interpreter
def test_teams_do_not_wait_for_each_other(memory):
    assert run(memory, [2, 3], 1_000, elman_grid_forms.announce, elman_grid_forms.wait) == []


@needs_interpreter
def test_the_model_sees_what_is_wrong(memory):
    """A wait that ends too early, an addition that releases nothing, and a counter that two teams share."""
    announce, wait = elman_grid_forms.announce, elman_grid_forms.wait

    def one_short(counters, target, late, form):
        return wait(counters, target - (target > 0), late, form)

    def relaxed(counters, first_unit, form):
        memory.atomic_add((counters + first_unit // form.part * 32).place, 1, "relaxed", "gpu")

    def of_team_0(counters, target, late, form):
        return wait([Counters(0, each.place[2]) for each in counters], target, late, form)

    def to_team_0(counters, first_unit, form):
        announce(Counters(0), first_unit, form)

    for teams, *functions in (([3], announce, one_short), ([3], relaxed, wait), ([3, 3], to_team_0, of_team_0)):
        memory.values.clear()
        assert run(memory, teams, 500, *functions)


@needs_interpreter
def test_who_waits_in_vain_gives_up_and_does_not_wait_again(memory):
    polls = []
    load = elman_grid_forms.gl.load
    elman_grid_forms.gl.load = lambda counters: polls.append(counters) or load(counters)
    form, counters, wait = form_of(2, False, most_polls=50), [Counters(0)], elman_grid_forms.wait
    in_time, late = np.array([False]), np.array([True])
    assert wait(counters, np.array([3]), in_time, form).all()
    assert len(polls) == 51
    assert wait(counters, np.array([6]), late, form).all()
    assert len(polls) == 52
    elman_grid_forms.announce(Counters(0), 0, form)
    assert wait(counters, np.array([1]), late, form).all()  # late once is late for good
    assert not wait(counters, np.array([1]), in_time, form).any()


@needs_interpreter
def test_every_program_counts_itself_in_once_where_it_is_waited_for():
    """The parts' counters of whole forms: as many additions a step as the warps wait for, none for a part beyond H."""
    for hidden in (16, 100, 192, 1000, 2048):
        for tile in (GridTile("mma", 16, 8, 8, 1.0, ""), GridTile("mma", 32, 16, 4, 1.0, "")):
            form = elman_grid_forms.GridForm.of(tile, hidden, tl.float32)
            programs = [0] * form.warps
            for first_unit in range(0, hidden, form.units):
                programs[first_unit // form.part] += 1
                assert first_unit % form.part + form.units <= form.part  # a program's units are in one part
            units = [min(max(hidden - part * form.part, 0), form.part) for part in range(form.warps)]
            assert programs == [-(-each // form.units) for each in units]
            assert sum(programs) == form.programs


def test_counters_may_go_round():
    """int32 differences: a wait is right as long as nobody is 2^31 additions ahead."""
    assert (torch.tensor(-(2**31) + 5, dtype=torch.int32) - torch.tensor(2**31 - 3, dtype=torch.int32)).item() == 8


@pytest.mark.parametrize("kernels", ["elman", "decoders"])
def test_the_kernels_in_a_process_for_each_program(server, kernels):
    server.call("grid_programs", kernels, seconds=300)


# How many programs run at once.


def test_programs_at_once_by_the_rules_of_occupancy():
    chip = Chip(132)
    assert programs_at_once(255, 4096, 8, chip) == 132
    assert programs_at_once(255, 4096, 4, chip) == 2 * 132
    assert programs_at_once(128, 4096, 8, chip) == 2 * 132
    assert programs_at_once(129, 4096, 8, chip) == 132
    assert programs_at_once(32, 120 * 1024, 4, chip) == 132
    assert programs_at_once(16, 0, 1, chip) == 32 * 132
    assert programs_at_once(32, 300 * 1024, 4, chip) == 0


def test_no_chosen_tile_has_a_team_that_does_not_fit():
    for target, chip in CHIPS.items():
        for kind, width in GRID_TILES:
            for hidden in (width // 2 + 1, width):
                for rows in (1, 8, 64, 1000):
                    tile = find_grid_tile(kind, hidden, target, rows, chip.processors)
                    if tile is not None:
                        assert programs_at_once(255, 48 * 1024, tile.warps, chip) >= tile.programs(hidden)


FORM = elman_grid_forms.GridForm.of(GridTile("mma", 16, 8, 8, 1.0, ""), 256, tl.float32)  # 16 programs a team


class Refusing:
    """A kernel whose launches a driver refuses beyond `most` programs; it notes the launches it makes."""

    def __init__(self, most: int) -> None:
        self.most, self.launches = most, []

    def __getitem__(self, grid):
        def launch(first_step, num_steps, first_team, F, **options):
            if options.get("launch_cooperative_grid") and grid[0] * grid[1] > self.most:
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
            self.launches.append((first_step, num_steps, first_team, grid[1], "launch_cooperative_grid" in options))

        return launch


def launches_of(monkeypatch, at_once: int, most: int, teams: int, steps: int, steps_per_launch=None) -> list:
    monkeypatch.setattr(elman_grid, "_teams_at_once", lambda *arguments: at_once)
    kernel, form = Refusing(most), FORM
    counters = torch.zeros(1 + teams, 32, dtype=torch.int32)
    elman_grid.launch_teams(kernel, lambda *launch: launch, teams, steps, steps_per_launch, counters, form, {})
    return kernel.launches


@needs_interpreter
def test_no_launch_has_more_programs_than_run_at_once(monkeypatch):
    assert launches_of(monkeypatch, 8, 128, 20, 100) == [
        (0, 100, 0, 8, True),
        (0, 100, 8, 8, True),
        (0, 100, 16, 4, True),
    ]


@needs_interpreter
def test_a_driver_that_refuses_gets_fewer_and_at_last_steps_one_by_one(monkeypatch):
    assert launches_of(monkeypatch, 8, 64, 6, 9) == [(0, 9, 0, 3, True), (0, 9, 3, 3, True)]
    single = [(step, 1, 0, 2, False) for step in range(4)]
    assert launches_of(monkeypatch, 8, 15, 2, 4) == single
    assert launches_of(monkeypatch, 0, 999, 2, 4) == single
    assert launches_of(monkeypatch, 8, 999, 2, 4, steps_per_launch=1) == single


@needs_interpreter
def test_other_errors_are_not_taken_for_a_refusal(monkeypatch):
    monkeypatch.setattr(
        Refusing, "__getitem__", lambda self, grid: lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        launches_of(monkeypatch, 8, 999, 2, 4)


@needs_interpreter
def test_debug_mode_says_who_waited_in_vain(monkeypatch):
    class Late(Refusing):
        def __getitem__(self, grid):
            return lambda *arguments, **options: counters[0, 0].fill_(1)

    counters, form = torch.zeros(2, 32, dtype=torch.int32), replace(FORM, most_polls=7)
    monkeypatch.setattr(elman_grid, "_teams_at_once", lambda *arguments: 1)
    given = Late(16), lambda *launch: launch, 1, 5, None, counters, form, {}
    elman_grid.launch_teams(*given)
    monkeypatch.setenv("CHARRNN_GRID_DEBUG", "1")
    with pytest.raises(RuntimeError, match="one of 16 programs waited for the others in vain, for 7 polls"):
        elman_grid.launch_teams(*given)
