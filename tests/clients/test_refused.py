"""Arguments, files and surroundings that cannot be, each by its name: one line and exit 2, nothing lost."""

import sys

import needs
import pytest
import torch
from command_line import TEXT, Two

from charrnn_fast.kernels import native
from charrnn_fast.lm import checkpoint, distributed

TRAIN = "train --text book.txt --hidden-size 8 --epochs 1"
RESUME = f"{TRAIN} --out run --resume"
GENERATE = "generate run --prompt 'it was'"
SAMPLE = f"{GENERATE} --temperature 1"
EVALUATE = "evaluate run --text book.txt"
CUDA = torch.cuda.is_available()

REFUSED = [
    ("", "COMMAND"),
    ("train --recipe lstm", "invalid choice: 'lstm'"),
    ("evaluate x", "--text"),
    # ---- numbers
    (f"{TRAIN} --epochs 0", "must be at least 1, got 0"),
    (f"{TRAIN} --epochs many", "invalid whole number value: 'many'"),
    (f"{TRAIN} --epochs 99999999999", "at most"),
    (f"{TRAIN} --lr -1", "must be a number above 0, got -1"),
    (f"{TRAIN} --hidden-size 999999999", "at most"),
    (f"{TRAIN} --hidden-size {'9' * 30}", "at most"),
    (f"{TRAIN} --hidden-size 1048576", "bytes"),
    (f"{TRAIN} --layers 99999999999", "at most"),
    (f"{TRAIN} --embedding 99999999999", "at most"),
    # One layer reads it as a table of as many columns as there are symbols, which fits; two take row after row.
    (f"{TRAIN} --embedding 1048576 --layers 2", "bytes"),
    (f"{TRAIN} --seed {2**64}", "at most"),
    (f"{TRAIN} --seed={-(2**64)}", "at least"),
    (f"{TRAIN} --no-detach-state 2", "needs a sampler that carries the state", "windows"),
    (f"{TRAIN} --recipe ch8 --no-detach-state 17", "at most 16 batches, got 17"),
    (f"{SAMPLE} --seed {2**64}", "at most"),
    (f"{SAMPLE} --seed={-(2**64)}", "at least"),
    (f"{SAMPLE} --top-k {'9' * 30}", "at most"),
    (f"{SAMPLE} --top-k 0", "at least"),
    (f"{SAMPLE} --alpha 1e309", "above 0"),
    (f"{GENERATE} --temperature=-1", "must be at least 0 and at most inf, got -1"),
    (f"{GENERATE} --temperature=-1e-3", "at least 0"),
    (f"{GENERATE} --num-chars 99999999999", "at most"),
    (f"{GENERATE} --num-chars=-1", "at least"),
    (f"{GENERATE} --num-samples 2", "pass --temperature"),
    (f"{GENERATE} --stream --json", "pass one of them"),
    # ---- devices, backends, captures
    *((f"{TRAIN} --device {name}", f"--device {name} cannot be used here") for name in ("abacus", "meta", "hpu")),
    *((f"{line} --device {name}", name) for line in (GENERATE, EVALUATE) for name in ("meta", "hpu")),
    ("doctor --device abacus", "--device abacus cannot be used here"),
    (f"{TRAIN} --backend magic", "'magic'", "'triton'", "'torch'"),
    (f"{TRAIN} --model reference --capture on", "cannot be captured: the reference model"),
    *([] if CUDA else [(f"{TRAIN} --device cuda", "--device cuda cannot be used here")]),
    *([] if CUDA else [(f"{TRAIN} --capture on", "cannot be captured: a CUDA graph needs a CUDA or ROCm device")]),
    # ---- texts and prompts
    (f"{TRAIN} --text nowhere", "cannot read the text", "No such file"),
    (f"{TRAIN} --text empty.txt", "the text is empty"),
    (f"{TRAIN} --text short.txt", "too short for", "at least 34 characters, got 9"),
    (f"{TRAIN} --text short.txt --recipe ch8", "at least 1155 characters, got 9; a smaller batch size"),
    (f"{TRAIN} --text latin.txt", f"byte 0xe9 at offset {len(TEXT)}", "--encoding"),
    *(
        (f"{line} --text latin.txt --encoding {name}", name)
        for line in (TRAIN, EVALUATE)
        for name in ("punycode", "undefined")
    ),
    ("evaluate raw --text upper.txt", "outside the model's vocabulary", "'E'", "--unknown map"),
    ("generate raw --prompt 'Zürich'", "outside the model's vocabulary", "'Z'", "'ü'", "--unknown map"),
    ("generate raw --prompt ''", "the prompt is empty"),
    ("generate raw --prompt-file blank.txt", "holds no prompts"),
    ("generate raw --prompt FILE:run", "cannot read the text"),
    ("generate raw --prompt a --prompt-file b", "not allowed with"),
    # ---- runs and what is written
    (f"{TRAIN} --resume", "name it with --out"),
    (f"{TRAIN} --out run --epochs 3", "holds the last.ckpt of an earlier run", "--resume"),
    (f"{TRAIN} --out nowhere --resume", "there is no checkpoint"),
    (f"{RESUME} --epochs 2", "is at epoch 2 already: raise --epochs"),
    (f"{RESUME} --epochs 3 --seed 7", "was written by --model fused --seed 0", "--seed 7"),
    (f"{RESUME} --epochs 3 --lr 0.5", "lr 1.0 there, 0.5 now"),
    (f"{RESUME} --epochs 3 --hidden-size 9", "hidden_size 8 there, 9 now"),
    (f"{RESUME} --epochs 3 --text reversed.txt", "was trained on another text", "SHA-256"),
    (f"{RESUME} --out raw --recipe santa --layers 2 --epochs 3 --text letters.txt", "has another vocabulary"),
    (f"{TRAIN} --log no/log", "cannot write the log"),
    ("generate run/none.ckpt --prompt it", "there is no checkpoint"),
    ("plot nowhere", "there is no checkpoint"),
    ("plot raw --out no/x.png", "cannot write the picture"),
    ("plot raw --out x.magic", "cannot write the picture"),
    ("export raw --to state-dict --out no/x", "cannot write the export"),
    ("train --config no.toml", "cannot read the configuration", "No such file"),
    ("train --config latin.txt", "cannot read the configuration"),
]


