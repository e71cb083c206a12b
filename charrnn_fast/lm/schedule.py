"""The learning rate over a run: constant, or after a linear warm-up along a cosine or down steps.

    lr(t) = lr * min(1, (t + 1) / W) * f(max(0, t - W))         t: updates made so far, W: updates of warm-up

    constant: f = 1
    cosine:   f = m + (1 - m) (1 + cos(pi (t - W) / (N - W))) / 2      N: updates of the whole run, m: the share left
    step:     f = gamma^(number of times that `every` epochs have passed)

Source of the cosine: I. Loshchilov and F. Hutter, "SGDR", ICLR 2017, without its restarts.
"""

import math
from dataclasses import dataclass

KINDS = ("constant", "cosine", "step")


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes.

    Args:
        kind: "constant", "cosine" or "step".
        warmup: number of updates over which the rate rises linearly from lr / warmup to lr; 0 for none.
        final: what share of lr a cosine ends at, 0 to 1.
        every: epochs between two steps down. gamma: what each of them multiplies the rate by, above 0, at most 1.

    Raises ValueError for other values.
    """

    kind: str = "constant"
    warmup: int = 0
    final: float = 0.0
    every: int = 10
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 updates, got {self.warmup}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be a share of lr, 0 to 1, got {self.final}")
        if self.every < 1 or not 0 < self.gamma <= 1:
            raise ValueError(
                f"expected at least 1 epoch between steps and 0 < gamma <= 1, got {self.every} and {self.gamma}"
            )

    @property
    def changes(self) -> bool:
        """Whether the rate is ever another one than lr."""
        return self.kind != "constant" or self.warmup > 0

    def factor(self, updates: int, epochs: int, total: int | None) -> float:
        """What to multiply lr by for the next update, after `updates` updates and `epochs` whole epochs of a run of
        `total` updates (None where that is not known, which a cosine does not accept: ValueError).
        """
        rise = min(1.0, (updates + 1) / self.warmup) if self.warmup else 1.0
        if self.kind == "step":
            return rise * self.gamma ** (epochs // self.every)
        if self.kind == "constant" or updates < self.warmup:
            return rise
        if total is None:
            raise ValueError("a cosine needs to know the number of updates: the sampler has no num_batches")
        done = min(1.0, (updates - self.warmup) / max(1, total - self.warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
