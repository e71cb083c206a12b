"""Timing by turns, floors, exponents and memory."""

import itertools

import pytest
import torch

from charrnn_fast.bench import measure
from charrnn_fast.bench.measure import CPU, Spread
from charrnn_fast.kernels import native


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_sides_take_turns():
    order = []
    jobs = {name: lambda name=name: order.append(name) for name in ("ours", "a", "b")}
    for job in jobs.values():
        job()
    order.clear()
    times = measure.alternate(jobs, 0.0, least=3)
    assert {name: len(found) for name, found in times.items()} == {"ours": 3, "a": 3, "b": 3}
    assert all(seconds > 0 for found in times.values() for seconds in found)
    groups = [name for name, _ in itertools.groupby(order)]
    assert groups[-9:] == ["a", "b", "ours"] * 3


def test_a_short_job_is_called_often_enough_for_the_clock():
    assert measure.calls_for(1.0, CPU) == 1
    assert measure.calls_for(1e-6, CPU) == pytest.approx(200, abs=1)
    assert measure.calls_for(0.0, CPU) == measure.MOST_CALLS


def test_seconds_per_call_is_a_mean(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def job():
        now[0] += 0.01

    assert measure.seconds_per_call(job, calls=3) == pytest.approx(0.01)


def test_ratios_are_taken_round_by_round():
    found = measure.ratios([1.0, 2.0, 4.0], {"a": [2.0, 4.0, 8.0]})
    assert found["a"] == Spread(2.0, 2.0, 2.0)


def test_rotation_goes_through_all_jobs():
    job = measure.rotate([lambda: 1, lambda: 2, lambda: 3])
    assert [job() for _ in range(5)] == [1, 2, 3, 1, 2]


def test_floor_is_the_larger_of_arithmetic_and_traffic():
    rates = {"gemm_flops": 100.0, "copy_bytes": 10.0}
    assert measure.floor(200.0, 5.0, rates) == 2.0
    assert measure.floor(200.0, 50.0, rates) == 5.0


def test_exponents_of_growth():
    assert measure.exponents([1, 2, 4], [3.0, 6.0, 24.0]) == pytest.approx([1.0, 2.0])


def test_peak_bytes_counts_what_is_held_at_once():
    def job():
        first = torch.empty(1 << 20)
        del first
        return torch.empty(1 << 20) + 1

    assert 8 << 20 <= measure.peak_bytes(job) < 9 << 20


def test_peak_bytes_does_not_deduct_what_was_held_before():
    kept = []

    def job():
        kept.clear()
        kept.append(torch.empty(1 << 20) + 1)

    for _ in range(3):  # from the second call on the memory that is freed first was allocated under the profiler
        assert 8 << 20 <= measure.peak_bytes(job) < 9 << 20


@pytest.mark.skipif(native.available() is not None, reason=f"native: {native.available()}")
def test_peak_bytes_counts_what_the_kernels_work_in():
    x, weight = torch.randn(2, 3, 64), torch.randn(64, 64)
    native.elman_forward(x, [weight], out=x)
    assert measure.peak_bytes(lambda: native.elman_forward(x, [weight], out=x)) > weight.nbytes  # packed


def test_rates_are_those_of_the_arguments():
    assert measure.gemm_rate(size=64) > 0
    assert measure.copy_rate(numbers=1024) > 0


def test_machine_names_its_cpu_and_instructions():
    found = measure.machine()
    assert found["cpu"] and found["instructions"] and found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__


@pytest.mark.gpu
def test_device_time_grows_with_the_work():
    device = torch.device("cuda")
    small, large = (torch.randn(n, n, device=device) for n in (1024, 4096))
    times = measure.alternate({"large": lambda: large @ large, "small": lambda: small @ small}, 0.2, device)
    ratio = Spread.of([a / b for a, b in zip(times["large"], times["small"], strict=True)])
    assert 16 < ratio.median < 256  # 64 times the work
    assert measure.input_sets(1e6, device) > 1
    assert measure.peak_bytes(lambda: torch.empty(1 << 20, device=device), device) >= 4 << 20
