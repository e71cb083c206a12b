"""What tests/calls.py makes its random calls of: arguments that are drawn, and two calls that are compared."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from unusual import difference, outcome, plain_values

NOT_TENSORS: list[Any] = [None, 3, 1.5, "x", [1.0], [[1, 2]], {}, True, object(), (torch.zeros(1),)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.int16]


class Draw(random.Random):
    """Arguments, most of them right."""

    def rarely(self, one_in: int = 12) -> bool:
        return self.randrange(one_in) == 0

    def options(self, **of: tuple[int, list[Any]]) -> dict[str, Any]:
        """Each option one time in so many, with one of its values."""
        return {name: self.choice(values) for name, (one_in, values) in of.items() if self.rarely(one_in)}

    def size(self, right: int) -> int:
        return self.choice([0, 1, 2, 3, 5, 9]) if self.rarely(20) else right

    def shape(self, *right: int) -> list[int]:
        shape = [self.size(n) for n in right]
        if self.rarely(25):
            shape.insert(self.randrange(len(shape) + 1), self.choice([0, 1, 2]))
        if shape and self.rarely(25):
            del shape[self.randrange(len(shape))]
        return shape

    def floats(self, *right: int, dtype: torch.dtype = torch.float32) -> Any:
        """A tensor of the right shape, type and device; or not."""
        if self.rarely(60):
            return self.choice(NOT_TENSORS)
        shape = self.shape(*right)
        if self.rarely(20):
            dtype = self.choice(FLOATS + OTHERS)
        x = torch.randn(shape, generator=self._generator()).mul(2).to(dtype)
        if self.rarely(40) and x.numel() and x.is_floating_point():
            x.view(-1)[0] = self.choice([math.nan, math.inf, 1e15])
        return x.to("meta") if self.rarely(80) else self._strided(x)

    def ids(self, *right: int, below: int) -> Any:
        if self.rarely(60):
            return self.choice(NOT_TENSORS)
        x = torch.randint(max(below, 1), self.shape(*right), generator=self._generator())
        if self.rarely(10) and x.numel():
            x.view(-1)[self.randrange(x.numel())] = self.choice(
                [-1, -100, below, below + 1, 2**31, -(2**63), 2**63 - 1]
            )
        if self.rarely(15):
            x = x.to(self.choice(FLOATS[:2] + OTHERS))
        return x.to("meta") if self.rarely(80) else self._strided(x)

    def _strided(self, x: Tensor) -> Tensor:
        kind = self.randrange(8)
        if kind == 0 and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 1 and x.dim():
            return x.repeat_interleave(2, -1)[..., ::2]
        if kind == 2 and x.dim() and x.shape[0]:
            return x[:1].expand(x.shape)
        return x

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.getrandbits(40))


# Of what is no function of torch's and has several things wrong, which is said first is not torch's to decide.
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, AttributeError, OverflowError)


class Call:
    """One call of the library and one of torch, and the types of exception that it may raise where torch has none.

    spread: are numbers that are not finite where torch's are? Not in the rows of a table that no id names, which a
    product with one-hot rows makes 0 * NaN, and not from a first state of zeros. What torch has finite is finite.
    operands: what is multiplied; where probabilities cancel, a rounding of one is as large as they are, and where
    logits are too large for their last digit to count, or of two types (some torch reads as one), they are no numbers.
    """

    def __init__(
        self,
        ours: Callable[[], Any],
        theirs: Callable[[], Any],
        own: tuple[type, ...] = (),
        spread: bool = True,
        operands: tuple[Any, ...] = (),
    ):
        self.ours, self.theirs, self.own, self.spread = ours, theirs, own, spread
        floats = [plain_values(x) for x in operands if isinstance(x, Tensor) and x.is_floating_point()]
        sizes = [x[x.isfinite()].abs().max().item() for x in floats if x.device.type == "cpu" and x.isfinite().any()]
        self.slack = 1e-4 * max(sizes, default=0.0)
        eps = max((torch.finfo(x.dtype).eps for x in floats), default=0.0)
        types = {x.dtype for x in operands if isinstance(x, Tensor)}
        self.numbers = math.prod(sizes) * eps < 1e-3 and len(types) < 2

    def disagreement(self) -> str | None:
        expected, error = outcome(self.theirs)
        found, own_error = outcome(self.ours)
        if error is not None or own_error is not None:
            if error is not None and own_error is not None:
                if isinstance(own_error, (type(error), *self.own)) or isinstance(error, type(own_error)):
                    return None
            elif own_error is not None and isinstance(own_error, self.own):
                return None
            return f"torch {_short(error)}, here {_short(own_error)}"
        narrow = any(t.is_floating_point() and torch.finfo(t.dtype).bits < 32 for t in expected)
        tolerance = 0.1 if narrow else 2e-4
        return difference(found, expected, tolerance, self.spread, self.slack) if self.numbers else None


def _short(error: Exception | None) -> str:
    return "no error" if error is None else f"{type(error).__name__}: {str(error)[:160]}"
