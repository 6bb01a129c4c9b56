"""Fixed fan-in on Triton: how labels and rows are cut into tiles, and the logits of one tile.

    z[o, b] = sum_f weight[o, f] * input[b, indices[o // G, f]] + bias[o]

Tiles are labels x rows, [BLOCK_O, BLOCK_B], with the rows innermost: the input is read transposed,
[I, B], so that what one index asks for is contiguous. Two ways to a tile:

    by label    G < 8: one fused multiply-add for each (label, row, f); a tile holds BLOCK_O labels
    by group    G >= 8: the F inputs of a group are gathered once, then tl.dot; a tile holds labels of
                one group, which has ``tiles_of_group`` of them

An index out of range reads zero.
"""

import dataclasses

import triton.language as tl
from torch import Tensor

from ..config import get_check_indices
from . import _launch
from ._configs import Configs
from ._device import device_function
from ._launch import NO_SPILL
from ._precision import dot

GROUPED_FROM = 8  # labels of a group, from which half-empty tiles of tl.dot (16 rows) still win
UNROLL = 4  # inputs whose loads are in flight at once, by label
SCRATCH_BYTES = 2**28  # of a chunk: its dozen launches take less than the bytes do
SCRATCH_ENTRIES = 2**22  # indices sorted at once: 10 bytes each, and as much again inside the sort

# By label, the tile is as narrow as the batch: 4096 products in flight. By group, BLOCK_F inputs are
# gathered for each tl.dot.
CONFIGS = Configs(
    "fan_in",
    {
        "label, 1 row": dict(BLOCK_O=256, BLOCK_B=1, BLOCK_F=16, num_warps=4, num_stages=1),
        "label, 4 rows": dict(BLOCK_O=256, BLOCK_B=4, BLOCK_F=16, num_warps=4, num_stages=1),
        "label, 16 rows": dict(BLOCK_O=128, BLOCK_B=16, BLOCK_F=16, num_warps=4, num_stages=1),
        "label, many rows": dict(BLOCK_O=64, BLOCK_B=64, BLOCK_F=16, num_warps=8, num_stages=1, **NO_SPILL),
        "group of 16, 16 rows": dict(BLOCK_O=16, BLOCK_B=16, BLOCK_F=64, num_warps=1, num_stages=3),
        "group of 16, many rows": dict(BLOCK_O=16, BLOCK_B=64, BLOCK_F=64, num_warps=4, num_stages=3),
        "group of 32, 16 rows": dict(BLOCK_O=32, BLOCK_B=16, BLOCK_F=64, num_warps=2, num_stages=3),
        "group of 32, many rows": dict(BLOCK_O=32, BLOCK_B=64, BLOCK_F=64, num_warps=4, num_stages=3),
        "group of 64, 16 rows": dict(BLOCK_O=64, BLOCK_B=16, BLOCK_F=64, num_warps=4, num_stages=3),
        "group of 64, many rows": dict(BLOCK_O=64, BLOCK_B=64, BLOCK_F=64, num_warps=4, num_stages=3),
    },
)


def config_name(batch: int, group_size: int) -> str:
    if group_size < GROUPED_FROM:
        rows = next((r for r in (1, 4, 16) if batch <= r), None)
        return f"label, {rows} row{'s' if rows > 1 else ''}" if rows else "label, many rows"
    labels = next((n for n in (16, 32) if group_size <= n), 64)
    return f"group of {labels}, {'16' if batch <= 16 else 'many'} rows"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a layer and a batch, and the tiles they are cut into."""

    batch: int
    in_features: int
    out_features: int
    fan_in: int
    group_size: int

    @property
    def grouped(self) -> bool:
        return self.group_size >= GROUPED_FROM

    @property
    def config(self) -> dict:
        return CONFIGS[config_name(self.batch, self.group_size)]

    @property
    def rows(self) -> int:
        """Rows of indices."""
        return -(-self.out_features // self.group_size)

    @property
    def block(self) -> int:
        """Labels of a tile."""
        return self.config["BLOCK_O"]

    @property
    def tiles_of_group(self) -> int:
        return -(-self.group_size // self.block)

    @property
    def across(self) -> int:
        """Tiles over the batch."""
        return -(-self.batch // self.config["BLOCK_B"])

    @property
    def count(self) -> int:
        """Tiles over the labels."""
        return self.tile_of(self.out_features - 1) + 1 if self.out_features else 0

    def tile_of(self, label):
        """The tile of a label: of an int or of each in a tensor."""
        if not self.grouped:
            return label // self.block
        row = label // self.group_size
        return row * self.tiles_of_group + (label - row * self.group_size) // self.block

    @property
    def sizes(self) -> tuple[int, ...]:
        """What `logits_tile` takes."""
        return (
            self.batch, self.in_features, self.out_features, self.fan_in, self.group_size, self.tiles_of_group,
        )  # fmt: skip

    def options(self, weight: Tensor, bias: Tensor | None) -> dict:
        """Constants of the kernels built on `logits_tile`, and how to launch them."""
        config = dict(self.config)
        if weight.element_size() == 4:  # no tensor cores: tl.dot holds BLOCK_F operands in registers
            config["BLOCK_F"], config["num_stages"] = 16, min(2, config["num_stages"])
        return {
            **config, "UNROLL": UNROLL,
            "GROUPED": self.grouped, "HAS_BIAS": bias is not None,
        }  # fmt: skip

    def chunks(self, budget: int, entry_bytes: float = 4) -> list["Chunk"]:
        """Ranges of whole rows of indices whose scratch stays within ``budget`` bytes."""
        rows = min(int(budget / max(1, self.batch * self.group_size * entry_bytes)), self.rows)
        rows = max(1, min(rows, SCRATCH_ENTRIES // max(1, self.fan_in)))
        if not self.grouped:  # a chunk begins where a tile does
            rows = max(self.block, rows // self.block * self.block)
        return [Chunk(self, begin, min(begin + rows, self.rows)) for begin in range(0, self.rows, rows)]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A range of rows of indices, with the labels that read them."""

    tiles: Tiles
    first_row: int
    end_row: int

    @property
    def rows(self) -> int:
        return self.end_row - self.first_row

    @property
    def first_label(self) -> int:
        return self.first_row * self.tiles.group_size

    @property
    def end_label(self) -> int:
        return min(self.end_row * self.tiles.group_size, self.tiles.out_features)

    @property
    def labels(self) -> int:
        return self.end_label - self.first_label

    @property
    def first_tile(self) -> int:
        return self.tiles.tile_of(self.first_label)

    @property
    def tile_count(self) -> int:
        return self.tiles.tile_of(self.end_label - 1) + 1 - self.first_tile


