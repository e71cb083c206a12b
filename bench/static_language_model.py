"""The character model's kernels as bench/static.py compiles them. Imports Triton alone."""

from .static_cases import TARGETS, TILES_OF, Case, load

# Of d2l's recipe first; then every tile at the largest sizes that it is for.
SIZES = ((32, 28), (32, 32), (32, 97), (64, 28), (64, 64), (64, 128), (128, 28), (128, 32))
NAMES = ("weight_ih", "weight_hh", "head_weight", "bias_ih", "bias_hh", "head_bias")


def language_model_cases(target: str) -> list[Case]:
    """A training step's three kernels: the rows' one by H and V, the others by what an optimizer adds."""
    return [
        *(rows_case(target, *sizes, grads=True) for sizes in SIZES if fits(target, *sizes)),
        rows_case(target, *SIZES[0], grads=False),
        sums_case(target, *SIZES[0], adam=True),
        *(update_case(target, *SIZES[0], adam=adam) for adam in (False, True)),
    ]


def fits(target: str, H: int, V: int) -> bool:
    tile = load("language_model_forms").find_tile(H, V, TILES_OF.get(target, target))
    return tile is not None and tile.head_form(H, V).shared_kb * 1024 <= TARGETS[target][1]


def rows_case(target: str, H: int, V: int, grads: bool) -> Case:
    tile = load("language_model_forms").find_tile(H, V, TILES_OF.get(target, target))
    types: dict[str, str | tuple[str, ...]] = {f"{name}_ptr": "*fp32" for name in (*NAMES, "h0", "h_n")}
    types |= {"states_ptr": "*fp32", "losses_ptr": "*fp32"} | ({"partial_ptr": "*fp32"} if grads else {})
    types |= {"tokens_ptr": "*u8", "targets_ptr": "*u8", "starts_ptr": "*i64"}
    constants = {"GRADS": grads, "F": tile.form(H, V, True), "HEAD": tile.head_form(H, V)}
    constants |= {"stride_tokens_t": 1, "stride_targets_t": 1}
    return Case(
        name=f"language model H{H} V{V} warps{tile.warps} {'training' if grads else 'loss'}",
        target=target,
        module="language_model_kernels",
        kernel="language_model_kernel",
        types=types,
        constants=constants,
        divisible=False,
        options=tile.launch_options(TILES_OF.get(target, target)),
        matrix=False,
        shared=TARGETS[target][1],
        values=(("T", 8), ("B", 4)),
    )


def sums_case(target: str, H: int, V: int, adam: bool) -> Case:
    forms = load("language_model_forms")
    types: dict[str, str | tuple[str, ...]] = {f"grad_{name}_ptr": "*fp32" for name in NAMES}
    types |= {f"{name}_ptr": "*fp32" for name in ("partial", "losses", "loss", "squares", "upstream")}
    types |= {f"step_{i}_ptr": "*fp32" for i in range(6)} if adam else {}
    constants = {"H": H, "V": V, "TRAINED": 63, "BLOCK_P": forms.SUM_PROGRAMS, "BLOCK": forms.SUM_ELEMENTS}
    return _case(target, "sums", f"H{H} V{V}", types, constants, forms.SUM_WARPS, (("programs", 1024),))


def update_case(target: str, H: int, V: int, adam: bool) -> Case:
    forms = load("language_model_forms")
    roles = ("grad", "param", "first", "second", "step") if adam else ("grad", "param")
    types: dict[str, str | tuple[str, ...]] = {f"{role}_{i}_ptr": "*fp32" for role in roles for i in range(6)}
    types |= {"squares_ptr": "*fp32", "norm_ptr": "*fp32"}
    numels = (V * H, H * H, V * H, H, H, V)
    constants = {"NUMELS": numels, "CLIP": True, "ADAM": adam, "BLOCK": forms.UPDATE_ELEMENTS}
    name = f"H{H} V{V} {'Adam' if adam else 'SGD'}"
    return _case(target, "update", name, types, constants, forms.UPDATE_WARPS, (("squares", 90),))


def _case(target: str, step: str, name: str, types, constants, warps: int, values) -> Case:
    options = load("targets").launch_options(warps, TILES_OF.get(target, target))
    module, kernel = "language_model_update_kernels", f"language_model_{step}_kernel"
    options = (constants, False, options, False, 48 * 1024)
    return Case(f"language model {step} {name}", target, module, kernel, types, *options, values=values)
