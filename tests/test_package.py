"""What a wheel contains, and that the type checks read all of it."""

import ast
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The Python part of a wheel, as setup.py puts it together."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    """The package as .ci/types puts it together, of links into the checkout."""
    loader = importlib.machinery.SourceFileLoader("types_script", str(ROOT / ".ci" / "types"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    script.PLACE = tmp_path_factory.mktemp("checked")
    script.assemble(script.mapping())
    return script.PLACE


def _modules(folder: Path) -> dict[str, Path]:
    """The files of the package in a folder, by their names as modules."""
    found = {}
    for place, _, names in os.walk(folder / "charrnn_fast", followlinks=True):
        for path in (Path(place, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(name: str, path: Path) -> set[str]:
    """What a module imports of the package, wherever in it: modules, and names in them."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return {n for n in found if n.startswith("charrnn_fast")}


def test_a_wheel_has_the_type_marker(wheel):
    assert (wheel / "charrnn_fast" / "py.typed").exists()


def test_a_wheel_has_what_its_modules_import(wheel, checked):
    modules, all_there_are = _modules(wheel), set(_modules(checked))
    for name, path in modules.items():
        missing = (_imports(name, path) & all_there_are) - set(modules)
        assert not missing, f"{name} imports {missing}"


def test_of_bench_a_wheel_has_only_what_the_command_line_needs(wheel):
    """No program that runs from a checkout alone: the gate, the static figures, the recipes, the pytest suites."""
    modules = _modules(wheel)
    needed, left = {"charrnn_fast.bench"}, [n for n in modules if not n.startswith("charrnn_fast.bench")]
    while left:
        name = left.pop()
        new = {n for n in _imports(name, modules[name]) if n in modules and n.startswith("charrnn_fast.bench")} - needed
        needed |= new
        left += new
    shipped = {n for n in modules if n.startswith("charrnn_fast.bench")}
    assert shipped == needed
    assert "charrnn_fast.bench.suite" in shipped and "charrnn_fast.bench.gate" not in shipped


def test_types_are_checked_of_all_that_a_wheel_contains(wheel, checked):
    found = set(_modules(checked))
    assert set(_modules(wheel)) <= found
    assert {"charrnn_fast.bench.gate", "charrnn_fast.kernels.triton.elman_kernels"} <= found
