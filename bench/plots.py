"""Pictures of a recorded run that can be read without a text beside them. Needs matplotlib (ImportError).

speedup.png: each other side's time over ours, row by row; growth.png: cost as T, B and H grow, with the floor;
roofline.png: the rate of arithmetic against its intensity; on a GPU grid.png: speed-up over H by dtype, T and B.
"""

from pathlib import Path

from charrnn_fast.bench.peers import Ours, TorchRNN
from charrnn_fast.bench.report import TITLES, measured, sides

OURS, BASELINE = Ours.name, TorchRNN.name
OUR_COLOR, FLOOR_COLOR = "#1f5fa8", "#555555"
COLORS = ("#d1495b", "#edae49", "#2e8b57", "#66578c", "#8d6346", "#4d9de0")
MARKERS = "osD^vP"
ELMAN = ("forward", "forward_backward")


def draw(content: dict, folder: Path) -> list[Path]:
    """Write every picture that the run has data for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, sweeps = measured(content["rows"]), measured(content["sweeps"])
    grid = [row for row in rows if row["task"] in ELMAN and row["name"].startswith("H=") and BASELINE in row["ratios"]]
    named = [row for row in rows if row not in grid]
    pictures = {
        "speedup.png": (_speedup, [row for row in named if row["ratios"]]),
        "growth.png": (_growth, sweeps),
        "roofline.png": (_roofline, [row for row in named if row["task"] in ELMAN]),
        "grid.png": (_grid, grid),
    }
    paths = []
    for name, (picture, chosen) in pictures.items():
        if chosen:
            figure = picture(chosen, content)
            figure.supxlabel(_caption(content["machine"]), fontsize=7, color="#666666")
            figure.savefig(folder / name, dpi=150)
            paths.append(folder / name)
    return paths


def _caption(machine: dict) -> str:
    chip = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{chip}; torch {machine['torch']}; medians of one run, all sides by turns"


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(value: float, _position: int = 0) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _style(names: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by side, the same in every picture of a run."""
    return {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


RATIOS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def _ratio_scale(axis, low: float, high: float) -> None:
    """A logarithmic axis with the ratios in low..high as ticks, written out."""
    ticks = [ratio for ratio in RATIOS if low <= ratio <= high]
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(ticks, [f"{ratio:g}" for ratio in ticks])
    axis.set_ticks([], minor=True)


def _speedup(rows: list[dict], content: dict):
    """One line a row, one mark a side: median and quartiles of its time over ours."""
    rows = sorted(rows, key=lambda row: list(TITLES).index(row["task"]))
    style = _style(sides(rows))
    figure = _figure(8.0, 1.6 + 0.27 * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for name, ratio in row["ratios"].items():
            color, marker = style[name]
            axes.plot([ratio["low"], ratio["high"]], [y, y], color=color, linewidth=1.2, alpha=0.6)
            axes.plot(ratio["median"], y, marker, color=color, markersize=5)
        if y and rows[y - 1]["task"] != row["task"]:
            axes.axhline(y - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.axvline(1, color=OUR_COLOR, linewidth=1.5)
    low = min(0.5, *(0.8 * ratio["low"] for row in rows for ratio in row["ratios"].values()))
    high = max(2.0, *(1.2 * ratio["high"] for row in rows for ratio in row["ratios"].values()))
    _ratio_scale(axes.xaxis, low, high)
    axes.set_xlim(low, high)
    axes.axvspan(low, 1, color="#f3e3e3", zorder=0)
    axes.set_yticks(range(len(rows)), [f"{TITLES[row['task']]}: {row['name']}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"times faster is {OURS} than this side (shaded: slower); bars are quartiles")
    handles = [axes.plot([], [], marker, color=color, label=name)[0] for name, (color, marker) in style.items()]
    handles.append(axes.plot([], [], color=OUR_COLOR, label=f"{OURS} = 1")[0])
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def _growth(rows: list[dict], content: dict):
    """A panel for each size that grows: our cost, the other sides', and the floor."""
    names = {"T": "T, time steps", "B": "B, sequences", "H": "H, hidden units"}
    axis_names = list(dict.fromkeys(row["sweep"] for row in rows))
    style = _style(sides(rows))
    figure = _figure(3.6 * len(axis_names) + 0.4, 3.9)
    panels = figure.subplots(1, len(axis_names), sharey=True, squeeze=False)[0]
    for axes, axis in zip(panels, axis_names, strict=True):
        points = [row for row in rows if row["sweep"] == axis]
        sizes = [row[axis] for row in points]
        for name, (color, marker) in style.items():
            found = [(row[axis], row["peer_ms"][name]) for row in points if name in row["peer_ms"]]
            if found:
                axes.plot(*zip(*found, strict=True), f"{marker}-", color=color, label=name, linewidth=1.2, markersize=4)
        ours = [row["ms"] for row in points]
        axes.plot(sizes, ours, "o-", color=OUR_COLOR, label=OURS, linewidth=2.2, markersize=5)
        axes.plot(sizes, [row["floor_ms"] for row in points], "--", color=FLOOR_COLOR, label="floor", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(_plain)
        axes.set_xlabel(names[axis])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds, forward and backward")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Cost as one size grows (the others stay at T=64, B=32, H=128)", fontsize=10)
    return figure


def _roofline(rows: list[dict], content: dict):
    """GFLOP/s reached against FLOPs a byte, ours and torch.nn.RNN's joined by a line, under the measured roof."""
    rates = content["rates"]["fp32"]
    figure = _figure(8.0, 5.0)
    axes = figure.subplots()
    marks = dict(zip(ELMAN, "os", strict=True))
    for row in rows:
        intensity, marker = row["flops"] / row["bytes"], marks[row["task"]]
        reached = row["flops"] / row["ms"] / 1e6
        axes.plot(intensity, reached, marker, color=OUR_COLOR, markersize=6)
        lower = reached
        if BASELINE in row["peer_ms"]:
            lower = row["flops"] / row["peer_ms"][BASELINE] / 1e6
            axes.plot([intensity, intensity], [lower, reached], color="#cccccc", linewidth=1, zorder=0)
            axes.plot(intensity, lower, marker, color=COLORS[0], markersize=6, fillstyle="none")
        if row["task"] == "forward":  # below the pair, where the points lie further apart than at the roof
            axes.annotate(
                row["name"], (intensity, lower), (0, -13), textcoords="offset points", fontsize=8, ha="center"
            )
    low, high = (edge(row["flops"] / row["bytes"] for row in rows) for edge in (min, max))
    span = sorted([low / 2, rates["gemm_flops"] / rates["copy_bytes"], high * 3])
    roof = [min(rates["gemm_flops"], x * rates["copy_bytes"]) / 1e9 for x in span]
    axes.plot(span, roof, color=FLOOR_COLOR, linewidth=1.5)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
    axes.grid(alpha=0.3)
    handles = [
        axes.plot([], [], marks[task], color=c, fillstyle=fill, label=f"{name}, {TITLES[task]}")[0]
        for name, c, fill in ((OURS, OUR_COLOR, "full"), (BASELINE, COLORS[0], "none"))
        for task in ELMAN
    ]
    roof_label = f"roof: {rates['gemm_flops'] / 1e9:.0f} GFLOP/s GEMM, {rates['copy_bytes'] / 1e9:.0f} GB/s copy"
    handles.append(axes.plot([], [], color=FLOOR_COLOR, label=roof_label)[0])
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
    return figure


def _grid(rows: list[dict], content: dict):
    """Speed-up over torch.nn.RNN against H: panels by T and dtype, a line for each B, solid forward."""
    dtypes, steps = (list(dict.fromkeys(row[key] for row in rows)) for key in ("dtype", "T"))
    figure = _figure(3.6 * len(dtypes) + 0.6, 3.3 * len(steps) + 0.5)
    panels = figure.subplots(len(steps), len(dtypes), sharex=True, sharey=True, squeeze=False)
    ratios = [row["ratios"][BASELINE]["median"] for row in rows]
    sizes = sorted({row["H"] for row in rows})
    for T, line in zip(steps, panels, strict=True):
        for dtype, axes in zip(dtypes, line, strict=True):
            _grid_panel(axes, [row for row in rows if (row["T"], row["dtype"]) == (T, dtype)])
            axes.axhline(1, color=OUR_COLOR, linewidth=1.5)
            axes.set_title(f"{dtype}, T={T}", fontsize=9)
            axes.set_xscale("log")
            axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8, rotation=45)
            axes.set_xticks([], minor=True)
            _ratio_scale(axes.yaxis, min(*ratios, 0.5) / 1.2, max(*ratios, 2) * 1.2)
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("H, hidden units")
    figure.supylabel(f"times faster than {BASELINE}", fontsize=10)
    title = "solid: forward\ndotted: forward and backward"
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", title=title, frameon=False)
    return figure


def _grid_panel(axes, rows: list[dict]) -> None:
    lines = {"forward": "-", "forward_backward": ":"}
    for i, batch in enumerate(sorted({row["B"] for row in rows})):
        for task, line in lines.items():
            chosen = [row for row in rows if (row["B"], row["task"]) == (batch, task)]
            points = sorted((row["H"], row["ratios"][BASELINE]["median"]) for row in chosen)
            if points:
                label = f"B={batch}" if task == "forward" else None
                style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
                axes.plot(*zip(*points, strict=True), line, label=label, **style)