@pytest.mark.parametrize(("line", "parts"), [(line, parts) for line, *parts in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_is_one_line(here, refused, line, parts):
    texts = {"empty": "", "short": "only this", "upper": "IT WAS THÉ AGE", "blank": "\n\n", "reversed": TEXT[::-1]}
    for name, text in {**texts, "letters": "raw text: " * 400}.items():
        (here / f"{name}.txt").write_text(text, encoding="utf-8")
    (here / "latin.txt").write_bytes(TEXT.encode() + b"\xe9")
    refused(line, *parts)


@pytest.mark.parametrize(
    ("line", "missing", "message"),
    [
        ("export raw --to safetensors --out x", ["safetensors.torch"], "pip install"),
        ("export raw --to onnx --out x", ["onnx"], "pip install"),
        ("train --config run/config.toml", ["tomllib", "tomli"], "needs Python 3.11 or the package tomli"),
    ],
)
def test_packages_that_are_not_there(refused, monkeypatch, line, missing, message):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    refused(line, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr = ", "is not TOML"),
        ("learning_rate = 1", "learning_rate is no setting of a run"),
        ("lr = -1", "must be a number above 0"),
        ("letters = 1", "letters must be true or false"),
        ("lr = true", "lr cannot be True"),
        ("hidden_size = 1.5", "invalid whole number value"),
        ("[lr]\nx = 1", "lr cannot be"),
        ('recipe = "lstm"', "invalid choice"),
        ("[[prompts]]\nwords = 1", "each of [[prompts]] has"),
        ('[[prompts]]\ntext = "a"\nnum_chars = "b"', "each of [[prompts]] has"),
        ("split = [0.9]", "two or three shares"),
        ("split = [0.9, 0.2]", "together at most 1"),
        ("split = [0.9, -0.1]", "two or three shares"),
    ],
)
def test_files_that_are_no_configuration(here, refused, content, message):
    (here / "run.toml").write_text(content)
    refused("train --config run.toml --print-config", "run.toml", message)


@pytest.mark.parametrize(
    ("variable", "message"), [("CHARRNN_BACKEND", "CHARRNN_BACKEND is 'avx3'"), ("CHARRNN_ISA", "got 'avx3'")]
)
@pytest.mark.parametrize("line", [TRAIN, GENERATE, EVALUATE, "doctor --hidden-size 8"])
def test_misspelt_variables(refused, monkeypatch, line, variable, message):
    if variable == "CHARRNN_ISA":
        needs.native_kernels()
        monkeypatch.setattr(native.library, "_selected", None)  # as in a program that has run no kernel
    monkeypatch.setenv(variable, "avx3")
    refused(line, variable, message)


@pytest.mark.parametrize("left_out", ["vocab", "version", "head.weight", "head.bias", "config"])
def test_checkpoints_that_lack_something(here, refused, left_out):
    path = here / "run" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del (content["parameters"] if left_out.startswith("head") else content)[left_out]
    content["checksum"] = checkpoint.digest(content)
    torch.save(content, path)
    (here / "run" / "best.ckpt").unlink()
    for line in (GENERATE, EVALUATE, f"{RESUME} --epochs 3"):
        refused(line, "last.ckpt")


def test_a_checkpoint_of_another_model(here, refused):
    """Its parameters are not those that its own description says."""
    content = torch.load(here / "run" / "last.ckpt", weights_only=True)
    content["config"]["hidden_size"] = 9
    content["checksum"] = checkpoint.digest(content)
    torch.save(content, here / "other.ckpt")
    refused("generate other.ckpt --prompt it", "other.ckpt is a checkpoint of another model", "size mismatch")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{TRAIN} --recipe santa", "a batch of the sampler pieces is one sequence, which 2 processes cannot share"),
        ("train --text -", "standard input is there for one process: name a file with --text"),
    ],
)
def test_what_several_processes_cannot_do(refused, monkeypatch, line, message):
    """Beside what tests/clients/test_torchrun.py runs by torchrun."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "join", Two)
    refused(line, f"rank 0: error: {message}")
