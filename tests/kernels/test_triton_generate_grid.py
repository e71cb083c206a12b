"""What the decoder across the chip (kernels/triton/generate_grid.py) has alone: launches, when it is chosen;
test_generate.py has what all decoders have.

Without a GPU the kernel is interpreted, a step a launch; test_grid_protocol.py has it in a process for each program.
"""

import importlib
import struct

import pytest
import torch
from comparisons import same
from generate_problems import Decoder, across
from needs import DEVICE

from charrnn_fast.kernels.triton.generate import generate, generate_reason
from charrnn_fast.kernels.triton.generate_grid import generate_grid, generate_grid_limits
from charrnn_fast.kernels.triton.generate_grid_tiles import why_not_grid


def test_steps_of_a_launch_are_any_number():
    """By one program, which waits for nobody: what a launch leaves is all that the next one needs."""
    for layers, steps in ((1, 1), (1, 3), (2, 1), (2, 3)):
        decoder = Decoder(13, 40, layers, P=2)
        wanted = decoder.run(across, 3, True, top_k=4)
        assert same(decoder.run(across, 3, True, top_k=4, steps_per_launch=steps), wanted)


# When it is chosen.


def test_what_goes_across_the_chip():
    sizes = {"hidden_size": 512, "vocab": 90, "num_layers": 1, "batch": 1, "itemsize": 4}

    def why_not(target="sm_90", processors=132, **changed):
        return why_not_grid(**(sizes | changed), target=target, processors=processors)

    for allowed in (
        {},
        {"batch": 16},
        {"hidden_size": 256, "batch": 8},
        {"itemsize": 2},
        {"hidden_size": 2000},
        {"vocab": 128},
    ):
        assert why_not(**allowed) is None, allowed
    for changed, why in (
        ({"num_layers": 3}, "no grid of programs for hidden size 512 and 3 layers in 32 bits"),
        ({"vocab": 129}, "vocabulary 129"),
        ({"hidden_size": 2049}, "no grid of programs for hidden size 2049 in 32 bits"),
        ({"itemsize": 8}, "in 64 bits"),
        ({"target": "gfx942"}, "on this GPU"),
        ({"hidden_size": 255}, "not timed"),
        (
            {"hidden_size": 256, "itemsize": 2},
            "not known to be faster: 2.2 us an id predicted, one program at least 1.6",
        ),
        ({"hidden_size": 256, "batch": 9}, "not known to be faster: 4.5 us an id predicted, one program at least 3.1"),
        ({"batch": 17}, "11.8 us an id predicted, one program at least 12.0"),
        ({"hidden_size": 256, "target": "sm_100", "processors": 148}, "not known to be faster"),
        ({"hidden_size": 2048, "target": "sm_80", "processors": 108}, "128 programs do not run at once"),
    ):
        assert why in why_not(**changed), changed


def test_the_reason_says_programs_and_what_is_resident():
    cpu = torch.device("cpu")
    assert generate_grid_limits(512, 90, 1, 1, torch.float32, cpu) is None
    reason = generate_reason(512, 90, 1, 1, torch.float32, cpu)
    assert "32 programs of 4 warps a sequence, each with 16 rows of the layers' weights (32768 bytes)" in reason
    assert "in registers, one exchange an id (predicted 2.4 us an id, one program at least 12.0)" in reason
    assert "(98304 bytes) in registers, 2 exchanges an id" in generate_reason(512, 90, 2, 1, torch.float32, cpu)
    assert "one program a sequence; vocabulary 200" in generate_reason(512, 200, 1, 1, torch.float32, cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the team runs")
def test_where_no_team_runs_at_once_one_program_decodes(monkeypatch):
    """The interpreter runs one program after another; a driver says so of a GPU that is shared or too small."""
    module = importlib.import_module("charrnn_fast.kernels.triton.generate")
    asked = []

    def noted(*arguments, **options):
        asked.append(generate_grid(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr(module, "generate_grid", noted)
    decoder = Decoder(256, 20, P=2)
    ids, _ = decoder.run(generate, 2, True, torch.float32, top_k=4)
    assert asked == [None]
    assert torch.equal(ids, decoder.reference(2, True, top_k=4)[0])
    monkeypatch.setattr(module, "generate_grid", lambda *arguments, **options: (arguments, options))
    (call,), options = generate(
        *(decoder.prompt, 2, torch.zeros(20, 256), [None], [torch.zeros(256, 256)], [None], torch.zeros(20, 256)),
        uniforms=torch.zeros(1, 2),
        top_k=20,
        temperature=0.5,
    )
    assert call.num_tokens == 2 and call.weight_hh[0].shape == (256, 256) and call.prompt is decoder.prompt
    assert call.sharpness == struct.unpack("q", struct.pack("d", 2.0))[0]
    assert call.top_k is None and call.tanh and call.uniforms is not None and options == {"one_by_one": False}


def test_no_tile():
    with pytest.raises(RuntimeError, match=r"no tile for hidden size 20 and 1 layers in torch\.float64"):
        Decoder(20, 5).run(across, 2, False, tile=None)


@pytest.mark.gpu
class TestOnDevice:
    @pytest.fixture(autouse=True)
    def say_who_waits_in_vain(self, monkeypatch):
        monkeypatch.setenv("CHARRNN_GRID_DEBUG", "1")

    @pytest.mark.parametrize("B", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("H", "L"), [(200, 1), (256, 4), (384, 1), (512, 1), (512, 2), (1000, 1), (2048, 1)])
    @pytest.mark.parametrize("sampled", [False, True])
    def test_all_steps_in_one_launch(self, H, L, dtype, B, sampled):
        """Bit for bit a step a launch, where nobody waits, and again and again."""
        if H == 2048 and torch.cuda.get_device_properties(DEVICE).multi_processor_count < 128:
            pytest.skip("the device is too small for a team")
        decoder = Decoder(H, 90, L, B, P=20)
        options = {"temperature": 0.7, "top_k": 30} if sampled else {}
        wanted = decoder.run(across, 60, sampled, dtype, tile=None, steps_per_launch=1, **options)
        for _ in range(20):
            assert same(decoder.run(across, 60, sampled, dtype, tile=None, **options), wanted)
