"""Each operation on each kind of tensor and in each kind of surroundings: torch's own result or its own error, forward
and backward. A crash is one failed test, as everything runs in child processes.
"""

import malformed
import pytest
import surroundings
import unusual

# Tracing with symbols unrolls torch's RNN with a guard at each step: some 10 s for two layers.
TAKES_LONG = pytest.mark.slow
PLACES = [
    pytest.param(around, name, marks=TAKES_LONG if around == "make_fx of symbols" and "loss" not in name else ())
    for around in surroundings.SURROUNDINGS
    for name in unusual.OPERATIONS
]


@pytest.mark.parametrize(("around", "name"), PLACES)
def test_every_kind_of_tensors_and_surroundings(server, around, name):
    tried = server.call("surroundings", "every_kind", around, name)
    if around in ("operands", "gradients"):
        malformed.count("operands and gradients of unusual kinds", tried)


@pytest.mark.parametrize("parts", [[], ["rnn"], ["head"], ["rnn", "head"]], ids=str)
@pytest.mark.parametrize("method", ["forward", "loss", "generate_ids"])
def test_fully_sharded_models(server, method, parts):
    server.call("surroundings", "fully_sharded", method, parts)
