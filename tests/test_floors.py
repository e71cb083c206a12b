"""A file imports only from floors below its own: kernels, reference -> ops -> rnn -> lm -> bench -> cli."""

from pathlib import Path

from package_files import imports_of, modules_of

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


MODULES = {name: path for package, folder in FOLDERS.items() for name, path in modules_of(folder, package).items()}


def _part(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "charrnn_fast" and len(parts) > 1 else None


def test_every_part_has_a_floor():
    parts = {_part(name) for name in MODULES} - {None}
    assert parts <= FLOOR_OF.keys() and {"kernels", "reference", "ops", "rnn", "lm", "bench", "cli"} <= parts


def test_imports_go_down():
    wrong = []
    for name, path in MODULES.items():
        here = _part(name)
        for imported in imports_of(name, path) if here is not None else ():
            there = _part(imported)
            if there in FLOOR_OF and there != here and FLOOR_OF[there] >= FLOOR_OF[here]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_reference_imports_torch_alone():
    allowed = {"torch", "dataclasses", "collections"}
    for name, path in MODULES.items():
        if _part(name) == "reference":
            outside = {i.split(".")[0] for i in imports_of(name, path)} - allowed
            assert outside <= {"charrnn_fast"}, (name, outside)
            assert all(_part(i) in (None, "reference") for i in imports_of(name, path)), name
