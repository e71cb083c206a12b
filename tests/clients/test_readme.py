"""README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_readme_has_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.split("\n")[1][:40])
def test_example_runs(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The Time Traveller (for so it will be convenient to speak of him) " * 60)
    names = {"model": torch.nn.Sequential(torch.nn.RNN(4, 5))}
    exec(compile(example, str(README), "exec"), names)
    if "generate" in example:
        assert capsys.readouterr().out.startswith("time traveller")
    else:
        assert names["output"].shape == (16, 50, 128) and type(names["model"][0]).__name__ == "FusedRNN"
