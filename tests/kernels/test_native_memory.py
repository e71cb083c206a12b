"""Every native kernel on small odd sizes under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
def driver(request, tmp_path_factory) -> Path:
    """native_memory.c and the kernels as a program."""
    flags, team = KINDS[request.param]
    folder = tmp_path_factory.mktemp("native")
    headers = Path(native.__file__).parent
    left_out = {"module.c"} if team is None else {"module.c", "threads.c"}
    sources = [path for path in headers.glob("*.c") if path.name not in left_out]
    sources += [HERE / "native_memory.c"] + ([team] if team else [])

    def compile(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        command = [str(COMPILER), *FLAGS, *flags, f"-I{headers}", "-c", str(source), "-o", target]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target

    try:
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile, sources))
        command = [str(COMPILER), *FLAGS, *flags, *objects, "-o", str(folder / "driver"), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "lasan" in error.stderr or "ltsan" in error.stderr:
            pytest.skip(f"this compiler has no sanitizers: {error.stderr.splitlines()[0]}")
        raise
    return folder / "driver"


@pytest.mark.parametrize("isa", range(len(native.ISAS)), ids=native.ISAS)
def test_no_bad_access(driver, isa):
    if native.ISAS[isa] not in native._native.isas():
        pytest.skip(f"this machine has no {native.ISAS[isa]}")
    done = subprocess.run([str(driver), str(isa)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr
