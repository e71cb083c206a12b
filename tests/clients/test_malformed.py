"""The command line on malformed arguments, texts and checkpoints: one line and exit 2, or a right result; never a
traceback, never an existing file damaged.
"""

import itertools
import random
import warnings
from encodings.aliases import aliases

import malformed
import pytest
import torch
from command_line import TEXT, files

from charrnn_fast.cli import main
from charrnn_fast.lm import checkpoint

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


BASE = {
    "train": ["train", "--text", "short.txt", *SMALL],
    "generate": ["generate", "run", "--prompt", "it", "--num-chars", "3"],
    "evaluate": ["evaluate", "run", "--text", "short.txt"],
    "doctor": ["doctor", "--device", "cpu", "--hidden-size", "4"],
    "bench": ["bench", "--out", "short.txt"],  # a file in the folder's place: nothing is ever measured
}


@pytest.fixture
def tried(here, capsys):
    """Runs a command line, which ends with exit code 0 or with 2 and an error; no traceback."""
    (here / "short.txt").write_text(TEXT[:1000])

    def run(arguments) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = main(arguments)
            except SystemExit as stop:
                code = stop.code
        out, err = capsys.readouterr()
        assert code in (0, 2), (arguments, code)
        assert "Traceback" not in out + err, arguments
        assert code == 0 or "error:" in err, (arguments, err)

    return run


def test_malformed_arguments(here, tried):
    rng, before = random.Random(0), files(here)
    lines = [
        [*BASE[command], f"--{option}={value}"]
        for command, options in OPTIONS.items()
        for option, value in itertools.product(options, NUMBERS + WORDS)
        if (option, value) != ("lr", "2e9")
    ]
    for _ in range(1000):
        command = rng.choice(list(OPTIONS))
        chosen = rng.choices(OPTIONS[command], k=2)
        lines.append([*BASE[command], *(f"--{option}={rng.choice(NUMBERS + WORDS)}" for option in chosen)])
    for line in lines:
        tried(line)
    malformed.count("command line arguments", len(lines))
    assert files(here) == before


@pytest.mark.parametrize("many", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_damaged_checkpoints(here, tried, many):
    """Flipped, cut, overwritten: the weights that were written, or an error."""
    whole = (here / "run" / "last.ckpt").read_bytes()
    good = checkpoint.load(here / "run" / "last.ckpt").parameters
    rng, path = random.Random(1), here / "a.ckpt"
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
            tried(["generate", "a.ckpt", "--prompt", "it", "--num-chars", "2"])
    malformed.count("damaged checkpoints", 1000 * many)


VALUES = [None, -1, 0, 10**12, 1.5, "", "x", [], {}, [1, "a"], torch.zeros(0), torch.zeros(2, 2).to_sparse(), True]


def test_checkpoints_without_a_field_or_with_another_type_in_it(here, tried):
    """With the right checksum, so that it is the content that is looked at."""
    whole = torch.load(here / "run" / "last.ckpt", weights_only=True)
    places = [(name,) for name in whole] + [
        (n, k) for n in ("config", "vocab", "trainer", "parameters") for k in whole[n]
    ]
    for where, value in itertools.product(places, [KeyError, *VALUES]):
        content = torch.load(here / "run" / "last.ckpt", weights_only=True)
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
        torch.save(content, here / "a.ckpt")
        tried(["generate", "a.ckpt", "--prompt", "it", "--num-chars", "2"])
    malformed.count("checkpoints of other content", len(places) * (1 + len(VALUES)))


def test_damaged_texts_in_every_encoding(here, tried):
    path, rng = here / "t.txt", random.Random(2)
    path.write_bytes(TEXT[:1000].encode() + rng.randbytes(40))
    encodings = sorted({*aliases.values(), "punycode", "undefined", "idna", "unicode_escape", "nothing", "\0"})
    for encoding, errors in itertools.product(encodings, ("strict", "replace", "ignore")):
        tried(["evaluate", "run", "--text", "t.txt", "--encoding", encoding, "--errors", errors])
    for _ in range(20):
        path.write_bytes(rng.randbytes(rng.randrange(60)) + TEXT.encode()[: rng.randrange(200)])
        for errors in ("strict", "replace"):
            tried(["train", "--text", "t.txt", *SMALL, "--recipe", "santa", "--errors", errors])
    malformed.count("damaged texts", 3 * len(encodings) + 40)
