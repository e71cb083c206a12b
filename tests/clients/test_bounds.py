"""Arguments, surroundings and checkpoints beyond what can be, each by its name: one line and exit 2, nothing lost."""

import os
import subprocess
import sys

import needs
import pytest
import torch

from charrnn_fast.cli import main
from charrnn_fast.kernels import native
from charrnn_fast.lm import checkpoint

TEXT = "It was the best of times, it was the worst of times; it was the age of wisdom. " * 30
SMALL = ["--hidden-size", "8", "--epochs", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounds")
    (folder / "book.txt").write_text(TEXT)
    assert main(["train", "--text", str(folder / "book.txt"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder


def _commands(place) -> dict[str, list[str]]:
    book, run = str(place / "book.txt"), str(place / "run")
    return {
        "train": ["train", "--text", book, *SMALL],
        "generate": ["generate", run, "--prompt", "it was"],
        "evaluate": ["evaluate", run, "--text", book],
        "doctor": ["doctor", "--hidden-size", "8"],
    }


def _refused(capsys, arguments, *parts) -> None:
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse's, after the lines on usage
        code = stop.code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and "Traceback" not in out + err, (code, out, err)
    assert "result" not in out
    for part in parts:
        assert part in errors[0]


REFUSED = [
    ("train", "--hidden-size", "999999999", "at most"),
    ("train", "--hidden-size", "9" * 30, "at most"),
    ("train", "--hidden-size", "1048576", "bytes"),
    ("train", "--embedding", "99999999999", "at most"),
    ("train", "--layers", "99999999999", "at most"),
    ("train", "--epochs", "99999999999", "at most"),
    ("train", "--seed", str(2**64), "at most"),
    ("train", "--seed", str(-(2**64)), "at least"),
    ("generate", "--seed", str(2**64), "at most"),
    ("generate", "--seed", str(-(2**64)), "at least"),
    ("generate", "--top-k", "9" * 30, "at most"),
    ("generate", "--top-k", "0", "at least"),
    ("generate", "--num-chars", "99999999999", "at most"),
    ("generate", "--num-chars", "-1", "at least"),
    ("generate", "--temperature", "-1", "at least 0"),
    ("generate", "--temperature", "-1e-3", "at least 0"),
    ("generate", "--alpha", "1e309", "above 0"),
    *((command, "--device", name, name) for command in ("train", "generate", "evaluate") for name in ("meta", "hpu")),
    *((command, "--encoding", name, name) for command in ("train", "evaluate") for name in ("punycode", "undefined")),
]


@pytest.mark.parametrize(("command", "option", "value", "part"), REFUSED)
def test_arguments_beyond_what_can_be(place, capsys, command, option, value, part):
    if option == "--encoding":  # which cannot read what is no ASCII
        (place / "other.txt").write_bytes(TEXT.encode() + b"\xe9")
        extra = ["--text", str(place / "other.txt"), option, value]
    else:
        extra = [f"{option}={value}"] + (
            ["--temperature", "1"] if command == "generate" and "temp" not in option else []
        )
    before = {p.name: p.read_bytes() for p in (place / "run").iterdir()}
    _refused(capsys, [*_commands(place)[command], *extra], part)
    assert {p.name: p.read_bytes() for p in (place / "run").iterdir()} == before


def test_an_embedding_whose_rows_do_not_fit(place, capsys):
    """One layer reads it as a table of as many columns as there are symbols, which does; two take row after row."""
    _refused(capsys, [*_commands(place)["train"], "--embedding", "1048576", "--layers", "2"], "")


@pytest.mark.parametrize("sharp", [["--temperature", "1e-310"], ["--temperature", "1", "--alpha", "1e308"]], ids=str)
def test_the_sharpest_sampling_is_greedy(place, capsys, sharp):
    texts = []
    for options in ([], [*sharp, "--seed", "1"], [*sharp, "--seed", str(2**63 - 1), "--top-k", "2147483647"]):
        assert main([*_commands(place)["generate"], *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 50


@pytest.mark.parametrize("variable", ["CHARRNN_BACKEND", "CHARRNN_ISA"])
@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "doctor"])
def test_misspelt_variables(place, capsys, monkeypatch, command, variable):
    if variable == "CHARRNN_ISA":
        needs.native_kernels()
        monkeypatch.setattr(native.library, "_selected", None)  # as in a program that has run no kernel
    monkeypatch.setenv(variable, "avx3")
    _refused(capsys, _commands(place)[command], variable, "avx3")


def test_a_misspelt_variable_of_a_whole_program(place):
    command = [sys.executable, "-m", "charrnn_fast", *_commands(place)["generate"]]
    environment = {**os.environ, "CHARRNN_ISA": "avx3", "CHARRNN_BACKEND": "avx3"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done


@pytest.mark.parametrize("left_out", ["vocab", "version", "head.weight", "head.bias", "config"])
def test_checkpoints_that_lack_something(place, tmp_path, capsys, left_out):
    content = torch.load(place / "run" / "last.ckpt", weights_only=True)
    del (content["parameters"] if left_out.startswith("head") else content)[left_out]
    content["checksum"] = checkpoint.digest(content)
    torch.save(content, tmp_path / "last.ckpt")
    commands = _commands(place)
    before = (tmp_path / "last.ckpt").read_bytes()
    _refused(capsys, ["generate", tmp_path, *commands["generate"][2:]], "last.ckpt")
    _refused(capsys, ["evaluate", tmp_path, *commands["evaluate"][2:]], "last.ckpt")
    _refused(capsys, [*commands["train"], "--out", tmp_path, "--resume", "--epochs", "2"], "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before
