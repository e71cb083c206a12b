"""A run's settings as a TOML file: what is read, and what is written, on one page.

Reading needs Python 3.11 or the package tomli. Writing needs nothing: settings are strings, numbers, truth values,
lists of them, and tables of prompts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from charrnn_fast.errors import InputError


def readable() -> bool:
    """Whether this Python can read TOML files."""
    try:
        return bool(_reader())
    except InputError:
        return False


def _reader() -> ModuleType:
    for name in ("tomllib", "tomli"):
        try:
            return __import__(name)
        except ImportError:
            continue
    raise InputError("reading a TOML file needs Python 3.11 or the package tomli: pip install tomli")


def read(path: str | Path) -> dict[str, Any]:
    """The tables and values of a TOML file. Raises InputError if it is missing, or not TOML, with the line."""
    reader = _reader()
    try:
        content = Path(path).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, a byte that is not UTF-8
        raise InputError(f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return reader.loads(content)
    except reader.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None


def write(values: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """A TOML document: plain values first, in their order, then lists of tables; None is left out.

    comments: key -> a comment line before it.
    """
    lines: list[str] = []
    tables: list[str] = []
    for key, value in values.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for table in value:
                tables += ["", f"[[{key}]]", *(f"{k} = {_text(v)}" for k, v in table.items() if v is not None)]
        elif value is not None:
            if comments and key in comments:
                lines += ["", f"# {comments[key]}"] if lines else [f"# {comments[key]}"]
            lines.append(f"{key} = {_text(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    # A TOML basic string is a JSON string but for DEL; half a surrogate pair, which no file can hold, is not written.
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")
