"""How many malformed inputs this run has tried, by kind: pytest prints it at its end (conftest.py)."""

from collections import Counter

counts: Counter[str] = Counter()


def count(kind: str, n: int = 1) -> None:
    """n more malformed inputs of this kind were tried."""
    counts[kind] += n
