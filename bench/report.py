"""Recorded runs as files, tables and one sentence.

    python -m charrnn_fast.bench.report bench/results/cpu.json              the Markdown tables of a recorded run
    python -m charrnn_fast.bench.report bench/results/cpu.json --plots DIR  and its pictures (needs matplotlib)
    python -m charrnn_fast.bench.report --readme README.md                  write the tables of a text's marked blocks
    python -m charrnn_fast.bench.report --readme README.md --check          and fail where they are not up to date

A block begins with a line `<!-- results: bench/results/NAME.json -->` (the path is the text's) and ends with
`<!-- end of results -->`. A content is a dict with "command", "machine", "rates" by dtype, "rows" and "sweeps"; a row
is what charrnn_fast.bench.suite.row_of returns.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from charrnn_fast.bench.grid import WORK_EXPONENT
from charrnn_fast.bench.measure import exponents

TITLES = {
    "forward": "forward",
    "forward_backward": "forward and backward",
    "lm_step": "training step",
    "generation": "1,000 characters",
    "clip": "clip",
    "resets": "resets inside a sequence",
    "checkpoint_steps": "states of every 64th step kept",
    "lengths": "lengths on the device",
}
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
SUPERLINEAR = 0.15  # more than the work's exponent by this much is a finding


def write(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "not_measured" not in row]


def sides(rows: list[dict]) -> list[str]:
    """Every other side that has a ratio in a row, in the order of appearance."""
    return list(dict.fromkeys(name for row in measured(rows) for name in row["ratios"]))


def milliseconds(value: float) -> str:
    """Three significant digits, or whole milliseconds."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(content: dict, mark: str = "") -> list[list[str]]:
    """The table's rows, its heads first: our time, each side's time over it (the best one's between marks), both on the
    device alone where a row has that, the floor, memory.
    """
    rows = content["rows"]
    names = sides(rows)
    replayed = [name for name in names if any("ms" in row.get("device", {}).get(name, {}) for row in measured(rows))]
    alone = ["ms on the device", *(f"{name} there" for name in replayed)] if replayed else []
    table = [["what", "configuration", "ms", *names, *alone, "over the floor", "MB", "of torch.nn.RNN's"]]
    for row in rows:
        head = [TITLES[row["task"]], row["name"]]
        if "not_measured" in row:
            table.append([*head, f"not measured: {row['not_measured']}", *[""] * (len(table[0]) - 3)])
            continue
        best = min(row["ratios"], key=lambda name: row["ratios"][name]["median"], default="")
        marks = {name: mark if name == best else "" for name in row["ratios"]}
        ratios = [f"{marks[name]}{row['ratios'][name]['text']}{marks[name]}" if name in marks else "" for name in names]
        floor = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        memory = f"{row['memory_mb']:.1f}" if "memory_mb" in row else ""
        share = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        table.append([*head, milliseconds(row["ms"]), *ratios, *_on_device(row, replayed), floor, memory, share])
    return table


def _on_device(row: dict, replayed: list[str]) -> list[str]:
    """Our time on the device alone and each side's over it; nothing if no row of the table has them."""
    if not replayed:
        return []
    found = row.get("device", {})
    own: dict[str, Any] = next(iter(found.values()), {})  # ours comes first
    return [
        milliseconds(own["ms"]) if "ms" in own else "",
        *(found.get(name, {}).get("ratio", "") for name in replayed),
    ]


def skipped(rows: list[dict]) -> dict[str, list[str]]:
    """Why sides are missing: the reason, and what it holds for."""
    found: dict[str, list[str]] = {}
    for row in measured(rows):
        for name, reason in row["skipped"].items():
            if not reason.startswith("it has no "):
                found.setdefault(f"{name}: {reason}", []).append(f"{row['task']} {row['name']}")
    return found


