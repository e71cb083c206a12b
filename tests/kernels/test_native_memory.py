"""Every native kernel under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: on small odd sizes, and
with random arguments that need not fit their buffers.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import malformed
import pytest

from charrnn_fast.kernels import native

COMPILER = shutil.which("cc")
HERE = Path(__file__).parent
FLAGS = ["-O1", "-g", "-std=gnu11", "-fno-sanitize-recover"]
# Flags, and what stands in for threads.c: ThreadSanitizer cannot see what OpenMP's runtime does.
KINDS = {
    "memory": (["-fsanitize=address,undefined", "-fopenmp"], None),
    "threads": (["-fsanitize=thread", "-pthread"], HERE / "native_team.c"),
}
pytestmark = pytest.mark.skipif(COMPILER is None or native.available() is not None, reason="needs a C compiler")


@pytest.fixture(scope="module", params=list(KINDS))
def drivers(request, tmp_path_factory) -> dict[str, Path]:
    """native_memory.c and native_fuzz.c, each with the kernels as a program."""
    flags, team = KINDS[request.param]
    folder = tmp_path_factory.mktemp("native")
    headers = Path(native.__file__).parent
    left_out = {"module.c", "launch.c", "tensors.c"} | (set() if team is None else {"threads.c"})  # those need Python
    sources = [path for path in headers.glob("*.c") if path.name not in left_out]
    programs = [HERE / "native_memory.c", HERE / "native_fuzz.c"]
    sources += programs + ([team] if team else [])

    def compile(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        command = [str(COMPILER), *FLAGS, *flags, f"-I{headers}", "-c", str(source), "-o", target]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target

    try:
        with ThreadPoolExecutor(2) as pool:
            objects = dict(zip(sources, pool.map(compile, sources), strict=True))
        mains = [objects.pop(program) for program in programs]
        for program, main in zip(programs, mains, strict=True):
            command = [str(COMPILER), *FLAGS, *flags, main, *objects.values(), "-o", str(folder / program.stem), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "lasan" in error.stderr or "ltsan" in error.stderr:
            pytest.skip(f"this compiler has no sanitizers: {error.stderr.splitlines()[0]}")
        raise
    return {program.stem: folder / program.stem for program in programs}


def _run(command: list[str]) -> str:
    options = {"ASAN_OPTIONS": "allocator_may_return_null=1"}  # no memory is an error of the kernel's own
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _require(isa: int) -> None:
    if native.ISAS[isa] not in native._native.isas():
        pytest.skip(f"this machine has no {native.ISAS[isa]}")


@pytest.mark.parametrize("isa", range(len(native.ISAS)), ids=native.ISAS)
def test_no_bad_access(drivers, isa):
    _require(isa)
    assert _run([str(drivers["native_memory"]), str(isa)]) == "done\n"


@pytest.mark.parametrize("isa", range(len(native.ISAS)), ids=native.ISAS)
@pytest.mark.parametrize("calls", [1500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_arguments_make_a_kernel_leave_its_buffers(drivers, isa, calls):
    _require(isa)
    words = _run([str(drivers["native_fuzz"]), str(isa), str(calls), str(isa)]).split()
    refused, ran = int(words[1]), int(words[3])
    assert refused > calls // 5 and ran > calls // 5, words  # the two halves of the claim were both tried
    malformed.count("calls of the C kernels, refused", refused)
    malformed.count("calls of the C kernels, run", ran)
