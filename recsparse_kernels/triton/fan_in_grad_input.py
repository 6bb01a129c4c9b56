"""Fixed fan-in on Triton: the gradient to the input.

    grad_input[b, i] = sum over (o, f) with indices[o // G, f] = i of grad[o, b] * weight[o, f]

No atomics: a chunk's entries of ``indices`` are sorted by input (stable), and one program owns the sum of
an input, so that the order of the sum depends on the sizes alone. By group, tl.dot first sums over the
labels that share an entry.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Configs
from ._launch import launch
from ._precision import cast, dot
from .fan_in_tiles import Chunk, Tiles

# An input's entries are cut into parts, so that the programs fill a device, but not into short ones.
WANTED_PROGRAMS = 2048
MIN_PART = 256
SUM_CONFIGS = Configs(
    "fan_in_sum",
    {  # BLOCK_E entries are summed side by side
        "16 rows": dict(BLOCK_E=64, BLOCK_B=16, num_warps=4, num_stages=1),
        "many rows": dict(BLOCK_E=16, BLOCK_B=128, num_warps=4, num_stages=1),
    },
)

GROUP_CONFIGS = Configs(
    "fan_in_grad_input",
    {  # BLOCK_O labels are summed by each tl.dot
        "16 rows": dict(BLOCK_O=32, BLOCK_B=16, BLOCK_F=64, num_warps=4, num_stages=2),
        "many rows": dict(BLOCK_O=32, BLOCK_B=64, BLOCK_F=64, num_warps=4, num_stages=2),
    },
)


@triton.jit(do_not_specialize=["labels"])
def _sum_by_input_kernel(
    values_ptr,  # [labels, B], or [rows, F, B] where SHARED
    weight_ptr,  # [labels, F] of the chunk
    order_ptr,  # [rows * F] int64: positions in the chunk's indices, sorted by input
    starts_ptr,  # [I + 1] int64
    sums_ptr,  # [parts, I, B] float32, added to
    B, I, F, G, labels,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # one program: an input x a part of its entries x BLOCK_B rows
    across = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    b = (pid % across) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = ((pid // across) % PARTS).to(tl.int64)
    column = (pid // across // PARTS).to(tl.int64)
    begin = tl.load(starts_ptr + column)
    end = tl.load(starts_ptr + column + 1)
    size = tl.cdiv(end - begin, PARTS)
    begin += part * size
    end = tl.minimum(end, begin + size)
    acc = tl.zeros((BLOCK_E, BLOCK_B), dtype=tl.float32)
    for e0 in range(begin, end, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        entry = tl.load(order_ptr + e, mask=e < end, other=0)
        if SHARED:
            mask = (e < end)[:, None] & (b < B)[None, :]
            acc += tl.load(values_ptr + entry[:, None] * B + b[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            narrow = entry.to(tl.int32)  # a chunk's entries are few: no division of 64 bits
            row = narrow // F
            f = narrow % F
            for member in range(0, G):
                label = row.to(tl.int64) * G + member
                live = (e < end) & (label < labels)
                w = tl.load(weight_ptr + label * F + f, mask=live, other=0.0).to(tl.float32)
                where = values_ptr + label[:, None] * B + b[None, :]
                g = tl.load(where, mask=live[:, None] & (b < B)[None, :], other=0.0)
                acc = tl.fma(tl.broadcast_to(w[:, None], acc.shape), g.to(tl.float32), acc)
    where = sums_ptr + (part * I + column) * B + b
    tl.store(where, tl.load(where, mask=b < B, other=0.0) + tl.sum(acc, axis=0), mask=b < B)


@triton.jit(do_not_specialize=["labels"])
def _sum_over_group_kernel(
    grad_ptr,  # [labels, B] of the chunk: gradient to the logits
    weight_ptr,  # [labels, F] of the chunk
    shared_ptr,  # [rows, F, B]
    B, F, G, labels,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # one program: a group x BLOCK_F of its inputs x BLOCK_B rows
    #   shared[row, f, b] = sum over the labels of the group of weight[label, f] * grad[label, b]
    across = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    b = (pid % across) * BLOCK_B + tl.arange(0, BLOCK_B)
    steps = tl.cdiv(F, BLOCK_F)
    f = (pid // across) % steps * BLOCK_F + tl.arange(0, BLOCK_F)
    row = (pid // across // steps).to(tl.int64)
    acc = tl.zeros((BLOCK_F, BLOCK_B), dtype=tl.float32)
    for begin in range(0, G, BLOCK_O):
        member = begin + tl.arange(0, BLOCK_O)
        label = row * G + member
        inside = (member < G) & (label < labels)
        w = tl.load(
            weight_ptr + label[:, None] * F + f[None, :], mask=inside[:, None] & (f < F)[None, :], other=0.0
        )
        g = tl.load(
            grad_ptr + label[:, None] * B + b[None, :], mask=inside[:, None] & (b < B)[None, :], other=0.0
        )
        acc = dot(tl.trans(w.to(g.dtype)), g, acc)
    where = shared_ptr + (row * F + f)[:, None] * B + b[None, :]
    tl.store(where, cast(acc, shared_ptr.dtype.element_ty), mask=(f < F)[:, None] & (b < B)[None, :])


class InputGradient:
    """Sums the gradient to the input, chunk by chunk of labels."""

    def __init__(self, tiles: Tiles, weight: Tensor):
        self.tiles, device = tiles, weight.device
        # sums over a group, before those over groups; float16 has not the range
        self.shared_dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        self.name = "16 rows" if tiles.batch <= 16 else "many rows"
        self.across = -(-tiles.batch // SUM_CONFIGS[self.name]["BLOCK_B"])
        programs = max(1, tiles.in_features * self.across)
        length = tiles.rows * tiles.fan_in // max(1, tiles.in_features)
        self.parts = max(1, min(8, WANTED_PROGRAMS // programs, length // MIN_PART))
        shape = (self.parts, tiles.in_features, tiles.batch)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)
        dtype = torch.int16 if tiles.in_features <= torch.iinfo(torch.int16).max else torch.int32
        self.bounds = torch.arange(tiles.in_features + 1, dtype=dtype, device=device)

    def add(self, chunk: Chunk, grad: Tensor, weight: Tensor, indices: Tensor) -> None:
        """``grad`` [labels of the chunk, B]; ``weight`` and ``indices`` whole."""
        tiles = self.tiles
        size = tiles.fan_in * chunk.rows
        if size == 0 or tiles.batch == 0:
            return
        own = indices[chunk.first_row : chunk.end_row].flatten()
        keys, order = torch.sort(own.to(torch.promote_types(own.dtype, self.bounds.dtype)), stable=True)
        starts = torch.searchsorted(keys, self.bounds.to(keys.dtype))
        weight = weight[chunk.first_label : chunk.end_label]
        values = grad
        if tiles.grouped:
            values = grad.new_empty((size, tiles.batch), dtype=self.shared_dtype)
            options = GROUP_CONFIGS["16 rows" if tiles.batch <= 16 else "many rows"]
            steps = -(-tiles.fan_in // options["BLOCK_F"])
            launch(
                _sum_over_group_kernel,
                (chunk.rows * steps * -(-tiles.batch // options["BLOCK_B"]),),
                grad, weight, values, tiles.batch, tiles.fan_in, tiles.group_size, chunk.labels,
                **options,
            )  # fmt: skip
        launch(
            _sum_by_input_kernel,
            (tiles.in_features * self.parts * self.across,),
            values, weight, order, starts, self.sums,
            tiles.batch, tiles.in_features, tiles.fan_in, tiles.group_size, chunk.labels,
            SHARED=tiles.grouped, PARTS=self.parts, **SUM_CONFIGS[self.name],
        )  # fmt: skip

    def result(self, dtype: torch.dtype) -> Tensor:
        return self.sums.sum(0).t().to(dtype).contiguous()

    def entry_bytes(self) -> float:
        """Scratch bytes for each label and row."""
        return self.shared_dtype.itemsize * (
            1 + self.tiles.fan_in / self.tiles.group_size * self.tiles.grouped
        )
