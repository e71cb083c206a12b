"""The command line: charrnn-fast train | generate | evaluate | plot | export | bench | doctor.

Results go to standard output; notices, the progress bar and errors to standard error. Exit codes: 0 done, 2 an error
that the user can mend (one line, no traceback), 130 or 143 stopped by SIGINT or SIGTERM, 1 doctor found something
broken.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

import torch

from charrnn_fast import __version__
from charrnn_fast.cli import bench, decode, doctor, export, plot, train
from charrnn_fast.errors import InputError, TrainingError
from charrnn_fast.lm import distributed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (sys.argv by default); returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal lacks is written as its number
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:  # nobody reads on, as behind `| head`: not an error, and no traceback when Python flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("charrnn-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        rank = "" if distributed.launched() == 1 else f"rank {os.environ['RANK']}: "
        print(f"charrnn-fast: {rank}error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """What an error says, on one line; one that was not written for the user with its type, and how to see more."""
    lines = str(error).splitlines()
    if isinstance(error, InputError | TrainingError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0] if lines else 'without a word'} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="charrnn-fast", description="Train, decode and evaluate character-level Elman RNNs."
    )
    parser.add_argument("--version", action="version", version=f"charrnn-fast {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train.add_parser(commands)
    decode.add_generate_parser(commands)
    decode.add_evaluate_parser(commands)
    plot.add_parser(commands)
    export.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
