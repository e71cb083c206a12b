"""README's speed table from a recorded run: python bench/report.py bench/results/cpu.json"""

import json
import sys
from pathlib import Path

TASKS = {
    "forward": "forward",
    "forward_backward": "forward and backward",
    "lm_step": "training step",
    "generation": "1,000 characters",
}


def table(content: dict) -> str:
    """One row a measurement: our time, the ratio to torch.nn.RNN's, the best peer's, and the time over the floor."""
    lines = [
        "| what | configuration | ms | times torch.nn.RNN's speed | times the best peer's | over the floor | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        ratios = row["ratios"]
        own = next(ratio for name, ratio in ratios.items() if "torch.nn.RNN" in name)
        best = min(ratios, key=lambda name: ratios[name]["median"])
        floor = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        lines.append(
            f"| {TASKS[row['task']]} | {row['name']} | {row['ms']:.2f} | {own['text']} | "
            f"{ratios[best]['text']} {best} | {floor} | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    recorded = json.loads(Path(sys.argv[1]).read_text())
    print(", ".join(f"{key} {value}" for key, value in recorded["machine"].items()))
    print(table(recorded))
