"""What a wheel contains, and that the type checks read all of it."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from package_files import imports_of, modules_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The Python part of a wheel, as setup.py puts it together."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "charrnn_fast"


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    """The package as .ci/types puts it together, of links into the checkout."""
    loader = importlib.machinery.SourceFileLoader("types_script", str(ROOT / ".ci" / "types"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    script.PLACE = tmp_path_factory.mktemp("checked")
    script.assemble(script.mapping())
    return script.PLACE / "charrnn_fast"


def test_a_wheel_has_the_type_marker(wheel):
    assert (wheel / "py.typed").exists()


def test_a_wheel_has_what_its_modules_import(wheel, checked):
    modules, all_there_are = modules_of(wheel, "charrnn_fast"), set(modules_of(checked, "charrnn_fast"))
    for name, path in modules.items():
        missing = (imports_of(name, path) & all_there_are) - set(modules)
        assert not missing, f"{name} imports {missing}"


def test_of_bench_a_wheel_has_only_what_the_command_line_needs(wheel):
    """No program that runs from a checkout alone: the gate, the static figures, the recipes, the pytest suites."""
    modules = modules_of(wheel, "charrnn_fast")
    needed, left = {"charrnn_fast.bench"}, [n for n in modules if not n.startswith("charrnn_fast.bench")]
    while left:
        name = left.pop()
        new = {
            n for n in imports_of(name, modules[name]) if n in modules and n.startswith("charrnn_fast.bench")
        } - needed
        needed |= new
        left += new
    shipped = {n for n in modules if n.startswith("charrnn_fast.bench")}
    assert shipped == needed
    assert "charrnn_fast.bench.suite" in shipped and "charrnn_fast.bench.gate" not in shipped


def test_types_are_checked_of_all_that_a_wheel_contains(wheel, checked):
    found = set(modules_of(checked, "charrnn_fast"))
    assert set(modules_of(wheel, "charrnn_fast")) <= found
    assert {"charrnn_fast.bench.gate", "charrnn_fast.kernels.triton.elman_kernels"} <= found
