"""Where a text comes from: a file of the user's, $CHARRNN_DATA, the user cache, a checked download, or Python's own
manual.
"""

import hashlib
import os
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from charrnn_fast.errors import InputError
from charrnn_fast.lm.files import write_whole

DOWNLOAD_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Book:
    """A text that recipes train on: the file's name, its SHA-256, and where it can be downloaded."""

    file_name: str
    title: str
    sha256: str
    url: str


BOOKS = {
    "timemachine": Book(
        "timemachine.txt",
        "H. G. Wells, The Time Machine",
        "8424dbd9532ac81f7e5f0b6add90e6952baea29158309d7d1bf3884f4e12c516",
        "http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt",
    ),
    "santa": Book(
        "santa_claus_pg520.txt",
        "L. Frank Baum, The Life and Adventures of Santa Claus",
        "b1ec2016df86577bc3093399adf1f749be82f61ed1002f4d3cdbfac3bb103ece",
        "https://www.gutenberg.org/files/520/520.txt",
    ),
    "shakespeare": Book(
        "tinyshakespeare.txt",
        "tiny Shakespeare",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
}


@dataclass(frozen=True)
class Corpus:
    """A text and a few words on where it comes from; `notice` is a line that the user should see, or empty."""

    text: str
    source: str
    notice: str = ""

    @property
    def sha256(self) -> str:
        """Of the text's characters, wherever and in whatever encoding they lie."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def decode(data: bytes, name: str, encoding: str = "utf-8", errors: str = "strict") -> Corpus:
    """Decode a file's bytes. A bad byte is an InputError that names its offset, unless errors="replace" or "ignore"."""
    try:
        text = data.decode(encoding, errors)
    except LookupError as error:
        raise InputError(f"{name}: {error}; expected a Python codec and one of strict, replace, ignore") from None
    except UnicodeDecodeError as error:
        raise not_in_encoding(error, name, encoding) from None
    except Exception as error:  # Python's rarer codecs raise whatever they like
        raise InputError(f"{name} cannot be read as {encoding!r}: {error or type(error).__name__}") from None
    text = text.removeprefix("\ufeff")
    replaced = text.count("\ufffd") if errors == "replace" else 0
    notice = f"{name}: {replaced} undecodable places were read as U+FFFD" if replaced else ""
    return Corpus(text, name, notice)


def not_in_encoding(error: UnicodeDecodeError, name: str, encoding: str, offset: int = 0) -> InputError:
    """The error for a bad byte, whose decoder was given the bytes from `offset` on."""
    return InputError(
        f"{name}: byte 0x{error.object[error.start]:02x} at offset {offset + error.start} is not {encoding}; "
        "name the file's encoding with --encoding, or pass --errors replace"
    )


def read_text(path: str | Path, encoding: str = "utf-8", errors: str = "strict") -> Corpus:
    """A user's file. Raises InputError if it is missing, a folder, unreadable, or not in the encoding."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, error) from None
    return decode(data, str(path), encoding, errors)


def unreadable(name: str | Path, error: Exception) -> InputError:
    """The error for a text that cannot be read."""
    return InputError(f"cannot read the text {name}: {getattr(error, 'strerror', None) or error}")


def cache_folder() -> Path:
    """Where downloads are kept: charrnn_fast under $XDG_CACHE_HOME, or under the platform's usual place."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "charrnn_fast"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "charrnn_fast"
    return Path.home() / ".cache" / "charrnn_fast"


def load_book(name: str) -> Corpus:
    """One of BOOKS, from $CHARRNN_DATA, the cache or a download, each checked against its SHA-256; offline, the
    fallback.

    Raises InputError for a file whose hash is wrong (a download with a wrong hash is not kept) and for a CHARRNN_DATA
    that is not a folder.
    """
    book = BOOKS[name]
    folders = [cache_folder()]
    if named := os.environ.get("CHARRNN_DATA"):
        if not Path(named).is_dir():
            raise InputError(f"CHARRNN_DATA={named} is not a folder; expected one that holds {book.file_name}")
        folders.insert(0, Path(named))
    for folder in folders:
        path = folder / book.file_name
        if path.is_file():
            return decode(_checked(path.read_bytes(), book, str(path)), f"{book.title} ({path})")
    try:
        with urllib.request.urlopen(book.url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            downloaded = response.read()
    except (urllib.error.URLError, OSError) as error:
        return fallback(book, str(getattr(error, "reason", error)))
    data = _checked(downloaded, book, book.url)
    kept = cache_folder() / book.file_name
    with suppress(OSError, InputError):  # a read-only cache is no reason to stop
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, data, "the book")
    return decode(data, f"{book.title} ({book.url})")


def fallback(book: Book, reason: str) -> Corpus:
    """The language reference in `pydoc_data.topics`, the text that is on every machine with Python."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    notice = (
        f"{book.title} is not at hand and could not be downloaded ({reason}): training on Python's language reference "
        f"instead, so results will differ. To use the book, save {book.url} as {book.file_name} in a folder and set "
        "CHARRNN_DATA to it."
    )
    return Corpus(text, "Python's language reference (pydoc_data.topics)", notice)


def _checked(data: bytes, book: Book, where: str) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    if digest != book.sha256:
        raise InputError(
            f"{where} is not the expected text: SHA-256 {book.sha256} expected, {digest} got ({len(data)} bytes); "
            "remove it, or pass it with --text to use it as it is"
        )
    return data
