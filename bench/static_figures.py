"""What a compiled kernel's code says: registers and spills, and of its longest loop instructions and wavefronts."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

from . import wavefronts


def of_compiled(compiled: Any, arguments: Mapping[int, int] | None = None) -> dict:
    """Figures of what triton.compile returns, from Triton's own language or from Gluon.

    arguments: integer arguments by position, for wavefronts.count.
    """
    if "cubin" in compiled.asm:
        found = nvidia_figures(compiled.asm["cubin"], compiled.metadata.shared)
        return found | shared_figures(compiled.asm["ptx"], arguments)
    return amd_figures(compiled.asm["amdgcn"], compiled.metadata.shared)


def longest_loop(lines: list[tuple[str, str]], branch_target) -> list[str]:
    """Instructions of the longest loop. lines: ("label", name) or ("instruction", text)."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for what, text in lines:
        if what == "label":
            labels[text] = len(code)
        else:
            code.append(text)
    best = (0, 0)
    for end, text in enumerate(code, 1):
        begin = labels.get(branch_target(text), end)
        if end - begin > best[1] - best[0]:
            best = (begin, end)
    return code[best[0] : best[1]]


def _count(code: list[str], pattern: str) -> int:
    return sum(re.search(pattern, text) is not None for text in code)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text}")
    return int(found[1])


def nvidia_figures(cubin: bytes, shared: int) -> dict:
    """From a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command):
            return subprocess.run([*map(str, command), file.name], capture_output=True, text=True, check=True).stdout

        usage = tool(tools / "cuobjdump", "--dump-resource-usage")
        sass = tool(tools / "nvdisasm", "-c")
    lines = []
    for line in sass.splitlines():
        if match := re.match(r"\s*(\.L\w+):", line):
            lines.append(("label", match[1]))
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(("instruction", match[1]))

    def branch_target(text):
        match = re.search(r"\bBRA\b.*?(\.L\w+)", text)
        return match and match[1]

    loop = longest_loop(lines, branch_target)
    matrix = r"\b(HGMMA|HMMA|DMMA|UTC\w*MMA)\b"
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "shared": shared,
        "matrix": sorted({found for text in loop for found in re.findall(matrix, text)}),
        "instructions": len(loop),
        "barriers": _count(loop, r"\bBAR\.SYNC"),
        "shared_loads": _count(loop, r"\bLDS"),
        "shared_stores": _count(loop, r"\bSTS"),
        "matrix_instructions": _count(loop, matrix),
        "fma": _count(loop, r"\b[FD]FMA"),
    }


def shared_figures(ptx: str, arguments: Mapping[int, int] | None = None) -> dict[str, int]:
    """From PTX, of a whole program and, where there is a loop, of a turn of the longest.

    wavefronts, and conflicts: how many of them the least possible would not need; the same outside of the loop;
    unknown_accesses: instructions whose wavefronts are unknown.
    """
    found = wavefronts.count(ptx, arguments)
    return {
        "wavefronts": found.loop.wavefronts,
        "conflicts": found.loop.wavefronts - found.loop.least,
        "wavefronts_once": found.once.wavefronts,
        "conflicts_once": found.once.wavefronts - found.once.least,
        "unknown_accesses": len(found.unknown),
    }


def amd_figures(assembly: str, shared: int) -> dict:
    """From an assembly listing. Bank conflicts are not counted there."""

    def value(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    lines = []
    for line in assembly.splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            lines.append(("label", match[1]))
        elif match := re.match(r"\s+((?:[svd]|ds|global|buffer|flat|scratch)_.*)", line):
            lines.append(("instruction", match[1].split(";")[0]))

    def branch_target(text):
        match = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", text)
        return match and match[1]

    loop = longest_loop(lines, branch_target)
    return {
        "registers": value("vgpr_count"),
        "stack": value("private_segment_fixed_size"),
        "shared": shared,
        "matrix": ["MFMA"] if _count(loop, r"\bv_mfma") else [],
        "instructions": len(loop),
        "barriers": _count(loop, r"\bs_barrier"),
        "shared_loads": _count(loop, r"\bds_(read|load)"),
        "shared_stores": _count(loop, r"\bds_(write|store)"),
        "matrix_instructions": _count(loop, r"\bv_mfma"),
        "fma": _count(loop, r"\bv_(pk_)?fma"),
    }
