"""kernels/triton/generate_grid.py against the reference: same ids from the same uniforms, whatever the programs.

Without a GPU the kernel is interpreted, a step a launch; test_grid_protocol.py has it in a process for each program.
"""

import importlib
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from generate_problems import DEVICE, Decoder

from charrnn_fast.kernels.triton.generate import generate, generate_reason
from charrnn_fast.kernels.triton.generate_grid import generate_grid, generate_grid_limits
from charrnn_fast.kernels.triton.generate_grid_tiles import GenerateGridTile, why_not_grid
from charrnn_fast.kernels.triton.generate_types import Decoding

TILE = GenerateGridTile(16, 2, 1.0)  # 16 units a program, two warps


def across(*arguments, tile=TILE, steps_per_launch=None, **options):
    """generate's arguments, across the chip."""
    sampled = options["uniforms"] is not None
    sharpness = options.get("alpha", 1.0) / options.get("temperature", 1.0)
    top_k = options.get("top_k") if sampled else None
    call = Decoding(
        *arguments,
        uniforms=options["uniforms"],
        sharpness=struct.unpack("q", struct.pack("d", sharpness))[0],
        top_k=top_k if top_k is None or top_k < arguments[2].shape[0] else None,
        tanh=options["nonlinearity"] == "tanh",
    )
    return generate_grid(call, tile, steps_per_launch)


SAMPLING = (None, {"temperature": 0.6, "top_k": 3}, {"temperature": 1.5, "alpha": 2.0})
# One, two and three programs, the last of them with all of its units and with few; V below and above a power of two.
SHAPES = [
    {"H": 16, "V": 28, "P": 3},
    {"H": 7, "V": 2, "B": 2, "state": False, "head_bias": False},
    {"H": 32, "V": 33, "nonlinearity": "relu"},
    {"H": 33, "V": 90, "B": 2, "P": 2},
    {"H": 47, "V": 65, "P": 2},
    {"H": 24, "V": 30, "L": 2, "B": 2, "P": 2},
    {"H": 17, "V": 90, "L": 3, "nonlinearity": "relu"},
]


CASES = [(shape, SAMPLING[i % 3]) for i, shape in enumerate(SHAPES)] + [(SHAPES[3], SAMPLING[i]) for i in (1, 2)]


@pytest.mark.parametrize(("shape", "sampling"), CASES, ids=str)
def test_ids_and_state_are_the_reference(shape, sampling):
    decoder = Decoder(**shape)
    ids, state = decoder.run(across, 4, sampling is not None, **(sampling or {}))
    wanted, last = decoder.reference(4, sampling is not None, **(sampling or {}))
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    one_program, _ = decoder.run(generate, 4, sampling is not None, **(sampling or {}))
    assert torch.equal(ids, one_program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_and_state_are_fp32(dtype):
    decoder = Decoder(24, 11, B=2, P=2)
    for name in ("table", "head_weight", "head_bias", "state"):
        setattr(decoder, name, getattr(decoder, name).to(dtype).double())
    decoder.weight_hh = [w.to(dtype).double() for w in decoder.weight_hh]
    ids, state = decoder.run(across, 6, True, dtype)
    wanted, last = decoder.reference(6, True)
    assert torch.equal(ids, wanted) and state.dtype == dtype
    torch.testing.assert_close(state, last.to(dtype))


def test_an_id_outside_counts_as_a_zero_row():
    decoder = Decoder(20, 5, P=3)
    decoder.prompt = torch.tensor([[1, -1, 2**40]])
    ids, state = decoder.run(across, 3, False)
    wanted, last = decoder.run(generate, 3, False)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_steps_of_a_launch_are_any_number():
    """By one program, which waits for nobody: what a launch leaves is all that the next one needs."""
    for layers, steps in ((1, 1), (1, 3), (2, 1), (2, 3)):
        decoder = Decoder(13, 40, layers, P=2)
        wanted = decoder.run(across, 3, True, top_k=4)
        found = decoder.run(across, 3, True, top_k=4, steps_per_launch=steps)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


# A process for each program, all steps in one launch, against a step a launch.
PROCESSES = textwrap.dedent("""
    import multiprocessing, os, sys
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    torch.set_num_threads(1)
    sys.path[:0] = sys.argv[1:]
    from generate_problems import Decoder
    from grid_programs import Own, late_announcements, shared
    from test_triton_generate_grid import across
    from charrnn_fast.kernels.triton import generate_grid, generate_grid_kernels

    N, COUNT = 4, 3
    CASES = ((dict(H=48, V=90, P=3), True, {"temperature": 0.7, "top_k": 6}), (dict(H=40, V=20, L=2, P=2), False, {}))

    def program(n, decoder, sampled, options, memory):
        generate_grid.generate_grid_kernel = Own(generate_grid.generate_grid_kernel, n)
        late_announcements(generate_grid_kernels, n)
        generate_grid._shared_memory = lambda *arguments: memory
        decoder.run(across, N, sampled, **options)

    if __name__ == "__main__":
        fork = multiprocessing.get_context("fork")
        own_memory = generate_grid._shared_memory
        for case, sampled, options in CASES:
            decoder = Decoder(**case)
            made = []
            generate_grid._shared_memory = lambda *arguments: made.append(own_memory(*arguments)) or made[-1]
            ids, _ = decoder.run(across, N, sampled, **options)
            L, B = len(decoder.weight_hh), decoder.prompt.shape[0]
            states, partials, _, counters = made[0]
            first = torch.zeros_like(states)
            first[:, 0, :, : case["H"]] = decoder.state.transpose(0, 1)
            memory = [first.share_memory_(), shared(*partials.shape, dtype=partials.dtype)]
            memory += [shared(B, N, dtype=torch.int64, value=-1)]
            memory += [shared(*counters.shape, dtype=torch.int32, value=0)]
            given = [(n, decoder, sampled, options, memory) for n in range(COUNT)]
            processes = [fork.Process(target=program, args=each, daemon=True) for each in given]
            for process in processes:
                process.start()
            for process in processes:
                process.join(100)
                assert process.exitcode == 0, process
            assert not memory[3][0].any(), "a program waited in vain"
            assert memory[3][1:, 0].sum() == COUNT * B * ((case["P"] + N - 1) * L + 1), memory[3]
            assert torch.equal(memory[2], ids), (memory[2], ids)
            assert torch.equal(memory[0], states) and torch.equal(memory[1], partials)
""")


def test_the_kernel_in_a_process_for_each_program(tmp_path):
    script, folder = tmp_path / "decoders.py", Path(__file__).parent
    script.write_text(PROCESSES)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(folder.parent), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


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
            found = decoder.run(across, 60, sampled, dtype, tile=None, **options)
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])

    @pytest.mark.parametrize("H", [256, 512, 1024])
    def test_a_long_text_follows_its_own_choices(self, H):
        """A rounding may move a choice, so each id is held against the exact logits of the text before it."""
        decoder = Decoder(H, 90, 1, 1, P=20)
        ids, _ = decoder.run(across, 2000, False, torch.float32, tile=None)
        text, state = torch.cat((decoder.prompt, ids[:, :-1]), 1), decoder.state[0]
        for step in range(text.shape[1]):
            state = torch.tanh(decoder.table[text[:, step]] + state @ decoder.weight_hh[0].T)
            if step >= 19:
                logits = state @ decoder.head_weight.T + decoder.head_bias
                assert (logits.max() - logits[0, ids[0, step - 19]]) < 1e-3