def growth(sweeps: list[dict]) -> list[str]:
    """Cost as T, B and H grow: its exponents from point to point, and which of them are above the work's."""
    lines = []
    for axis, points in itertools.groupby(measured(sweeps), key=lambda row: row["sweep"]):
        rows = list(points)
        if len(rows) < 2:
            continue
        sizes, limit = [row[axis] for row in rows], WORK_EXPONENT[axis]
        costs = ", ".join(f"{size}: {milliseconds(row['ms'])} ms" for size, row in zip(sizes, rows, strict=True))
        found = exponents(sizes, [row["ms"] for row in rows])
        line = f"{axis} {costs}; exponents {', '.join(f'{e:.2f}' for e in found)}, of the work {limit}"
        steep = [f"{sizes[i]} to {sizes[i + 1]}" for i, e in enumerate(found) if e > limit + SUPERLINEAR]
        lines.append(line + (f"; FINDING: it grows faster than the work from {' and '.join(steep)}" if steep else ""))
    return lines


def describe(content: dict) -> str:
    """The machine and the measured rates in a line."""
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in content["machine"].items())
    rates = content.get("rates", {})
    found = [f"{dtype} GEMM {rate['gemm_flops'] / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()]
    copies = [rate["copy_bytes"] for rate in rates.values()]
    return "; ".join([facts, *found, *([f"copy {max(copies) / 1e9:.1f} GB/s"] if copies else [])])


def sentence(content: dict) -> str:
    """Which side is fastest here, and by how much."""
    rows = [row for row in measured(content["rows"]) if row["ratios"]]
    if not rows:
        return "Nothing was compared: no other side ran."
    best = [min((r["median"], name) for name, r in row["ratios"].items()) for row in rows]
    won = sum(ratio > 1 for ratio, _ in best)
    ratio, name = min(best)
    worst = rows[best.index((ratio, name))]
    where = f"{TITLES[worst['task']]} {worst['name']}"
    middle = statistics.median(ratio for ratio, _ in best)
    end = f"at the least {ratio:.1f} times" if ratio > 1 else f"but {name} is {1 / ratio:.1f} times as fast as it"
    return (
        f"Fastest here: charrnn_fast in {won} of {len(rows)} rows, at {middle:.1f} times the best other side's speed "
        f"in the median row, {end} ({where})."
    )


def text(content: dict) -> str:
    """The table for a terminal, what was left out, and how cost grows."""
    table = cells(content)
    widths = [max(map(len, column)) for column in zip(*[r for r in table if not r[2].startswith("not")], strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    lines += [f"not run, {reason} ({len(rows)} rows)" for reason, rows in skipped(content["rows"]).items()]
    return "\n".join([*(line.rstrip() for line in lines), *(f"cost with {line}" for line in growth(content["sweeps"]))])


def markdown(content: dict) -> str:
    """The table, how it was made, and how cost grows."""
    head, *rows = cells(content, mark="**")
    lines = [describe(content) + ".", ""]
    if "command" in content:
        lines = [f"Recorded by `{content['command']}` on:", *lines]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    if growing := growth(content.get("sweeps", [])):
        lines += ["", "Forward and backward as one size grows (the others: B=32, T=64, H=128, 28 tokens):", ""]
        lines += [f"- {line}" for line in growing]
    return "\n".join([*lines, "", sentence(content)])


def filled(page: str, folder: Path) -> str:
    """A text with its marked blocks written anew from the JSON files that they name, relative to `folder`."""

    def block(match: re.Match) -> str:
        content = json.loads((folder / match[2]).read_text())
        return f"{match[1]}\n{markdown(content)}\n\n{match[3]}"

    return BLOCK.sub(block, page)


def _readme(path: Path, check: bool) -> int:
    page = path.read_text()
    if not BLOCK.search(page):
        print(f"{path} has no block between '<!-- results: FILE -->' and '<!-- end of results -->'", file=sys.stderr)
        return 1
    new = filled(page, path.parent)
    if not check:
        path.write_text(new)
    elif new != page:
        print(f"{path} is not what its JSON says: python -m charrnn_fast.bench.report --readme {path}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and pictures of recorded runs.")
    parser.add_argument("file", nargs="?", type=Path, help="a recorded run")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the run's pictures there")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the marked blocks of this text")
    parser.add_argument("--check", action="store_true", help="with --readme: fail where a block is out of date")
    options = parser.parse_args(arguments)
    if (options.file is None) == (options.readme is None):
        parser.error("name a recorded run, or a text with --readme")
    if options.readme is not None:
        return _readme(options.readme, options.check)
    content: dict[str, Any] = json.loads(options.file.read_text())
    print(markdown(content))
    if options.plots:
        from charrnn_fast.bench.plots import draw

        for path in draw(content, options.plots):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
