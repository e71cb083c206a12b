"""What the tests of the command line share: a text, what files hold and a run has come to, and two processes."""

from pathlib import Path

from charrnn_fast.lm import checkpoint
from charrnn_fast.lm.distributed import Processes

TEXT = "It was the best of times, it was the worst of times; it was the age of wisdom, it was the age of folly. " * 30


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and what it holds."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def result(folder: Path) -> tuple[str, int]:
    """All that a run has come to but times (parameters, optimizer, generator, history) as a digest; and its step."""
    written = checkpoint.load(folder / "last.ckpt")
    content = {"parameters": dict(written.parameters), "optimizer": written.trainer["optimizer"]}
    content |= {"generator": written.generator, "step": written.trainer["step"]}
    content["history"] = [{k: v for k, v in r.items() if k != "seconds"} for r in written.trainer["history"]]
    return checkpoint.digest(content), written.trainer["step"]


class Two(Processes):
    """The first of two processes, without the other."""

    def __init__(self) -> None:
        self.group, self.rank, self.count, self.first = None, 0, 2, True

    def from_first(self, value):
        return value
