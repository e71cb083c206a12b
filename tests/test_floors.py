"""A file imports only from floors below its own: kernels, reference -> ops -> rnn -> lm -> bench -> cli."""

import ast
from pathlib import Path

import charrnn_fast
from charrnn_fast import bench, kernels, reference

FLOORS = [("errors",), ("kernels", "reference"), ("ops",), ("rnn",), ("lm",), ("bench",), ("cli",), ("__main__",)]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FOLDERS = {
    "charrnn_fast": Path(charrnn_fast.__file__).parent,
    "charrnn_fast.kernels": Path(kernels.__file__).parent,
    "charrnn_fast.reference": Path(reference.__file__).parent,
    "charrnn_fast.bench": Path(bench.__file__).parent,
}


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts)] = path
    return found


def _imports(name: str, path: Path) -> set[str]:
    """Absolute names of everything that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def _part(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "charrnn_fast" and len(parts) > 1 else None


def test_every_part_has_a_floor():
    parts = {_part(name) for name in _modules()} - {"__init__"}
    assert parts <= FLOOR_OF.keys() and {"kernels", "reference", "ops", "rnn", "lm", "bench", "cli"} <= parts


def test_imports_go_down():
    wrong = []
    for name, path in _modules().items():
        here = _part(name)
        if here == "__init__":
            continue
        for imported in _imports(name, path):
            there = _part(imported)
            if there in FLOOR_OF and there != here and FLOOR_OF[there] >= FLOOR_OF[here]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_reference_imports_torch_alone():
    allowed = {"torch", "dataclasses", "collections"}
    for name, path in _modules().items():
        if _part(name) == "reference":
            outside = {i.split(".")[0] for i in _imports(name, path)} - allowed
            assert outside <= {"charrnn_fast"}, (name, outside)
            assert all(_part(i) in (None, "reference") for i in _imports(name, path)), name
