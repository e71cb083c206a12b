"""The books. With CHARRNN_DATA set they have to be there; without it, tests that need one say so and are skipped."""

import os

import pytest

from charrnn_fast.lm import corpora


@pytest.fixture(scope="session")
def time_machine() -> str:
    """The text of The Time Machine."""
    corpus = corpora.load_book("timemachine")
    if corpus.notice:
        if "CHARRNN_DATA" in os.environ:
            pytest.fail(f"CHARRNN_DATA is set and the book is not there: {corpus.notice}")
        pytest.skip("needs The Time Machine: set CHARRNN_DATA to a folder that holds timemachine.txt")
    return corpus.text
