"""What the operations' backward passes share: gradients by recomputation, and gradients kept until asked for."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .context import addressable

T = TypeVar("T")

_OF_A_LAYER = re.compile("which is output 0 of [^,]*elman_?layer", re.IGNORECASE)


def must_recompute(*tensors: Tensor | None) -> bool:
    """Must a backward pass be torch's operators: may a second derivative follow, or is a tensor not plain memory?"""
    return torch.is_grad_enabled() or not addressable(*tensors)


def read_by_compiler() -> bool:
    """Is a backward pass being read by torch's compiled autograd?

    It reads a Function's backward as a compiler reads code: nothing there may take an address or look at a number, and
    a pass through autograd within it finds no graph. Registered operators and torch's take a kernel's place.
    """
    return torch.compiler.is_compiling()


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What forward saved of an Elman layer; if its output was changed in place since, an error that says so."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" in str(error) and _OF_A_LAYER.search(str(error)):
            raise RuntimeError(
                "the output of an Elman RNN was changed in place before its backward pass, which computes gradients "
                "from its values: change a copy instead (output.clone(), or the operation that is not in place). "
                f"PyTorch says: {error}"
            ) from None
        raise


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` where no transform of torch.func is active and every tensor is plain: the same in fewer
    Python calls, without the signature of forward and without a look for wrappers that outlived their transform.
    """
    parent: Any = super(torch.autograd.Function, function)
    return parent.apply


@contextlib.contextmanager
def below_autograd_recording() -> Iterator[None]:
    """Record a graph inside the body of a registered operator, where torch leaves autograd's dispatch keys out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradFunctionality", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def recomputed(
    run: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the operands that need one, by running the operation again by what autograd can differentiate.

    It takes whatever torch does for grad_outputs (batched, distributed, sparse, subclasses, ...), and where gradients
    are enabled the result can be differentiated again.

    Args:
        run: the operation by torch's operators; takes the operands, returns the results that grad_outputs belong to.
        grad_outputs: None for a result that nothing depends on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that a tensor passed twice (one weight in both directions, say) gets each place's own gradient.
        inputs = [None if x is None else x.view_as(x) for x in operands]
        results = run(*inputs)
    given = [(y, grad) for y, grad in zip(results, grad_outputs, strict=True) if grad is not None and y.requires_grad]
    wanted = [x for x, needs in zip(inputs, needs_grad, strict=True) if needs and x is not None]
    if not given or not wanted:
        return [None] * len(inputs)
    outputs, grads = [y for y, _ in given], [grad for _, grad in given]
    found: Any = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if needs and x is not None else None for needs, x in zip(needs_grad, inputs, strict=True)]


def unshared(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that are there, contiguous and each with memory of its own, as an operator's results must be and gradients
    that are slices of one tensor are not.
    """
    results: list[Tensor] = []
    memory: set[int] = set()
    for grad in grads:
        if grad is not None:
            shared = grad.untyped_storage().data_ptr() in memory
            results.append(grad.clone(memory_format=torch.contiguous_format) if shared else grad.contiguous())
            memory.add(results[-1].untyped_storage().data_ptr())
    return results


class HandedOutOnce(Generic[T]):
    """Something that whoever asks first gets for good: nothing keeps it, so its new owner may change it."""

    def __init__(self, value: T):
        self._held = [value]

    def take(self) -> T | None:
        """The value; None if it is gone."""
        try:
            return self._held.pop()  # at once, so that of two threads one gets it
        except IndexError:
            return None
