"""The books, and what stands for a device whose steps can be captured.

With CHARRNN_DATA set the books have to be there; without it, tests that need one say so and are skipped.
"""

import os

import pytest
import torch
from lm_problems import Calling

from charrnn_fast.lm import capture, corpora, recordings, training


@pytest.fixture(scope="session")
def time_machine() -> str:
    """The text of The Time Machine."""
    corpus = corpora.load_book("timemachine")
    if corpus.notice:
        if "CHARRNN_DATA" in os.environ:
            pytest.fail(f"CHARRNN_DATA is set and the book is not there: {corpus.notice}")
        pytest.skip("needs The Time Machine: set CHARRNN_DATA to a folder that holds timemachine.txt")
    return corpus.text


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Calling]:
    """Trainers on this CPU take it for a device whose steps can be captured, by `Calling`; those that they made."""
    made: list[Calling] = []

    def make(device: torch.device) -> Calling:
        made.append(Calling())
        return made[-1]

    monkeypatch.setattr(recordings, "CudaGraphRecorder", make)
    monkeypatch.setattr(capture, "why_not_on", lambda device: None)
    monkeypatch.setattr(training, "why_not_optimizer", lambda optimizer: None)
    return made
