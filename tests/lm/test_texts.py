"""A user's own text: files, folders, standard input, line ends, marks, NUL; long ones in pieces; parts by place."""

import io
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace

import malformed
import pytest
import torch

from charrnn_fast.errors import InputError
from charrnn_fast.lm import data, recipes, texts
from charrnn_fast.lm.corpora import Corpus
from charrnn_fast.lm.recipes import RECIPES, build_model, build_sampler, prepare_text, split_by_place
from charrnn_fast.lm.texts import LargeText, read_texts
from charrnn_fast.lm.training import Trainer

RAW = replace(RECIPES["santa"], hidden_size=6)
LETTERS = replace(RECIPES["scratch"], hidden_size=6)
AWKWARD = {
    "Windows line ends": b"one\r\ntwo\r\n\r\nthree\r",
    "byte-order mark": b"\xef\xbb\xbfone two\n",
    "NUL": b"one\0two\0\0\n",
    "only NUL and letters": b"\0a" * 40,
    "non-Latin": "\u9053\u53ef\u9053 \U0001f600 caf\u00e9 e\u0301".encode() * 9,
    "a hundred bytes": b"ab cd" * 20,
    "blank lines": b" \n\t\n  x",
}


@pytest.fixture(params=AWKWARD)
def awkward(request, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(AWKWARD[request.param])
    return path


def test_characters_are_what_the_file_holds(awkward):
    corpus = read_texts([str(awkward)])
    assert isinstance(corpus, Corpus) and corpus.text == awkward.read_bytes().decode("utf-8-sig")
    vocab, tokens = prepare_text(RAW, corpus.text)
    assert tokens.dtype == torch.uint8 and vocab.decode(tokens) == corpus.text


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize("recipe", [RAW, LETTERS, replace(RAW, max_chars=7), replace(LETTERS, max_chars=7)])
def test_a_long_text_in_pieces_is_the_text(awkward, recipe, piece, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", piece)
    whole = read_texts([str(awkward)])
    long = read_texts([str(awkward)], large=0)
    assert isinstance(long, LargeText) and "".join(long.chunks()) == whole.text and long.sha256 == whole.sha256
    (vocab, tokens), (other, mapped) = prepare_text(recipe, whole.text), prepare_text(recipe, long)
    assert other.symbols == vocab.symbols and torch.equal(mapped, tokens) and mapped.dtype == tokens.dtype


@pytest.mark.parametrize("large", [0, 10**9])
def test_files_folders_and_standard_input_one_after_the_other(tmp_path, monkeypatch, large):
    folder = tmp_path / "books"
    (folder / "below").mkdir(parents=True)
    for name, content in (("b.txt", b"\xef\xbb\xbfsecond "), ("a.txt", b"first "), (".hidden", b"\xff")):
        (folder / name).write_bytes(content)
    (folder / "below" / "c.txt").write_bytes(b"not this")
    (tmp_path / "last.txt").write_bytes(b"fourth\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"third ")))
    corpus = read_texts([str(folder), "-", str(tmp_path / "last.txt")], large=large)
    for _ in range(2):  # standard input is there a second time
        text = corpus.text if isinstance(corpus, Corpus) else "".join(corpus.chunks())
        assert text == "first second third fourth\r\n"
    assert corpus.source.startswith("4 files, ") and corpus.source.endswith("last.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder holds no files"):
        read_texts([str(tmp_path / "empty")])


@pytest.mark.parametrize("large", [0, 10**9])
def test_a_pipe_is_a_text(tmp_path, large):
    """A shell's <(command), which can be read once; a long text is read twice."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_bytes(b"first ")
    writer = threading.Thread(target=pipe.write_bytes, args=(b"second " * 30_000,), daemon=True)
    writer.start()
    corpus = read_texts([str(file), str(pipe)], large=large)
    for _ in range(2):
        text = corpus.text if isinstance(corpus, Corpus) else "".join(corpus.chunks())
        assert text == "first " + "second " * 30_000
    writer.join()


@pytest.mark.parametrize("piece", [1, 2, 5, 100])
@pytest.mark.parametrize("bad", [b"ok\xff", b"\xc3", "é".encode() * 3 + b"\xe9ab", b"\xf0\x9f\x98"])
def test_a_bad_byte_of_a_long_text_is_the_one_of_a_short(tmp_path, monkeypatch, bad, piece):
    monkeypatch.setattr(texts, "PIECE", piece)
    (tmp_path / "t").write_bytes(bad)
    with pytest.raises(InputError) as short:
        read_texts([str(tmp_path / "t")])
    with pytest.raises(InputError) as long:
        list(read_texts([str(tmp_path / "t")], large=0).chunks())
    assert str(long.value) == str(short.value) and "at offset" in str(short.value)
    replaced = read_texts([str(tmp_path / "t")], errors="replace", large=0)
    assert "".join(replaced.chunks()) == bad.decode(errors="replace")
    assert f"{bad.decode(errors='replace').count(chr(0xFFFD))} undecodable places" in replaced.notice


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "cp1252", "utf-7", "gb18030", "idna", "utf-8-sig"])
def test_other_encodings_in_pieces(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(texts, "PIECE", 3)
    text = "caf\u00e9 one two three\n" * 3 if encoding != "idna" else "abc.def"
    (tmp_path / "t").write_bytes(text.encode(encoding))
    corpus = read_texts([str(tmp_path / "t")], encoding, large=0)
    assert (corpus.text if isinstance(corpus, Corpus) else "".join(corpus.chunks())) == text


@pytest.mark.parametrize("many", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_texts_are_read_alike_in_pieces_and_whole(tmp_path, monkeypatch, many):
    rng, path = random.Random(3), tmp_path / "t"
    good = ("It was the best of times, " * 3 + "caf\u00e9 \u9053\r\n\0").encode()
    for _ in range(many):
        content = bytearray(good[: rng.randrange(1, len(good))])
        for _ in range(rng.randrange(4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        monkeypatch.setattr(texts, "PIECE", rng.randrange(1, 40))
        found = []
        for large in (0, 10**9):
            try:
                corpus = read_texts([str(path)], large=large)
                found.append(corpus.text if isinstance(corpus, Corpus) else "".join(corpus.chunks()))
            except InputError as error:
                assert "\n" not in str(error)
                found.append(str(error))
        assert found[0] == found[1]
    malformed.count("damaged texts, whole and in pieces", many)


@pytest.mark.parametrize(("symbols", "dtype"), [(200, torch.uint8), (300, torch.int16), (40_000, torch.int32)])
def test_ids_are_of_the_smallest_type_and_train_as_any_other(symbols, dtype):
    vocab = data.Vocabulary.of("".join(chr(0x100 + i) for i in range(symbols)), letters=False)
    assert vocab.dtype == dtype
    text = "".join(chr(0x100 + (i * i) % symbols) for i in range(500))
    small, large = vocab.encode(text, vocab.dtype), vocab.encode(text)
    assert small.dtype == dtype and large.dtype == torch.int64 and torch.equal(small.long(), large)
    for sampler in ("windows", "sequential", "random", "pieces"):
        recipe = replace(LETTERS, sampler=sampler, batch_size=4, num_steps=6, split=(0.7, 0.3))
        samplers = [build_sampler(recipe, tokens, seed=0) for tokens in (small, large)]
        for epoch in ("train", "validation"):
            batches = [list(getattr(s, epoch)()) for s in samplers]
            assert len(batches[0]) == len(batches[1]) > 0
            for one, other in zip(*batches, strict=True):
                assert all(torch.equal(x, y) and x.dtype == torch.int64 for x, y in zip(one, other, strict=True))


def test_a_long_text_is_mapped_and_its_file_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "t").write_text("abc " * 5000)
    _, tokens = prepare_text(RAW, read_texts([str(tmp_path / "t")], large=0))
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            assert any(str(tmp_path) in line and "deleted" in line for line in maps)
    assert [p.name for p in tmp_path.iterdir()] == ["t"] and len(tokens) == 20_000


@pytest.mark.slow
def test_a_gigabyte_takes_no_gigabyte(tmp_path):
    """Two walks in pieces: the process holds far less than the text, whose ids are one byte each."""
    path = tmp_path / "big.txt"
    with open(path, "wb") as file:
        for i in range(1024):
            file.write((f"line {i} of a very long text. " * 40_000).encode()[: 2**20])
    code = (
        "import sys, resource; from charrnn_fast.lm.recipes import *; from charrnn_fast.lm.texts import read_texts\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "vocab, tokens = prepare_text(RECIPES['santa'], read_texts([sys.argv[1]]))\n"
        "sampler = build_sampler(replace(RECIPES['shakespeare'], max_chars=None), tokens, 0)\n"
        "X, Y = next(sampler.train())\n"
        "print(len(tokens), tokens.dtype, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, dtype, kilobytes = done.stdout.split()
    print(f"1 GiB of text: at its most {int(kilobytes) / 1024:.0f} MiB of memory more than before")
    assert int(count) == 2**30 and dtype == "torch.uint8" and int(kilobytes) < 400 * 1024


@pytest.mark.parametrize("sampler", ["windows", "sequential", "random", "pieces"])
@pytest.mark.parametrize("split", [(0.9, 0.1), (0.5, 0.3, 0.2)])
def test_parts_by_place_for_every_sampler(sampler, split):
    tokens = torch.arange(1000) % 200
    place = torch.arange(1000)
    recipe = replace(LETTERS, sampler=sampler, batch_size=4, num_steps=7, split=split)
    parts = split_by_place(recipe, place)
    ends = [round(1000 * sum(split[: i + 1])) for i in range(len(split))]
    assert [(int(p[0]), int(p[-1]) + 1) for p in parts if p is not None] == list(zip([0, *ends], ends, strict=False))
    built = build_sampler(recipe, place, seed=0)
    for _ in range(3):
        trained = torch.cat([torch.cat([X, Y], 1).flatten() for X, Y in built.train()])
        assert int(trained.max()) < ends[0], "nothing of the validation part is trained on"
    seen = torch.cat([Y.flatten() for _, Y in built.validation()])
    assert len(seen) == len(set(seen.tolist())) and int(seen.min()) == ends[0] + 1 and int(seen.max()) < ends[1]
    assert len(seen) >= (ends[1] - ends[0]) - 1 - max(7, 4)
    trainer = Trainer(build_model(recipe, 200, 0), epochs=1, lr=0.1)
    (record,) = trainer.fit(build_sampler(recipe, tokens, seed=0))
    assert record.val_ppl > 1


def test_the_split_of_nanogpt():
    recipe = replace(RAW, split=(0.9, 0.1))
    train, val, test = split_by_place(recipe, torch.zeros(1_115_394, dtype=torch.uint8))
    assert (len(train), len(val), test) == (1_003_854, 111_540, None)
    with pytest.raises(InputError, match=r"too short for a validation part of 0\.1 of it: expected at least 2 char"):
        split_by_place(recipe, torch.zeros(9))


def test_without_a_split_nothing_is_held_out():
    for name in ("ch8", "santa"):
        assert not list(build_sampler(RECIPES[name], torch.arange(10_000), 0).validation())
