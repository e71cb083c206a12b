"""Every call that makes a tensor from nothing says on which device and of which type: neither is left to the defaults
of whoever calls.
"""

import ast
from pathlib import Path

import pytest
import torch

import charrnn_fast
from charrnn_fast import kernels, reference

PLACES = [Path(module.__file__).parent for module in (charrnn_fast, kernels, reference)]
FILES = sorted({path.resolve() for place in PLACES for path in place.rglob("*.py")})
# The *_like and new_* forms take both from the tensor that they are given.
FACTORIES = {
    *("arange", "asarray", "as_tensor", "empty", "empty_permuted", "empty_strided", "eye", "frombuffer", "full"),
    *("linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros", "range", "complex", "polar", "from_numpy"),
    *("blackman_window", "bartlett_window", "hamming_window", "hann_window", "kaiser_window"),
    *("sparse_coo_tensor", "sparse_csr_tensor", "sparse_csc_tensor", "sparse_bsr_tensor", "sparse_bsc_tensor"),
    *("sparse_compressed_tensor", "from_file"),
}
# `torch.complex` and `torch.polar` are given tensors; torch.frombuffer is always on the CPU and takes no device.
GIVEN = {"complex", "polar", "from_numpy"}
ON_THE_CPU = {"frombuffer"}


def faults(source: str) -> list[tuple[int, str]]:
    """(line, what is left out) of each call of a factory that does not name its device and its type."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [(node.lineno, f"{a.name} imported by itself") for a in node.names if a.name in FACTORIES]
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
            continue
        name = ast.unparse(node.func).removeprefix("torch.")
        if name not in FACTORIES - GIVEN:
            continue
        given = {keyword.arg for keyword in node.keywords}
        if {"out"} & given or None in given:  # **options may say both; out= says both
            continue
        wanted = {"dtype"} if name in ON_THE_CPU else {"dtype", "device"}
        found += [(node.lineno, f"torch.{name} without {left_out}=") for left_out in sorted(wanted - given)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_factories_name_device_and_type(path):
    assert faults(path.read_text()) == []


def test_the_check_sees_what_it_looks_for():
    assert faults("import torch\nx = torch.zeros(3, dtype=torch.float32)") == [(2, "torch.zeros without device=")]
    assert faults("torch.randn(3, device=d)") == [(1, "torch.randn without dtype=")]
    assert faults("torch.empty(3, device=d, dtype=t); x.new_empty(3); torch.empty_like(x)") == []
    assert faults("from torch import zeros") == [(1, "zeros imported by itself")]
    assert len(FILES) > 40


def test_the_list_of_factories_is_torchs():
    """What has a device= in its signature is in the list, or takes it from a tensor, or makes none."""
    others = {"get_default_device", "set_default_device", "get_device_module", "manual_seed", "seed"}
    functions = {name: f for name, f in vars(torch).items() if callable(f) and not isinstance(f, type)}
    functions |= {name: getattr(torch, name) for name in dir(torch._C._VariableFunctions) if hasattr(torch, name)}
    named = {name for name, f in functions.items() if "device" in str(f.__doc__).partition("\n\n")[0]}
    assert len(named) > 20
    assert {name for name in named - others if name[0] != "_" and not name.endswith("_like")} <= FACTORIES
