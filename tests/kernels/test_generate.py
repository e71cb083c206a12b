"""Every backend's decoder against the reference: the same ids from the same uniforms, whatever the programs.

Without a GPU the Triton kernels are interpreted (tests/conftest.py), with one they run on it; C runs by each
instruction set. What one alone has is in test_triton_generate.py, test_triton_generate_grid.py and test_native_ops.py.
"""

import needs
import pytest
import torch
from generate_problems import Decoder, across

from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton.generate import generate

SAMPLING = (None, {}, {"temperature": 0.6, "top_k": 3}, {"temperature": 1.5, "alpha": 2.0, "top_k": 1000})
# One program has H resident, in one tile, odd; a grid one, two and three programs, the last of them with all of its
# units and with few; V below and above a power of two.
SHAPES = [
    {"H": 1, "V": 2},
    {"H": 7, "V": 33, "P": 5},
    {"H": 33, "V": 28, "B": 2, "nonlinearity": "relu"},
    {"H": 24, "V": 3, "L": 2, "B": 2, "P": 2},
    {"H": 16, "V": 17, "L": 3, "state": False, "head_bias": False},
    {"H": 16, "V": 28, "P": 3},
    {"H": 7, "V": 2, "B": 2, "state": False, "head_bias": False},
    {"H": 32, "V": 33, "nonlinearity": "relu"},
    {"H": 33, "V": 90, "B": 2, "P": 2},
    {"H": 47, "V": 65, "P": 2},
    {"H": 24, "V": 30, "L": 2, "B": 2, "P": 2},
    {"H": 17, "V": 90, "L": 3, "nonlinearity": "relu"},
]
CASES = [(shape, SAMPLING[i % 4]) for i, shape in enumerate(SHAPES)]
CASES += [
    (shape, sampling) for shape in (SHAPES[3], SHAPES[8]) for sampling in SAMPLING if (shape, sampling) not in CASES
]
NOT_ACROSS = pytest.mark.parametrize("run", ["triton", *needs.ISAS], indirect=True)


def running(launch, device=needs.DEVICE):
    """Runs a decoder: (decoder, number of ids, whether they are sampled, dtype=torch.float64, **options)."""
    return lambda decoder, *arguments, **options: decoder.run(launch, *arguments, device=device, **options)


run = needs.each_backend(triton=running(generate), grid=running(across), native=running(native.generate, needs.CPU))


@pytest.mark.parametrize(("shape", "sampling"), CASES, ids=str)
def test_ids_and_state_are_the_reference(run, shape, sampling):
    decoder, sampled, options = Decoder(**shape), sampling is not None, sampling or {}
    ids, state = run(decoder, 5, sampled, **options)
    wanted, last = decoder.reference(5, sampled, **options)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@NOT_ACROSS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"temperature": 0.3}, {"temperature": 1.0, "top_k": 4}, {"alpha": 2.0}], ids=str)
def test_one_seed_gives_one_text_on_every_backend(run, seed, options):
    """And in every dtype: fp32's rounding is too small to move a choice in so few."""
    decoder = Decoder(20, 28, B=2, P=3, seed=seed)
    wanted, last = decoder.reference(12, True, **options)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        ids, state = run(decoder, 12, True, dtype, **options)
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(state.double(), last, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_and_state_are_fp32(run, dtype):
    decoder = Decoder(24, 11, B=2, P=2).rounded_to(dtype)
    ids, state = run(decoder, 8, True, dtype)
    wanted, last = decoder.reference(8, True)
    assert torch.equal(ids, wanted) and state.dtype == dtype
    torch.testing.assert_close(state, last.to(dtype))


@NOT_ACROSS
def test_no_sequences(run):
    ids, state = run(Decoder(8, 5, L=2, B=0, P=2), 3, False)
    assert ids.shape == (0, 3) and state.shape == (2, 0, 8)


@NOT_ACROSS
def test_what_is_refused(run):
    decoder = Decoder(8, 5, P=2)
    for options in ({"temperature": 0.0}, {"alpha": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="expected temperature > 0"):
            run(decoder, 3, True, **options)
    decoder.prompt = decoder.prompt[:, :0]
    with pytest.raises(ValueError, match="at least one id"):
        run(decoder, 3, False)


@pytest.mark.parametrize("run", ["triton", "grid"], indirect=True)
def test_an_id_outside_counts_as_a_zero_row(run):
    decoder = Decoder(20, 5, P=3)
    decoder.prompt = torch.tensor([[1, -1, 2**40]])
    ids, state = run(decoder, 3, False)
    decoder.table = torch.cat((decoder.table, torch.zeros(1, 20)))
    decoder.head_weight = torch.cat((decoder.head_weight, torch.zeros(1, 20)))
    decoder.head_bias = torch.cat((decoder.head_bias, torch.tensor([-1e9])))
    decoder.prompt = torch.tensor([[1, 5, 5]])
    wanted, last = decoder.reference(3, False)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
