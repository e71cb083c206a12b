"""Where texts come from: the order of the places, the hash, the fallback, undecodable bytes. No test uses the
network.
"""

import hashlib
import io
import urllib.error

import pytest

from charrnn_fast.errors import InputError
from charrnn_fast.lm import corpora

CONTENT = b"It was a dark and stormy night.\r\n"


@pytest.fixture
def book(monkeypatch, tmp_path):
    """A book of ours, an empty cache, no CHARRNN_DATA, and a network that counts its calls."""
    book = corpora.Book("book.txt", "A Book", hashlib.sha256(CONTENT).hexdigest(), "https://example.invalid/book.txt")
    monkeypatch.setattr(corpora, "BOOKS", {"book": book})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CHARRNN_DATA", raising=False)
    _network(monkeypatch, urllib.error.URLError("no network"))
    return book


def _network(monkeypatch, answer):
    calls = []

    def urlopen(url, timeout):
        calls.append(url)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(corpora.urllib.request, "urlopen", urlopen)
    return calls


def test_data_folder_comes_first(book, monkeypatch, tmp_path):
    (tmp_path / "book.txt").write_bytes(CONTENT)
    monkeypatch.setenv("CHARRNN_DATA", str(tmp_path))
    corpus = corpora.load_book("book")
    assert corpus.text == CONTENT.decode() and corpus.notice == "" and str(tmp_path) in corpus.source


def test_download_is_checked_and_kept(book, monkeypatch, tmp_path):
    calls = _network(monkeypatch, CONTENT)
    assert corpora.load_book("book").text == CONTENT.decode()
    assert (tmp_path / "cache" / "charrnn_fast" / "book.txt").read_bytes() == CONTENT
    corpora.load_book("book")
    assert calls == [book.url]


def test_download_with_a_wrong_hash_leaves_nothing(book, monkeypatch, tmp_path):
    _network(monkeypatch, CONTENT + b"!")
    with pytest.raises(InputError, match=f"SHA-256 {book.sha256} expected, .* got"):
        corpora.load_book("book")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["data", "cache"])
def test_file_with_a_wrong_hash(book, monkeypatch, tmp_path, place):
    folder = tmp_path / ("cache/charrnn_fast" if place == "cache" else "data")
    folder.mkdir(parents=True)
    (folder / "book.txt").write_bytes(CONTENT[:-3])
    if place == "data":
        monkeypatch.setenv("CHARRNN_DATA", str(folder))
    with pytest.raises(InputError, match="is not the expected text"):
        corpora.load_book("book")


def test_data_folder_that_does_not_exist(book, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARRNN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere is not a folder; expected one that holds book\.txt"):
        corpora.load_book("book")


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(book, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    _network(monkeypatch, CONTENT)
    assert corpora.load_book("book").text == CONTENT.decode()


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no network"), TimeoutError("timed out"), ConnectionError("reset")]
)
def test_offline_falls_back_and_says_so(book, monkeypatch, error):
    _network(monkeypatch, error)
    corpus = corpora.load_book("book")
    assert len(corpus.text) > 100_000 and "pydoc_data" in corpus.source
    for part in ("A Book is not at hand", "CHARRNN_DATA", book.url, "book.txt"):
        assert part in corpus.notice
    assert "\n" not in corpus.notice


def test_bad_byte_names_its_offset(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"byte 0xe9 at offset 3 is not utf-8; .*--encoding.*--errors replace"):
        corpora.read_text(path)
    assert corpora.read_text(path, "latin-1").text == "café"
    replaced = corpora.read_text(path, errors="replace")
    assert replaced.text == "caf\ufffd" and "1 undecodable" in replaced.notice


def test_characters_are_kept_as_they_are_but_for_a_byte_order_mark(tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert corpora.read_text(path).text == "one\r\ntwo\rthree\n"


def test_unreadable_files_and_unknown_codecs(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the text .*nothing: No such file"):
        corpora.read_text(tmp_path / "nothing")
    with pytest.raises(InputError, match="Is a directory"):
        corpora.read_text(tmp_path)
    with pytest.raises(InputError, match="unknown encoding: klingon"):
        corpora.decode(b"x", "file", "klingon")
