"""How a program of the language model kernel lays out its head, and its tiles by size. Imports Triton alone.

A row of the batch is walked in the FMA form of elman_forms.py with one row. The head is in that form too, with `rows`
steps of time as its rows and the classes as its units.
"""

from dataclasses import dataclass

import triton.language as tl

from .elman_forms import Form
from .gluon_interpreter import gl
from .targets import AMD, NVIDIA, TileOfWarps


@dataclass(frozen=True, kw_only=True, repr=False)
class HeadForm(Form):
    """The head's: `hidden` are its V classes, `inputs` the H units."""

    apart: bool = False  # the gradient of W_hh is summed when the walk back is over

    LAYOUTS = (*Form.LAYOUTS, "whole_rows", "whole_states")

    @property
    def state_width(self) -> int:
        """Of a tile of states: the walk's."""
        return padded(self.inputs)

    @property
    def whole_rows(self):
        """Layout of a tile of logits, each row in one warp."""
        return self._rows_in_warps(self.width)

    @property
    def whole_states(self):
        """Layout of a tile of states, as it is loaded."""
        return self._rows_in_warps(self.state_width)

    @property
    def states_shape(self) -> list[int]:
        """Of a tile of states."""
        return [self.rows, self.state_width]

    @property
    def table_shape(self) -> list[int]:
        """Of a table of all classes' rows of units."""
        return [self.width, self.state_width]

    @property
    def shared_kb(self) -> float:
        """What a program has at once at most: the two tables, and two states."""
        return (2 * self.width + 2) * self.state_width * 4 / 1024

    def _rows_in_warps(self, width: int):
        lanes = self.lanes_n * self.lanes_k
        return gl.BlockedLayout([1, max(1, width // lanes)], [1, lanes], [self.warps, 1], [1, 0])


@dataclass(frozen=True)
class Tile(TileOfWarps):
    """One program: a row of the batch at a time."""

    width: int  # the most hidden units and classes that it is for
    warps: int
    targets: tuple[str, ...]
    why: str
    ahead: int = 4  # steps by which input is loaded before it is needed
    lanes: int = 32  # of a warp
    most_hidden: int = 128
    most_classes: int = 128
    apart: bool = False  # see HeadForm
    head_rows: int = 8  # steps that the head takes at a time; a multiple of the warps

    def form(self, hidden: int, classes: int, tanh: bool, one_piece: bool = False) -> Form:
        """The walk's. one_piece: for the interpreter, which handles one operation on a tile in a time of its own."""
        return self._form(Form, hidden, classes, one_piece, rows=1, tanh=tanh)

    def head_form(self, hidden: int, classes: int, one_piece: bool = False) -> HeadForm:
        return self._form(HeadForm, classes, hidden, one_piece, rows=self.head_rows, apart=self.apart)

    def _form(self, kind, units: int, inputs: int, one_piece: bool, **options):
        width = padded(units)
        lanes_n = max(1, min(self.lanes, width // self.warps))
        lanes_k = self.lanes // lanes_n
        if one_piece:
            lanes_n, lanes_k = width, min(width, padded(inputs)) // 4
        return kind(
            hidden=units,
            lanes_n=lanes_n,
            lanes_k=lanes_k,
            warps=1 if one_piece else self.warps,
            dtype=tl.float32,
            inputs=inputs,
            ahead=self.ahead,
            **options,
        )


def padded(size: int) -> int:
    """Units or classes of a tile."""
    return max(32, 1 << (size - 1).bit_length())


TILES = (
    # As the recurrence's of width 32: a warp holds all of each weight. So many steps of the head as Triton 3.6 and 3.9
    # compile without spills.
    Tile(32, 1, ("sm_90",), "as the recurrence's of width 32", ahead=2, head_rows=8),
    Tile(32, 1, ("sm_100",), "as the recurrence's of width 32", ahead=2, head_rows=4),
    Tile(32, 1, ("sm_80",), "as the recurrence's of width 32", ahead=2, head_rows=2),
    Tile(64, 4, NVIDIA, "as the recurrence's of width 64, whose walk back sums as this one does", ahead=2),
    Tile(128, 8, NVIDIA, "as the recurrence's of width 128, for many classes", ahead=2, most_hidden=64),
    Tile(
        128, 8, NVIDIA, "for many units: W_hh and its gradient take all registers", ahead=2, apart=True, most_classes=32
    ),
    Tile(32, 1, AMD, "derived from NVIDIA's tile, 64 lanes a warp", lanes=64, head_rows=4),
    Tile(
        64,
        2,
        AMD,
        "derived from NVIDIA's tile: with more than 32 classes it spills",
        ahead=2,
        lanes=64,
        most_classes=32,
    ),
)


def find_tile(hidden: int, classes: int, target: str) -> Tile | None:
    """The entry for these sizes, or None if no program can hold them."""
    width = max(padded(hidden), padded(classes))
    fitting = [tile for tile in TILES if width <= tile.width and target in tile.targets]
    return next((tile for tile in fitting if hidden <= tile.most_hidden and classes <= tile.most_classes), None)


# Of the kernels that add up and update (language_model_update_kernels.py): partial sums and elements at a time, as of
# the recurrence's own sums, and elements of a parameter.
SUM_PROGRAMS, SUM_ELEMENTS, SUM_WARPS = 256, 32, 8
UPDATE_ELEMENTS, UPDATE_WARPS = 1024, 4
