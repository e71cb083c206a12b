"""The command line on malformed arguments, texts and checkpoints: one line and exit 2, or a right result; never a
traceback, never an existing file damaged.
"""

import itertools
import random
import warnings
from pathlib import Path

import malformed
import pytest
import torch

from charrnn_fast.cli import main
from charrnn_fast.lm import checkpoint

TEXT = "It was the best of times, it was the worst of times; it was the age of wisdom. " * 12
SMALL = ["--hidden-size", "4", "--epochs", "1"]
NUMBERS = [
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "inf",
    "1" * 40,
    "9" * 5000,
    "0x10",
    "1.5",
    "2e9",
    "\u0663",
    "None",
    "\0",
    "-0",
]
WORDS = [
    "",
    "magic",
    "\0",
    "\ud800",
    "cpu:99999999999",
    "meta",
    "hpu",
    "cuda:-1",
    "utf-8\0",
    "x" * 3000,
    "../..",
    "/dev/null",
]
OPTIONS = {
    "train": (
        *("recipe", "model", "epochs", "seed", "device", "backend", "capture", "sampler", "hidden-size", "layers"),
        *("nonlinearity", "embedding", "lr", "clip", "no-detach-state", "errors", "encoding", "text"),
    ),
    "generate": ["num-chars", "temperature", "top-k", "alpha", "seed", "device", "prompt"],
    "evaluate": ["text", "encoding", "errors", "device"],
    "doctor": ["device", "dtype", "hidden-size"],
    "bench": ["device", "peers", "typo"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "book.txt").write_text(TEXT)
    assert main(["train", "--text", str(folder / "book.txt"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder


def _code(arguments) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def _try(capsys, arguments) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = _code([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code in (0, 2), (arguments, code)
    assert "Traceback" not in out + err, arguments
    if code == 2:
        assert sum("error:" in line for line in err.splitlines()) >= 1, (arguments, err)
    return code


def _base(place: Path, command: str) -> list[str]:
    book, run = str(place / "book.txt"), str(place / "run")
    return {
        "train": ["train", "--text", book, *SMALL],
        "generate": ["generate", run, "--prompt", "it", "--num-chars", "3"],
        "evaluate": ["evaluate", run, "--text", book],
        "doctor": ["doctor", "--device", "cpu", "--hidden-size", "4"],
        "bench": ["bench", "--out", book],  # a file in the folder's place: nothing is ever measured
    }[command]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_malformed_arguments(place, capsys, request):
    before, tried = _files(place), 0
    for command, options in OPTIONS.items():
        for option, value in itertools.product(options, NUMBERS + WORDS):
            if (option, value) != ("lr", "2e9"):
                _try(capsys, [*_base(place, command), f"--{option}={value}"])
                tried += 1
    rng = random.Random(0)
    for _ in range(1000):
        command = rng.choice(list(OPTIONS))
        chosen = rng.choices(OPTIONS[command], k=2)
        given = [f"--{option}={rng.choice(NUMBERS + WORDS)}" for option in chosen]
        _try(capsys, [*_base(place, command), *given])
        tried += 1
    malformed.count("command line arguments", tried)
    assert _files(place) == before


@pytest.mark.parametrize("many", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_damaged_checkpoints(place, capsys, tmp_path, many):
    """Flipped, cut, overwritten: the weights that were written, or an error."""
    whole = (place / "run" / "last.ckpt").read_bytes()
    good = checkpoint.load(place / "run" / "last.ckpt").parameters
    rng, path = random.Random(1), tmp_path / "a.ckpt"
    for turn in range(1000 * many):
        content = bytearray(whole)
        if turn % 3 == 0:
            content = content[: rng.randrange(len(content))]
        for _ in range(1 if turn % 3 else rng.randrange(3)):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            parameters = checkpoint.load(path).parameters
        except checkpoint.InputError as error:
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(parameters[name], p) for name, p in good.items())
        if turn % 10 == 0:
            _try(capsys, ["generate", path, "--prompt", "it", "--num-chars", "2"])
    malformed.count("damaged checkpoints", 1000 * many)


VALUES = [None, -1, 0, 10**12, 1.5, "", "x", [], {}, [1, "a"], torch.zeros(0), torch.zeros(2, 2).to_sparse(), True]


def test_checkpoints_without_a_field_or_with_another_type_in_it(place, capsys, tmp_path):
    """With the right checksum, so that it is the content that is looked at."""
    path, tried = tmp_path / "a.ckpt", 0
    load = lambda: torch.load(place / "run" / "last.ckpt", weights_only=True)  # noqa: E731
    whole = load()
    places = [(name,) for name in whole] + [
        (n, k) for n in ("config", "vocab", "trainer", "parameters") for k in whole[n]
    ]
    for where in places:
        for value in [KeyError, *VALUES]:
            content = load()
            inner = content if len(where) == 1 else content[where[0]]
            if value is KeyError:
                del inner[where[-1]]
            else:
                inner[where[-1]] = value
            if where != ("checksum",):
                try:
                    content["checksum"] = checkpoint.digest(content)
                except Exception:
                    content["checksum"] = ""
            torch.save(content, path)
            _try(capsys, ["generate", path, "--prompt", "it", "--num-chars", "2"])
            tried += 1
    malformed.count("checkpoints of other content", tried)


def test_damaged_texts_in_every_encoding(place, capsys, tmp_path):
    from encodings.aliases import aliases

    path, rng, tried = tmp_path / "t.txt", random.Random(2), 0
    path.write_bytes(TEXT.encode() + rng.randbytes(40))
    for encoding in sorted({*aliases.values(), "punycode", "undefined", "idna", "unicode_escape", "nothing", "\0"}):
        for errors in ("strict", "replace", "ignore"):
            given = ["--encoding", encoding, "--errors", errors]
            _try(capsys, ["evaluate", place / "run", "--text", path, *given])
            tried += 1
    for _ in range(20):
        path.write_bytes(rng.randbytes(rng.randrange(60)) + TEXT.encode()[: rng.randrange(200)])
        for errors in ("strict", "replace"):
            _try(capsys, ["train", "--text", path, *SMALL, "--recipe", "santa", "--errors", errors])
            tried += 1
    malformed.count("damaged texts", tried)
