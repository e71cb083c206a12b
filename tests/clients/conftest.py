"""A folder with a text and runs on it, where the command lines of a test are run, and two ways to run them."""

import shlex
import shutil
from pathlib import Path

import pytest
from command_line import TEXT, files

from charrnn_fast.cli import main


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "book.txt").write_text(TEXT)
    for run, options in (
        ("run", "--epochs 2"),
        ("raw", "--recipe santa --epochs 2 --layers 2"),
        ("embedded", "--recipe santa --epochs 3 --embedding 5"),
    ):
        text, out = folder / "book.txt", folder / run
        assert main(shlex.split(f"train --text {text} --out {out} --hidden-size 8 -q {options}")) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """The folder in which the test is, its own: book.txt; run, of one layer; raw, of characters as they are and two
    layers; embedded, of such characters and an embedding.
    """
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def says(here, capsys):
    """Runs a command line to its exit code; returns what it printed on standard output, and on standard error."""

    def run(line: str, code: int = 0):
        capsys.readouterr()
        assert main(shlex.split(line)) == code, capsys.readouterr()
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(here, capsys):
    """Runs a command line that ends with exit code 2 and one error of one line, which holds the parts: no traceback, no
    result, and every file is as it was.
    """

    def run(line: str, *parts: str) -> None:
        capsys.readouterr()
        before = files(here)
        try:
            code = main(shlex.split(line))
        except SystemExit as stop:  # argparse's, after the lines on usage
            code = stop.code
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if "error:" in line]
        assert code == 2 and len(errors) == 1 and errors[0].startswith("charrnn-fast"), (code, out, err)
        assert "Traceback" not in out + err and "result" not in out
        assert all(part in errors[0] for part in parts), (parts, errors[0])
        assert files(here) == before

    return run
