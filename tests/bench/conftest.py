"""A recorded run made up for tables and pictures: the sides' times are what the ratios say they are."""

import pytest


def _row(task, name, ms, ratios, **more):
    made = {
        key: {"low": 0.9 * r, "median": r, "high": 1.1 * r, "text": f"{r:.1f} ({0.9 * r:.1f}-{1.1 * r:.1f})"}
        for key, r in ratios.items()
    }
    sizes = {"B": 4, "T": 8, "I": 16, "H": 32, "dtype": "fp32", "path": "native"}
    peers = {key: ms * r for key, r in ratios.items()}
    row = {"task": task, "name": name, "ms": ms, "rounds": 9, "peer_ms": peers, "ratios": made, "skipped": {}}
    return row | sizes | {"flops": 1e7 * ms, "bytes": 1e6, "floor_ms": ms / 2, "over_floor": 2.0} | more


@pytest.fixture
def content():
    """Three named rows, one that was not measured, a sweep whose last step grows too fast, and a GPU's grid."""
    both = {"torch.nn.RNN": 4.0, "JAX scan": 2.0}
    rows = [
        _row("forward", "d2l", 2.0, both),
        _row("forward_backward", "santa", 1.0, {"torch.nn.RNN": 3.0, "JAX scan": 0.5}, memory_mb=3.0, memory_ratio=0.4),
        _row("lm_step", "ch8", 150.0, {"torch.nn.RNN": 2.0}, skipped={"JAX scan": "jax is not installed"}),
        {"task": "clip", "name": "d2l's", "dtype": "fp32", "not_measured": "the time was up"},
    ]
    grid = [
        _row(task, f"H={H} B={B} T=100", 1.0, {"torch.nn.RNN": H / 100}, H=H, B=B, T=100)
        for task in ("forward", "forward_backward")
        for H in (128, 256)
        for B in (1, 8)
    ]
    sweep = [
        _row("forward_backward", f"T={T}", ms, {"torch.nn.RNN": 2.0}, sweep="T", T=T)
        for T, ms in ((16, 1.0), (64, 4.0), (256, 64.0))
    ]
    machine = {"cpu": "A CPU", "threads": 2, "torch": "2.13.0"}
    rates = {"fp32": {"gemm_flops": 1e11, "copy_bytes": 1e10}}
    return {
        "command": "charrnn-fast bench",
        "machine": machine,
        "rates": rates,
        "rows": rows,
        "sweeps": sweep,
        "grid": grid,
    }
