"""A user's own text: files, folders, standard input, from a hundred bytes to gigabytes.

A text up to LARGE bytes is read whole. A longer one is walked twice in pieces, for its symbols and for its token ids,
which go to a file without a name that is mapped into memory: what a run holds of it is what its batches touch.
"""

import codecs
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from charrnn_fast.errors import InputError
from charrnn_fast.lm.corpora import Corpus, decode, not_in_encoding, unreadable

LARGE = 64 * 2**20  # bytes
PIECE = 2**22  # bytes read at a time
STANDARD_INPUT = "-"


@dataclass
class LargeText:
    """A text that is read in pieces, as often as it is asked for. `notice` is complete once all of it was read."""

    files: list[tuple[str, Path | BinaryIO]]  # what it is called, and where it is
    source: str
    encoding: str = "utf-8"
    errors: str = "strict"
    notice: str = ""
    _digest: list[str] = field(default_factory=list)

    def chunks(self) -> Iterator[str]:
        """The text, one piece after the other. Raises InputError as `corpora.decode` does."""
        replaced, digest = 0, hashlib.sha256()
        for name, place in self.files:
            for piece in _decoded(name, place, self.encoding, self.errors):
                replaced += piece.count("\ufffd") if self.errors == "replace" else 0
                digest.update(piece.encode("utf-8", "surrogatepass"))
                yield piece
        self.notice = f"{self.source}: {replaced} undecodable places were read as U+FFFD" if replaced else ""
        self._digest = [digest.hexdigest()]

    @cached_property
    def sha256(self) -> str:
        """Of the text's characters, as Corpus.sha256."""
        if not self._digest:
            for _ in self.chunks():
                pass
        return self._digest[0]


def read_texts(
    paths: Sequence[str], encoding: str = "utf-8", errors: str = "strict", *, large: float = LARGE
) -> Corpus | LargeText:
    """The texts of files one after the other, as `cat` puts them; a folder stands for the files in it, by name, without
    hidden ones and without folders below; "-" for standard input. A byte-order mark at the beginning of a file is left
    out, line ends are kept as they are.

    Raises InputError if something is missing, unreadable, or not in the encoding.
    """
    files: list[tuple[str, Path | BinaryIO]] = []
    for path in paths:
        files += _files(path)
    source = files[0][0] if len(files) == 1 else f"{len(files)} files, {files[0][0]} to {files[-1][0]}"
    try:
        sizes = [_size(name, place) for name, place in files]
        codecs.getincrementaldecoder(encoding)
        incremental = True
    except (LookupError, ValueError):  # unknown, with a NUL in it, or one that reads a text only as a whole
        incremental = False
    if incremental and sum(sizes) > large:
        return LargeText(files, source, encoding, errors)
    corpora = [decode(b"".join(_pieces(name, place)), name, encoding, errors) for name, place in files]
    notices = "; ".join(corpus.notice for corpus in corpora if corpus.notice)
    return Corpus("".join(corpus.text for corpus in corpora), source, notices)


def _files(path: str) -> list[tuple[str, Path | BinaryIO]]:
    """What a path on the command line stands for."""
    if path == STANDARD_INPUT:
        try:
            return [("standard input", _spooled(sys.stdin.buffer))]
        except (OSError, ValueError, AttributeError) as error:  # closed, or replaced by something without bytes
            raise InputError(f"cannot read standard input: {getattr(error, 'strerror', None) or error}") from None
    place = Path(path)
    try:
        if place.is_fifo():  # a shell's <(command)
            with open(place, "rb") as pipe:
                return [(path, _spooled(pipe))]
        if not place.is_dir():
            return [(path, place)]
        found = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, error) from None
    if not found:
        raise InputError(f"cannot read the text {path}: the folder holds no files")
    return [(str(file), file) for file in found]


def _spooled(source: BinaryIO) -> BinaryIO:
    """What can be read only once, in a file without a name."""
    # No BinaryIO to the type checker, though it has the methods; open as long as the text is read, so no `with`.
    spool: BinaryIO = tempfile.SpooledTemporaryFile(max_size=LARGE)  # type: ignore[assignment]  # noqa: SIM115
    shutil.copyfileobj(source, spool, PIECE)
    return spool


def _size(name: str, place: Path | BinaryIO) -> int:
    if not isinstance(place, Path):
        return place.seek(0, os.SEEK_END)
    try:
        return place.stat().st_size
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from None


def _pieces(name: str, place: Path | BinaryIO) -> Iterator[bytes]:
    try:
        with open(place, "rb") if isinstance(place, Path) else nullcontext(place) as file:
            if file is place:  # it may have been read before
                file.seek(0)
            while piece := file.read(PIECE):
                yield piece
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from None


def _decoded(name: str, place: Path | BinaryIO, encoding: str, errors: str) -> Iterator[str]:
    decoder, consumed, first = codecs.getincrementaldecoder(encoding)(errors), 0, True
    for piece in _then_none(_pieces(name, place)):
        waiting = 0
        with suppress(NotImplementedError):  # a decoder of another package may not say what it holds back
            waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece or b"", final=piece is None)
        except UnicodeDecodeError as error:
            raise not_in_encoding(error, name, encoding, consumed - waiting) from None
        except Exception as error:  # Python's rarer codecs raise whatever they like
            raise InputError(f"{name} cannot be read as {encoding!r}: {error or type(error).__name__}") from None
        consumed += len(piece or b"")
        if text and first:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text


def _then_none(pieces: Iterator[bytes]) -> Iterator[bytes | None]:
    yield from pieces
    yield None
