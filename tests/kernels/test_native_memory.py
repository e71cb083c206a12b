"""Every native kernel under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: with random arguments of
small odd sizes, and with ones that need not fit their buffers.
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
def fuzz(request, tmp_path_factory) -> str:
    """native_fuzz.c with the kernels as a program."""
    flags, team = KINDS[request.param]
    folder = tmp_path_factory.mktemp("native")
    headers = Path(native.__file__).parent
    left_out = {"module.c", "launch.c", "tensors.c"} | (set() if team is None else {"threads.c"})  # those need Python
    sources = [path for path in headers.glob("*.c") if path.name not in left_out]
    sources += [HERE / "native_fuzz.c"] + ([team] if team else [])

    def compile(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        command = [str(COMPILER), *FLAGS, *flags, f"-I{headers}", "-c", str(source), "-o", target]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target

    program = str(folder / "native_fuzz")
    try:
        with ThreadPoolExecutor(2) as pool:
            objects = pool.map(compile, sources)
            command = [str(COMPILER), *FLAGS, *flags, *objects, "-o", program, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "lasan" in error.stderr or "ltsan" in error.stderr:
            pytest.skip(f"this compiler has no sanitizers: {error.stderr.splitlines()[0]}")
        raise
    return program


def _run(fuzz: str, isa: str, calls: int, all_right: bool = False) -> tuple[int, int, int]:
    """How many calls were refused, ran, and failed of those."""
    options = {"ASAN_OPTIONS": "allocator_may_return_null=1"}  # no memory is an error of the kernel's own
    number = native.ISAS.index(isa)
    command = [fuzz, *(str(int(argument)) for argument in (number, calls, number, all_right))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | options)
    assert done.returncode == 0, done.stdout + done.stderr
    refused, ran, failed = (int(word) for word in done.stdout.split()[1::2])
    return refused, ran, failed


def test_no_bad_access(fuzz, isa):
    assert _run(fuzz, isa, 500, all_right=True) == (0, 500, 0)


@pytest.mark.parametrize("calls", [1500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_arguments_make_a_kernel_leave_its_buffers(fuzz, isa, calls):
    refused, ran, _ = _run(fuzz, isa, calls)
    assert refused > calls // 5 and ran > calls // 5, (refused, ran)  # the two halves of the claim were both tried
    malformed.count("calls of the C kernels, refused", refused)
    malformed.count("calls of the C kernels, run", ran)
