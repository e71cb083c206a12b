"""Every native kernel on small odd sizes under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from charrnn_fast.kernels import native

FLAGS = ["-O1", "-g", "-std=gnu11", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None or native.available() is not None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """native_memory.c and the kernels as a program."""
    folder = tmp_path_factory.mktemp("native")
    headers = Path(native.__file__).parent
    sources = [path for path in headers.glob("*.c") if path.name != "module.c"]
    sources.append(Path(__file__).with_name("native_memory.c"))

    def compile(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        command = [str(COMPILER), *FLAGS, f"-I{headers}", "-c", str(source), "-o", target]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target

    try:
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile, sources))
        command = [str(COMPILER), *FLAGS, *objects, "-o", str(folder / "driver"), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "lasan" in error.stderr:
            pytest.skip(f"this compiler has no sanitizers: {error.stderr.splitlines()[0]}")
        raise
    return folder / "driver"


@pytest.mark.parametrize("isa", range(len(native.ISAS)), ids=native.ISAS)
def test_no_bad_access(driver, isa):
    if native.ISAS[isa] not in native._native.isas():
        pytest.skip(f"this machine has no {native.ISAS[isa]}")
    done = subprocess.run([str(driver), str(isa)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr
