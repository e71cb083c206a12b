"""The operations of unusual.py in modes, transforms, regions and process groups, beside torch's own there."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from unusual import (
    GRADIENTS,
    KINDS,
    OPERATIONS,
    B,
    H,
    Operation,
    T,
    TorchLM,
    V,
    gradients_of_a_kind,
    operands_of_a_kind,
    outcome,
    results_and_gradients,
    same_outcome,
    tensors_of,
)

from charrnn_fast import CharRNN, clip_grad_norm_


def _leaves(operation: Operation, values: Sequence[Tensor] | None = None) -> list[Tensor]:
    return [x.clone().requires_grad_(operation.differentiable) for x in values or operation.operands]


def _everything(f: Callable[..., Any]) -> Callable[..., Any]:
    """Results, and where there are gradients these."""
    return lambda *operands: results_and_gradients(f, operands, torch.ones_like)


def in_fake_mode(name: str, kind: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    operation = OPERATIONS[name]()

    def shapes(f):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            operands = [mode.from_tensor(x) for x in _leaves(operation)]
            found = (f if kind == "results" else _everything(f))(*operands)
            return [torch.empty_like(t, device="meta") for t in tensors_of(found)]

    operation.compare(shapes)


def traced_by_make_fx(name: str, mode: str) -> None:
    """The graph, run on other operands, gives their results and not those of the operands that it was traced with."""
    from torch.fx.experimental.proxy_tensor import make_fx

    operation = OPERATIONS[name]()
    others = [torch.randn_like(x) for x in operation.operands]

    def traced(f):
        graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(*_leaves(operation))
        return graph(*_leaves(operation, others))

    operation.compare(traced)
    operation.compare(lambda f: traced(_everything(f)))


def transformed(name: str, transform: str) -> None:
    """Torch's own way through a transform, or what it would be where torch's RNN has none."""
    from torch import func

    operation = OPERATIONS[name]()
    operands = operation.operands
    tangents = tuple(torch.randn_like(x) for x in operands)

    def total(f):
        return lambda *x: sum(t.float().sum() for t in tensors_of(f(*x)))

    def vjp(f):
        result, pull = func.vjp(lambda *x: tuple(tensors_of(f(*x))), *operands)
        return *result, *pull(tuple(torch.ones_like(t) for t in result))

    def jvp(f, jvp=func.jvp):
        results, products = jvp(lambda *x: tuple(tensors_of(f(*x))), operands, tangents)
        return *results, *products

    def dual(f):
        import torch.autograd.forward_ad as forward_ad

        with forward_ad.dual_level():
            results = tensors_of(f(*(forward_ad.make_dual(x, t) for x, t in zip(operands, tangents, strict=True))))
            parts = [forward_ad.unpack_dual(t) for t in results]
            return [*(p.primal for p in parts), *(p.tangent for p in parts if p.tangent is not None)]

    def twice_backward():
        return jvp(operation.theirs, torch.autograd.functional.jvp)

    def gradients(*x):
        leaves = [y.clone().requires_grad_() for y in x]
        return torch.autograd.grad(total(operation.theirs)(*leaves), leaves)

    def pulled():
        leaves = _leaves(operation)
        results = tensors_of(operation.theirs(*leaves))
        return *results, *torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results])

    def each(f):
        results = [tensors_of(f(*x)) for x in (operands, tangents)]
        return [torch.stack(pair) for pair in zip(*results, strict=True)]

    stacked = tuple(torch.stack(pair) for pair in zip(operands, tangents, strict=True))
    arguments = tuple(range(len(operands)))
    runs: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
        "vmap": (lambda f: func.vmap(f)(*stacked), lambda: each(operation.theirs)),
        "grad": (lambda f: func.grad(total(f), arguments)(*operands), lambda: gradients(*operands)),
        "vmap of grad": (
            lambda f: func.vmap(func.grad(total(f), arguments))(*stacked),
            lambda: each(gradients),
        ),
        "vjp": (vjp, pulled),
        "jvp": (jvp, twice_backward),
        "dual": (dual, twice_backward),
        "functionalize": (lambda f: func.functionalize(f)(*operands), lambda: operation.theirs(*operands)),
    }
    run, otherwise = runs[transform]
    if transform in ("grad", "vmap of grad") and not operation.differentiable:
        return
    ours, theirs = (functools.partial(run, f) for f in (operation.ours, operation.theirs))
    if outcome(theirs)[1] is not None and outcome(ours)[1] is None:
        theirs = otherwise
    same_outcome(ours, theirs)


def watched(name: str, mode: str) -> None:
    """Torch's results and, of the operators' floating-point operations, torch's count."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    def counted(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):
        seen, __torch_function__ = 0, counted

    class Operators(TorchDispatchMode):
        seen, __torch_dispatch__ = 0, counted

    operation = OPERATIONS[name]()
    kind = {"functions": Functions, "operators": Operators, "flops": lambda: FlopCounterMode(display=False)}[mode]
    seen = []

    def inside(f):
        operands = _leaves(operation)
        with kind() as entered:
            results = _everything(f)(*operands)
        seen.append(entered.get_total_flops() if mode == "flops" else entered.seen)
        return results

    operation.compare(inside)
    if seen:
        theirs, ours = seen
        assert ours == theirs if mode == "flops" else ours > 0, f"{mode}: torch's {theirs}, here {ours}"


class _Doubled(torch.autograd.graph.saved_tensors_hooks):
    """Everything saved is packed, and comes back as a tensor of its own."""

    def __init__(self):
        super().__init__(lambda x: (x.dtype, x.double()), lambda packed: packed[1].to(packed[0]))


def _deterministic():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return contextlib.nullcontext()


REGIONS: dict[str, Callable[[], Any]] = {
    "memory filled with NaN": _deterministic,
    "saved tensors on the CPU": lambda: torch.autograd.graph.save_on_cpu(),
    "saved tensors packed": _Doubled,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "multithreading off": lambda: torch.autograd.set_multithreading_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "mkldnn off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "default device": lambda: torch.device("meta"),
}


def in_a_region(name: str, name_of_region: str) -> None:
    operation = OPERATIONS[name]()

    def inside(f):
        operands = _leaves(operation)
        plain = name_of_region == "default device" and f is operation.theirs
        with contextlib.nullcontext() if plain else REGIONS[name_of_region]():
            return _everything(f)(*operands)

    tolerance = 0.1 if name_of_region == "autocast" else 1e-4
    # The decoder computes in the weights' type whatever the region, so that its texts do not depend on it.
    numbers = not (operation.own_errors and name_of_region == "autocast")
    operation.compare(inside, name_of_region, tolerance, numbers)


def without_a_graph(name: str, mode: str) -> None:
    operation = OPERATIONS[name]()

    def inside(f):
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            return f(*(x.clone() for x in operation.operands))

    operation.compare(inside)


def checkpointed(name: str, kind: str) -> None:
    from torch.utils.checkpoint import checkpoint

    operation = OPERATIONS[name]()
    if not operation.differentiable:
        return

    def run(f):
        again = functools.partial(checkpoint, f, use_reentrant=kind == "reentrant")
        return _everything(again)(*_leaves(operation))

    operation.compare(run)


# ---- distributed ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _group() -> Iterator[Any]:
    """A mesh of one process; its group is left to the end of the process, as ending it may wait for ever."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    with tempfile.TemporaryDirectory() as folder:
        if not dist.is_initialized():
            meeting = f"file://{os.path.join(folder, 'rendezvous')}"
            dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))


def distributed(name: str, placement: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    operation = OPERATIONS[name]()
    where = [Replicate() if placement == "replicated" else Shard(0)]
    with _group() as mesh:
        count = len(operation.operands)
        for chosen in [tuple(range(count)), *((i,) for i in range(count))]:

            def run(f, chosen=chosen):
                operands = [x.clone() for x in operation.operands]
                for i in chosen:
                    operands[i] = distribute_tensor(operands[i], mesh, where)
                operands = [x.detach().requires_grad_(operation.differentiable) for x in operands]
                return _everything(f)(*operands)

            operation.compare(run, f"operands {chosen}")


def fully_sharded(method: str, parts: Sequence[str]) -> None:
    """fully_shard of a model and of its parts: results, and gradients after backward, as those of torch's modules."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    models = [CharRNN(V, H), TorchLM()]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(V, (B, T))
    with _group() as mesh:
        for model in models:
            for part in parts:
                fully_shard(getattr(model, part), mesh=mesh)
            fully_shard(model, mesh=mesh)

        def run(model):
            def inside():
                if method == "generate_ids":
                    return model.generate_ids(tokens, 5)
                results = model(tokens) if method == "forward" else model.loss(tokens, tokens)
                results[0].sum().backward()
                norm = (clip_grad_norm_ if model is models[0] else nn.utils.clip_grad_norm_)(model.parameters(), 0.1)
                return [*results, norm, *(p.grad for p in model.parameters())]

            return inside

        same_outcome(run(models[0]), run(models[1]))
        same_outcome(run(models[0]), run(models[1]))  # and once more, on what the first run left


SURROUNDINGS: dict[str, tuple[Callable[[str, str], int | None], Sequence[str]]] = {
    "operands": (operands_of_a_kind, tuple(KINDS)),
    "gradients": (gradients_of_a_kind, tuple(GRADIENTS)),
    "fake": (in_fake_mode, ("results", "gradients")),
    "make_fx": (traced_by_make_fx, ("real", "fake")),
    "make_fx of symbols": (traced_by_make_fx, ("symbolic",)),
    "transforms": (transformed, ("vmap", "grad", "vmap of grad", "vjp", "jvp", "dual", "functionalize")),
    "modes": (watched, ("functions", "operators", "flops")),
    "regions": (in_a_region, tuple(REGIONS)),
    "no graph": (without_a_graph, ("no_grad", "inference")),
    "checkpoint": (checkpointed, ("reentrant", "not reentrant")),
    "distributed": (distributed, ("replicated", "sharded")),
}


def every_kind(surroundings: str, name: str) -> int:
    """How often one operation was tried in every kind of these; the last that was printed is the one that failed."""
    function, kinds = SURROUNDINGS[surroundings]
    tried = 0
    for kind in kinds:
        print(kind, flush=True)
        tried += function(name, kind) or 0
    return tried
