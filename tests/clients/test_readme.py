"""README's Python examples run as they stand, its command lines are understood, its pictures and figures are there, and
every public name is documented.
"""

import inspect
import json
import math
import pydoc
import re
import shlex
from pathlib import Path

import pytest
import torch

import charrnn_fast
from charrnn_fast.cli import _parser
from charrnn_fast.lm.recipes import RECIPES

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


def _commands() -> list[str]:
    """Every charrnn-fast line of a block, one command each."""
    inside = README.read_text().split("```")[1::2]
    lines = [line.partition("  #")[0] for block in inside for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split(";")]
    return [part.partition(" > ")[0] for part in parts if part.startswith("charrnn-fast ") and "|" not in part]


@pytest.mark.parametrize("command", _commands())
def test_command_lines_are_understood(command):
    assert callable(_parser().parse_args(shlex.split(command)[1:]).run)


def test_every_command_has_a_line():
    used = {shlex.split(command)[1] for command in _commands()}
    assert used == {"train", "generate", "evaluate", "plot", "export", "doctor", "bench"}


def test_pictures_are_there_and_every_recipe_has_its_row():
    text = README.read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 2 and all((README.parent / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert all(f"| `{name}` |" in text for name in RECIPES)


def test_the_figure_of_shakespeare_is_the_recorded_one():
    run = json.loads((README.parent / "bench/results/recipes.json").read_text())["runs"]["shakespeare-0"]
    text = README.read_text()
    assert run["value"] == pytest.approx(math.log(run["val_ppl"])) and run["value"] < 1.6
    assert f"**{run['value']:.3f} nats a character**" in text
    assert len(run["curve"]) == RECIPES["shakespeare"].epochs == int(re.findall(r"clip 1, (\d+) epochs", text)[-1])
    model = charrnn_fast.CharRNN(65, RECIPES["shakespeare"].hidden_size, RECIPES["shakespeare"].num_layers)
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters" in text and count < 2_000_000


@pytest.mark.parametrize("name", charrnn_fast.__all__)
def test_public_names_are_documented(name):
    """The name, and of a class every method that is its own; what a function takes and raises."""
    thing = getattr(charrnn_fast, name)
    assert len(inspect.getdoc(thing)) > 100 and pydoc.plain(pydoc.render_doc(thing))
    if inspect.isclass(thing):
        own = [m for n, m in vars(thing).items() if n[0] != "_" and inspect.isfunction(m) and n != "extra_repr"]
        assert all(inspect.getdoc(method) for method in own), [m.__name__ for m in own if not inspect.getdoc(m)]
    assert name in charrnn_fast.__doc__