def scratch_budget(*tensors: Tensor | None) -> int:
    """Bytes of scratch beside these inputs and outputs: no more than they hold, within limits."""
    held = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return min(SCRATCH_BYTES, max(2**20, held))


def unchecked() -> bool:
    """Are the values of indices left alone: by the user's choice, or since nothing runs."""
    return get_check_indices() == "none" or _launch._recorded is not None


# ---- inside kernels ----


@device_function
def tile_labels(tile, O, G, tiles_of_group, GROUPED: tl.constexpr, BLOCK_O: tl.constexpr):
    """Labels of a tile, and which of them exist: [BLOCK_O] int64, bool."""
    lane = tl.arange(0, BLOCK_O)
    if GROUPED:
        row = tile // tiles_of_group
        within = (tile - row * tiles_of_group) * BLOCK_O + lane
        label = row * G + within
        inside = (within < G) & (label < O)
    else:
        label = tile * BLOCK_O + lane
        inside = label < O
    return label, inside


@device_function
def load_inputs(input_ptr, col, live, b, B, I):
    """input[b, col] for each pair, from [I, B]; zero where ``col`` is out of range."""
    live = live & (col >= 0) & (col < I)
    where = input_ptr + col.to(tl.int64)[:, None] * B + b[None, :]
    return tl.load(where, mask=live[:, None] & (b < B)[None, :], other=0.0)


@device_function
def logits_tile(
    input_ptr,  # [I, B]
    weight_ptr,  # [O, F]
    indices_ptr,  # [ceil(O / G), F]
    bias_ptr,  # [O]
    tile,  # int64
    b,  # [BLOCK_B]
    B, I, O, F, G, tiles_of_group,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, UNROLL: tl.constexpr,
    GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_O, BLOCK_B] float32 of a tile, its labels, and which of them exist."""
    label, inside = tile_labels(tile, O, G, tiles_of_group, GROUPED, BLOCK_O)
    z = tl.zeros((BLOCK_O, BLOCK_B), dtype=tl.float32)
    if GROUPED:
        row = tile // tiles_of_group
        for f0 in range(0, F, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            col = tl.load(indices_ptr + row * F + f, mask=f < F, other=-1)
            x = load_inputs(input_ptr, col, f < F, b, B, I)
            w = tl.load(
                weight_ptr + label[:, None] * F + f[None, :],
                mask=inside[:, None] & (f < F)[None, :],
                other=0.0,
            )
            z = dot(w, x, z)
    else:
        row = label // G
        zero = tl.zeros((BLOCK_O,), dtype=tl.int32)
        for f0 in range(0, F, UNROLL):
            for u in tl.static_range(UNROLL):
                f = zero + (f0 + u)
                live = inside & (f < F)
                col = tl.load(indices_ptr + row * F + f, mask=live, other=-1)
                w = tl.load(weight_ptr + label * F + f, mask=live, other=0.0).to(tl.float32)
                mask = ((col >= 0) & (col < I))[:, None] & (b < B)[None, :]
                x = tl.load(input_ptr + col.to(tl.int64)[:, None] * B + b[None, :], mask=mask, other=0.0)
                z = tl.fma(tl.broadcast_to(w[:, None], z.shape), x.to(tl.float32), z)
    if HAS_BIAS:
        z += tl.load(bias_ptr + label, mask=inside, other=0.0).to(tl.float32)[:, None]
    return z, label, inside
