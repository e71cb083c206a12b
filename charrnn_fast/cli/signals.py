"""SIGINT and SIGTERM during a run: the first finishes the step, the second ends the process at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def finishing(stop: Callable[[str], object]) -> Iterator[list[int]]:
    """Meanwhile a first SIGINT or SIGTERM calls stop(name), and a second one is what it is elsewhere: the end.

    Gives a list that holds the first signal's number once it has come. Signals are the main thread's: in another one,
    nothing is changed.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:  # the process dies of the signal, which is what a shell reports as 130 or 143
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        received.append(number)
        stop(signal.Signals(number).name)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)
