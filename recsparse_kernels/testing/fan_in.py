"""Cases of the fixed fan-in ops, for tests and benches."""

import dataclasses

import torch
from torch import Tensor

from ..ops.fan_in import column_dtype


@dataclasses.dataclass
class FanInCase:
    input: Tensor  # [B, I]
    weight: Tensor  # [O, F]
    indices: Tensor  # [ceil(O / G), F]
    bias: Tensor | None  # [O]
    offsets: Tensor  # [B + 1]
    labels: Tensor  # [nnz]
    group_size: int

    @property
    def layer(self) -> tuple:
        return self.input, self.weight, self.indices, self.bias

    @property
    def positives(self) -> tuple[Tensor, Tensor]:
        return self.offsets, self.labels

    def double(self) -> "FanInCase":
        wide = {
            name: value.double()
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return dataclasses.replace(self, **wide)


def make_case(
    batch: int,
    in_features: int,
    out_features: int,
    fan_in: int,
    group_size: int = 1,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype | None = None,
    positives: int = 4,
    duplicates: bool = True,
    seed: int = 0,
) -> FanInCase:
    """Random layer and batch; rows have 0 to 2 * ``positives`` positives, some given twice.

    ``duplicates``: indices drawn independently, so that a row may hold an input twice.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = -(-out_features // group_size)
    if duplicates:
        indices = torch.randint(0, in_features, (rows, fan_in), generator=generator)
    else:
        indices = torch.rand(rows, in_features, generator=generator).argsort(1)[:, :fan_in].contiguous()
    counts = torch.randint(0, 2 * positives + 1, (batch,), generator=generator) * (out_features > 0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    labels = torch.randint(0, max(out_features, 1), (int(offsets[-1]),), generator=generator)
    labels[1::5] = labels[::5][: labels[1::5].numel()]
    return FanInCase(
        input=torch.randn(batch, in_features, generator=generator).to(dtype),
        weight=(torch.randn(out_features, fan_in, generator=generator) / max(fan_in, 1) ** 0.5).to(dtype),
        indices=indices.to(index_dtype or column_dtype(in_features)),
        bias=torch.randn(out_features, generator=generator).to(dtype) if bias else None,
        offsets=offsets,
        labels=labels,
        group_size=group_size,
    )


def dense_weight(case: FanInCase) -> Tensor:
    """The layer as a dense ``[O, I]`` matrix, differentiable in the weight."""
    columns = case.indices.long().repeat_interleave(case.group_size, 0)[: case.weight.shape[0]]
    dense = case.weight.new_zeros(case.weight.shape[0], case.input.shape[1])
    return dense.scatter_add(1, columns, case.weight)


def multi_hot(case: FanInCase) -> Tensor:
    """The positives as ``[B, O]`` zeros and ones."""
    targets = torch.zeros(case.input.shape[0], case.weight.shape[0], dtype=case.input.dtype)
    rows = torch.arange(targets.shape[0]).repeat_interleave(case.offsets.diff())
    targets[rows, case.labels.long()] = 1
    return targets
