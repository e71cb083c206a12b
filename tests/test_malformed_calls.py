"""Thousands of random calls of the Python API, malformed and well-formed: torch's results, or its errors.

`pytest -m slow` has the long form. Each part runs in a process of its own, so that a crash or a hang fails a test.
"""

import malformed
import pytest

SEED = 0
CALLS = 4000  # by default; the long form brings all kinds of malformed inputs together to a million
AT_A_TIME = 1000


@pytest.mark.parametrize("part", range(CALLS // AT_A_TIME))
def test_calls_are_torchs_or_refused(server, part):
    _run(server, part)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_many_more_calls_are_torchs_or_refused(server):
    differences = []  # of all parts: who mends the first wants to know the others
    for part in range(CALLS // AT_A_TIME, 400):
        try:
            _run(server, part)
        except AssertionError as error:
            differences.append(str(error))
    assert not differences, "\n".join(differences)


def _run(server, part: int) -> None:
    tried = server.call("calls", "run", SEED, part * AT_A_TIME, AT_A_TIME, seconds=600)
    for name, count in tried.items():
        malformed.count(f"random calls of {name}", count)
