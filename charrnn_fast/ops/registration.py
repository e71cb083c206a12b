"""A differentiable operation as two operators of torch, for compilers, exporters and modes; from one list of arguments.

The arguments of an operator are the fields of a dataclass, an `Operation`; its methods are what the operator does. From
them `register` makes the operator and that of its gradients: schemas, shapes, autograd's formula and the
floating-point operations that torch.utils.flop_counter counts in graphs that hold them.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import GenericAlias
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .autograd import must_recompute, recomputed, saved_tensors, unshared
from .compiling import after_import
from .context import registered_operators_only


class Operation(ABC):
    """The arguments of an operator, as the fields of a dataclass, and what is done with them.

    Operands are the tensors that can have gradients, in order; ``needs_grad`` says of each whether its is wanted.
    """

    OPERANDS: ClassVar[tuple[str, ...]]  # the fields that are operands, tensors or None, or lists of tensors
    RESULTS: ClassVar[tuple[str, ...]]  # what forward returns
    UPSTREAM: ClassVar[int]  # gradients are given for so many results, the first ones
    KEPT: ClassVar[tuple[str, ...]]  # the results that backward reads

    @abstractmethod
    def forward(self) -> tuple[Tensor, ...]:
        """The results, by kernels."""

    @abstractmethod
    def shapes(self) -> tuple[Tensor, ...]:
        """Empty tensors like the results."""

    @abstractmethod
    def flops(self) -> int:
        """What torch's own operators would be counted with for the results."""

    @abstractmethod
    def backward(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of the operands, by kernels; None where none is wanted."""

    @abstractmethod
    def backward_flops(self, needs_grad: Sequence[bool]) -> int:
        """As flops, for the gradients that are wanted."""

    @abstractmethod
    def by_tensor_operations(self, *operands: Any) -> tuple[Tensor, ...]:
        """The results that gradients are given for, by what autograd can differentiate, with these operands."""

    def operands(self) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for name in self.OPERANDS:
            value = getattr(self, name)
            found += value if isinstance(value, list) else [value]
        return found

    def recomputed(self, grads: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        """As backward, by tensor operations: for second derivatives and unusual gradients."""
        return recomputed(self.by_tensor_operations, self.operands(), needs_grad, grads)


Gradients = Callable[
    [Sequence[Tensor | None], Sequence[Tensor], Sequence[Any], Sequence[bool]], list[Tensor | None]
]  # of the gradients given, what forward kept, the operator's arguments and needs_grad


def register(name: str, kind: Any) -> tuple[Any, Gradients]:
    """The operator charrnn_fast::``name`` of the Operation ``kind``, and its gradients by the operator name_backward.

    The latter's arguments are the gradients given, what forward kept, forward's arguments and needs_grad; it returns
    those that are wanted.
    """
    places = [kind.RESULTS.index(result) for result in kind.KEPT]
    own = list(inspect.signature(kind).parameters.values())
    num_kept, num_upstream = len(places), kind.UPSTREAM

    def forward(*arguments: Any) -> Any:
        return kind(*arguments).forward()

    def split(arguments: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any], Sequence[bool]]:
        """Of the backward operator's arguments: the operation, gradients given, what was kept, needs_grad."""
        grads, rest = arguments[:num_upstream], arguments[num_upstream:-1]
        return kind(*rest[num_kept:]), grads, rest[:num_kept], arguments[-1]

    def backward(*arguments: Any) -> Any:
        operation, grads, kept, needs_grad = split(arguments)
        found = zip(operation.operands(), operation.backward(grads, kept, needs_grad), needs_grad, strict=True)
        return unshared([torch.zeros_like(x) if g is None else g for x, g, needs in found if needs and x is not None])

    def backward_shapes(*arguments: Any) -> list[Tensor]:
        operation, _, _, needs_grad = split(arguments)
        pairs = zip(operation.operands(), needs_grad, strict=True)
        return [x.new_empty(x.shape) for x, needs in pairs if needs and x is not None]

    upstream = [_parameter(f"grad_{result}", Tensor | None) for result in kind.RESULTS[:num_upstream]]
    kept = [_parameter(result, Tensor) for result in kind.KEPT]
    of_backward = [*upstream, *kept, *own, _parameter("needs_grad", list[bool])]
    operator = _operator(name, forward, own, GenericAlias(tuple, (Tensor,) * len(kind.RESULTS)))
    backward_operator = _operator(f"{name}_backward", backward, of_backward, list[Tensor])
    operator.register_fake(lambda *arguments: kind(*arguments).shapes())
    backward_operator.register_fake(backward_shapes)

    def gradients(
        grads: Sequence[Tensor | None], kept: Sequence[Tensor], arguments: Sequence[Any], needs_grad: Sequence[bool]
    ) -> list[Tensor | None]:
        found = backward_operator(*grads, *kept, *arguments, list(needs_grad))
        places = [sum(needs_grad[:i]) for i in range(len(needs_grad))]
        return [found[place] if needs else None for place, needs in zip(places, needs_grad, strict=True)]

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        leaves, ctx.structure = tree_flatten(inputs)
        ctx.are_tensors = [isinstance(x, Tensor) for x in leaves]
        ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(*(output[place] for place in places), *(x for x in leaves if isinstance(x, Tensor)))
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = saved_tensors(ctx)
        tensors = iter(saved[num_kept:])
        leaves = [next(tensors) if is_tensor else x for is_tensor, x in zip(ctx.are_tensors, ctx.others, strict=True)]
        arguments, given = tree_unflatten(leaves, ctx.structure), grads[:num_upstream]
        needs_grad: list[bool] = []
        for parameter, needs in zip(own, ctx.needs_input_grad, strict=True):
            if parameter.name in kind.OPERANDS:
                needs_grad += needs if parameter.annotation == list[Tensor] else [needs]
        if all(grad is None for grad in given):
            found: list[Tensor | None] = [None] * len(needs_grad)
        elif registered_operators_only() or not must_recompute(*given, *saved):
            found = gradients(given, saved[:num_kept], arguments, needs_grad)
        else:
            found = kind(*arguments).recomputed(given, needs_grad)
        rest, results = iter(found), []
        for parameter, argument in zip(own, arguments, strict=True):
            each = argument if parameter.annotation == list[Tensor] else [argument]
            grads_of = [next(rest) if parameter.name in kind.OPERANDS else None for _ in each]
            results.append(grads_of if parameter.annotation == list[Tensor] else grads_of[0])
        return tuple(results)

    operator.register_autograd(formula, setup_context=set_up)

    def register_flops() -> None:
        from torch.utils.flop_counter import register_flop_formula

        packets = torch.ops.charrnn_fast
        register_flop_formula(getattr(packets, name), get_raw=True)(
            lambda *arguments, out_val=None, **_: kind(*arguments).flops()
        )
        register_flop_formula(getattr(packets, f"{name}_backward"), get_raw=True)(
            lambda *arguments, out_val=None, **_: kind(*arguments[num_upstream + num_kept : -1]).backward_flops(
                arguments[-1]
            )
        )

    after_import("torch.utils.flop_counter", register_flops)
    return operator, gradients


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _operator(name: str, body: Any, parameters: Sequence[inspect.Parameter], returns: Any) -> Any:
    """A registered operator with the schema of these parameters."""
    body.__signature__ = inspect.Signature(parameters, return_annotation=returns)
    return torch.library.custom_op(f"charrnn_fast::{name}", body, mutates_args=())
