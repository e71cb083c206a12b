"""Cases run each in a process of its own, so that one that crashes or hangs is a failed test and no more.

A server that has imported the library and computed nothing forks a child for each case: some milliseconds, where a new
interpreter would take seconds. The child ends without Python's own ending, which may wait for threads that are gone.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class Server:
    """Runs functions of modules in this folder: `call(module, function, *arguments)`, arguments as JSON has them."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, module: str, function: str, *arguments: Any, seconds: int = 120) -> Any:
        """What the function returned; AssertionError with what it printed if it raised, crashed or took too long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([module, function, arguments, seconds]) + "\n")
        self._process.stdin.flush()
        status, result, output = json.loads(self._process.stdout.readline())
        if status != 0:
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else "failed"
            raise AssertionError(f"{function}{tuple(arguments)} {how}\n{output}")
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("TRITON_INTERPRET", "1")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import charrnn_fast

    assert charrnn_fast
    torch.set_num_threads(1)
    for line in sys.stdin:
        module, function, arguments, seconds = json.loads(line)
        importlib.import_module(module)
        answers.write(json.dumps(_in_a_child(module, function, arguments, seconds)) + "\n")
        answers.flush()


def _in_a_child(module: str, function: str, arguments: list[Any], seconds: int) -> tuple[int, Any, str]:
    """(exit status, or minus the signal; what the function returned; what it printed)."""
    reading, writing = os.pipe()
    printed = os.memfd_create("printed") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        signal.alarm(seconds)
        status = 1
        try:
            import torch

            torch.manual_seed(0)
            result = getattr(importlib.import_module(module), function)(*arguments)
            os.write(writing, json.dumps(result).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.lseek(printed, 0, os.SEEK_SET)
    with os.fdopen(printed, errors="replace") as file:
        output = file.read()
    return status, (json.loads(result) if status == 0 else None), output


if __name__ == "__main__":
    _serve()
