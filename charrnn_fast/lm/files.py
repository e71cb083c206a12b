"""Files that are whole or absent at every moment: written beside their place, on the disk, then moved there."""

import os
from contextlib import suppress
from pathlib import Path

from charrnn_fast.errors import InputError


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Make or replace a file. Raises InputError if that fails; the old file is then untouched.

    The new file, and the folder that now names it, are on the disk when this returns.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {what} {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed have left beside the files of a folder."""
    with suppress(OSError):
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the folder's entries on the disk, where the system can open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
