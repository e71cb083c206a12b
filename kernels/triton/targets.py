"""The GPUs that the tile tables know, and the compiler options of every launch. Imports the standard library alone."""

NVIDIA = ("sm_80", "sm_90", "sm_100")
AMPERE_HOPPER = ("sm_80", "sm_90")
BLACKWELL = ("sm_100",)
AMD = ("gfx942",)


def launch_options(warps: int, target: str, stages: int = 1, all_registers: bool = True) -> dict[str, object]:
    """Compiler options of a kernel.

    target: one of the above, or "" for another GPU, which gets what every compiler knows. stages: of the software
    pipeline over loops. Products and sums are fused whatever a Triton's default is (3.10 changes it). all_registers:
    of NVIDIA's, up to 8 warps: left alone, ptxas spills a few bytes to reach a rounder number.
    """
    options: dict[str, object] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return options | {"maxnreg": 255} if all_registers and target in NVIDIA else options


class TileOfWarps:
    """A tile that is launched with its number of warps."""

    warps: int

    def launch_options(self, target: str) -> dict[str, object]:
        return launch_options(self.warps, target)

    @property
    def programs_per_core(self) -> int:
        """How many programs one multiprocessor holds, going by registers."""
        return max(1, 8 // self.warps)
