"""What torch's compiler is told of this library: how a subclass of torch.nn.RNN gets into its graphs, and the like.

PyTorch's compiler breaks its graph at every instance of torch.nn.RNN, LSTM and GRU, unless torch._dynamo.config.
allow_rnn is set: their operators would be unrolled, a step at a time. FusedRNN is an operator of its own to the
compiler, and it has to be an instance of torch.nn.RNN to users, whose initialisation goes by type. What was weighed:

- another base class that is torch.nn.RNN to isinstance alone: a metaclass cannot (it is torch.nn.RNN's metaclass that
  isinstance asks), and a `__class__` that says so breaks what sets it or compares it with the type: pickle,
  parametrizations, FSDP2;
- allow_rnn set for good: it then holds for the user's own torch.nn.RNN, LSTM and GRU too, which are unrolled and
  compiled anew for each number of steps;
- allow_rnn set for the moment in which the compiler looks at a FusedRNN: this file. The method that it wraps is
  private; under a PyTorch that lacks it the graph breaks at a FusedRNN, as at a torch.nn.RNN, with the same results.
"""

import functools
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


_waiting: dict[str, list[Callable[[], object]]] = {}  # by the module that is waited for


def after_import(name: str, run: Callable[[], object]) -> None:
    """Call ``run`` as soon as a module of this name has been imported, which is now if it has.

    torch's compiler takes as long to import as torch itself: who compiles nothing does not wait for it.
    """
    if name in sys.modules:
        run()
        return
    if not _waiting:
        sys.meta_path.insert(0, _FINDER)
    _waiting.setdefault(name, []).append(run)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are waited for, and has run what waits once one has been executed: not when it was but
    looked for, nor when its import failed.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _waiting else None
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_run(module: ModuleType) -> None:
            execute(module)
            for run in _waiting.pop(fullname, ()):
                run()
            if not _waiting and self in sys.meta_path:
                sys.meta_path.remove(self)

        # The loader is this spec's alone, so nobody else's import is changed; a type checker sees a method replaced.
        spec.loader.exec_module = execute_and_run  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def constant_to_compilers(function: _Function) -> _Function:
    """As torch.compiler.assume_constant_result, which imports the compiler."""
    after_import("torch._dynamo", lambda: torch._dynamo.assume_constant_result(function))
    return function


def allow_in_graphs(kind: type) -> None:
    """Let the compiler trace into modules of the class ``kind``, a subclass of torch.nn.RNN."""
    after_import("torch._dynamo", functools.partial(_allow_in_graphs, kind))


def _allow_in_graphs(kind: type) -> None:
    try:
        from torch._dynamo import config
        from torch._dynamo.variables.builder import VariableBuilder

        builder: Any = VariableBuilder
        wrap_module, patch = builder.wrap_module, config.patch
    except (ImportError, AttributeError):
        return
    if not hasattr(config, "allow_rnn"):
        return

    @functools.wraps(wrap_module)
    def wrap(self: Any, value: Any) -> Any:
        if not isinstance(value, kind):
            return wrap_module(self, value)
        with patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.wrap_module = wrap


def unknown_size() -> Any:
    """For a registered operator's shapes: a size that only its input's data says, as the number of packed sequences.

    PyTorch takes such a size into its graph where fullgraph or config.capture_dynamic_output_shape_ops asks for it, and
    else breaks the graph at the operator. Both things that are looked at are private; without them it does so here too.
    """
    context = torch.library.get_ctx()
    try:
        from torch._library.fake_impl import allocate_size

        sizes = context._shape_env
    except (ImportError, AttributeError):
        return context.new_dynamic_size()
    return context.new_dynamic_size() if sizes is None else allocate_size(sizes)
