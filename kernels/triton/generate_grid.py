"""Launcher of the decoder across the chip (generate_grid_kernels.py: the algorithm; generate_grid_tiles.py: a choice).

How many teams run at once, what happens where none does and CHARRNN_GRID_DEBUG are as in elman_grid.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .elman_grid import launch_teams, new_counters
from .generate_grid_kernels import GenerateForm, generate_grid_kernel, grid_form
from .generate_grid_tiles import GenerateGridTile, grid_tile, grid_us, one_program_us, why_not_grid
from .generate_types import Decoding
from .launch import TYPES, processors_of, target_of


def generate_grid_limits(
    hidden_size: int, vocab: int, num_layers: int, batch: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """None if the decoder goes across the chip, else one clause that says why not."""
    if device.type not in ("cpu", "cuda"):
        return f"no grid of programs on device type {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 12:
        return "the tiles of a grid have not been compiled for consumer Blackwell"
    sizes = (hidden_size, vocab, num_layers, batch, dtype.itemsize)
    return why_not_grid(*sizes, target_of(device)[0], processors_of(device))


def generate_grid_reason(
    hidden_size: int, num_layers: int, batch: int, dtype: torch.dtype, device: torch.device
) -> str:
    """How it goes across the chip, for sizes that generate_grid_limits allows."""
    tile = grid_tile(hidden_size, max(dtype.itemsize, 4), num_layers)
    if tile is None:
        raise ValueError(f"no grid of programs for hidden size {hidden_size} in {dtype}")
    ours = grid_us(tile, hidden_size, batch, processors_of(device), num_layers)
    resident = (2 * num_layers - 1) * hidden_size * tile.units * max(dtype.itemsize, 4)
    exchanges = "one exchange" if num_layers == 1 else f"{num_layers} exchanges"
    programs, theirs = tile.programs(hidden_size), one_program_us(hidden_size, dtype.itemsize, num_layers)
    return (
        f"a grid by FMA: {programs} programs of {tile.warps} warps a sequence, each with {tile.units} rows of the "
        f"layers' weights ({resident} bytes) in registers, {exchanges} an id "
        f"(predicted {ours:.1f} us an id, one program at least {theirs:.1f})"
    )


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One contiguous tensor of all layers, or None of no layer."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) == 1:
        return present[0].contiguous()
    return torch.stack(present) if present else None


def _shared_memory(call: Decoding, form: GenerateForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the programs exchange: states, with the first ones in place, and partial logits; the ids; the counters."""
    B, device = len(call.prompt), call.table.device
    partials = torch.empty((B, 2, form.programs, form.block_v), dtype=call.acc_type, device=device)
    return call.new_states(form.width), partials, call.new_ids(), new_counters(B, form, device)


def generate_grid(
    call: Decoding,
    tile: GenerateGridTile | None = None,
    steps_per_launch: int | None = None,
    one_by_one: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """As generate.generate, by a team of programs for each sequence; None if no team runs at once.

    tile: instead of the table's. steps_per_launch: how many steps a launch makes, of L an id, None for all; 1 lets the
    programs run in any order. one_by_one: whether that is done where no team runs at once. Interpreted none of two
    programs does.
    Raises RuntimeError where there is no tile.
    """
    (B, P, V, H, L), N, top_k = call.sizes, call.num_tokens, call.top_k
    device, dtype = call.table.device, call.table.dtype
    tile = tile or grid_tile(H, max(dtype.itemsize, 4), L)
    if tile is None:
        raise RuntimeError(f"generate_grid: no tile for hidden size {H} and {L} layers in {dtype}")
    chosen = {"sample": call.uniforms is not None, "top_k": top_k is not None}
    form = grid_form(tile, H, V, TYPES[dtype], **chosen, tanh=call.tanh, layers=L)
    states, partials, ids, counters = _shared_memory(call, form)
    pointers = (
        call.prompt.to(torch.int64).contiguous(),
        call.table.contiguous(),
        _stacked(call.weight_hh),
        _stacked(call.weight_ih[1:]),
        _stacked(call.bias[1:]),
        call.head_weight.contiguous(),
        None if call.head_bias is None else call.head_bias.contiguous(),
        None if call.uniforms is None else call.uniforms.to(torch.float64).contiguous(),
        states,
        partials,
        ids,
        counters,
    )
    done = launch_teams(
        generate_grid_kernel,
        lambda *launch: (*pointers, P, N, V, top_k or 0, call.sharpness, *launch),
        B,
        (P + N - 1) * L + 1,
        steps_per_launch,
        counters,
        form,
        tile.launch_options(target_of(device)[0]),
        "the decoder",
        one_by_one,
    )
    return (ids, call.last_state(states)) if done else None
