"""The GPU gate: everything that has to be seen on hardware, in one command and within nine minutes.

    python bench/gate.py --out DIR [--stage NAME] [--seconds S]

It installs this checkout (without a package index), then runs its stages in the order of their value, each in a
process of its own and within its share of the time. DIR/gate.json is written anew after each stage and DIR/gate.log
as it goes, so a run that is cut short leaves what it had. Without a CUDA device the same code runs at tiny sizes, the
Triton kernels in the interpreter: nothing of it meets a GPU untested. This file needs Python alone.

Exit code: 0 if every stage came to its end and found nothing wrong, 1 otherwise.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_SECONDS = 510.0  # of nine minutes; the rest is for installing and for ending
INSTALL_SECONDS = 180.0
GRACE = 0.1  # of a stage's time, between the end that it is told and the one at which it is killed
LIFTED = ("machine", "rates", "rows", "sweeps")  # what a recorded run holds, and a stage may bring


@dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the time; what a stage leaves over goes to those after it
    what: str
    compiles: bool = False  # also without a CUDA device, where the others interpret


STAGES = (
    Stage("environment", 0.05, "machine, versions, rates, and which path every size takes"),
    Stage("tests", 0.20, "pytest -m gpu"),
    Stage("parity", 0.10, "errors against fp64 at large sizes, beside torch.nn.RNN's"),
    Stage("grid", 0.24, "the grid against torch.nn.RNN: named sizes, sweeps, H x B x T x dtype"),
    Stage("language_model", 0.12, "training steps, the scratch recipe, clip, generation"),
    Stage("kernels", 0.05, "our kernels beside cuDNN's own, by the profiler"),
    Stage("registers", 0.07, "registers and spills of the compiled kernels against bench/results/static.json", True),
    Stage("chip", 0.12, "across the chip: the decoder, the recurrence's tiles and torch.nn.RNN, timed"),
    Stage("tiles", 0.05, "neighbours of the shipped tiles, timed"),
)


def save(content: dict[str, Any], path: Path) -> None:
    """Whoever reads the file meanwhile finds what was there before, or all of this."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


class Gate:
    """One run: its log, its JSON and its clock."""

    def __init__(self, out: Path, seconds: float, command: list[str]):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / "gate.json", (out / "gate.log").open("w", buffering=1)
        self.content: dict[str, Any] = {"command": " ".join(command), "rows": [], "sweeps": [], "stages": {}}
        self.until = time.monotonic() + seconds
        self.gpu = self.has_gpu()

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.log.write(line + "\n")

    def save(self) -> None:
        save(self.content, self.path)

    def has_gpu(self) -> bool:
        probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        return subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0

    def install(self) -> bool:
        """Make `charrnn_fast` this checkout. What is so already is left alone."""
        probe = "import charrnn_fast.bench as b, pathlib; print(pathlib.Path(b.__file__).resolve().parent)"
        found = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
        if found.stdout.strip() == str(ROOT / "bench"):
            return True
        pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        code, seconds = run([sys.executable, *pip], INSTALL_SECONDS, self.log)
        self.content["installed"] = {"exit": code, "seconds": round(seconds, 1)}
        self.say(f"install: exit code {code}, {seconds:.0f} s")
        return code == 0

    def run_stage(self, stage: Stage, seconds: float) -> None:
        """Run a stage and take over what it wrote, whether or not it came to its end."""
        self.say(f"== {stage.name}: {stage.what} (at most {seconds:.0f} s)")
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            worker = [sys.executable, "-m", "charrnn_fast.bench.gate_stages", stage.name, str(result)]
            environment = dict(os.environ)
            # Read when Triton is imported, which is before a stage could set it.
            environment["TRITON_INTERPRET"] = "0" if self.gpu or stage.compiles else "1"
            code, taken = run([*worker, f"{seconds * (1 - GRACE):.1f}"], seconds, self.log, environment)
            found = json.loads(result.read_text()) if result.exists() else {}
        for key in LIFTED:
            if key in ("rows", "sweeps"):
                self.content[key] += found.pop(key, [])
            elif key in found:
                self.content.setdefault(key, {}).update(found.pop(key))
        status = {0: "done", None: "out of time"}.get(code, f"exit code {code}")
        findings = found.setdefault("findings", [])
        self.content["stages"][stage.name] = {"status": status, "seconds": round(taken, 1), **found}
        self.say(f"   {status} after {taken:.0f} s, {len(findings)} findings")
        for finding in findings:
            self.say(f"   FINDING {finding}")
        self.save()

    def run(self, stages: list[Stage]) -> int:
        for index, stage in enumerate(stages):
            left = self.until - time.monotonic()
            seconds = left * stage.share / sum(later.share for later in stages[index:])
            if seconds < 1:
                self.content["stages"][stage.name] = {"status": "not run: no time was left", "findings": []}
                self.say(f"== {stage.name}: not run, no time was left")
            else:
                self.run_stage(stage, seconds)
        self.save()
        results = self.content["stages"].values()
        return 0 if all(found["status"] == "done" and not found["findings"] for found in results) else 1


def run(
    command: list[str], seconds: float, log: TextIO, environment: dict[str, str] | None = None
) -> tuple[int | None, float]:
    """Run a command with its output in the log; its exit code, None where it was killed for its time, and seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
            process.wait()
    return code, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests, parity and speed on a GPU, within a bound of time.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for gate.json and gate.log")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", choices=names, metavar="NAME", help=f"this stage only: {', '.join(names)}")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, help=f"of all stages (default {DEFAULT_SECONDS:.0f})"
    )
    options = parser.parse_args()
    gate = Gate(options.out, options.seconds, ["python bench/gate.py", *sys.argv[1:]])
    if not gate.install():
        gate.save()
        gate.say("charrnn_fast could not be installed; the log says why")
        return 1
    gate.until = time.monotonic() + options.seconds
    code = gate.run([stage for stage in STAGES if options.stage in (None, stage.name)])
    gate.say(f"{gate.path}: " + ", ".join(f"{name} {s['status']}" for name, s in gate.content["stages"].items()))
    return code


if __name__ == "__main__":
    sys.exit(main())
