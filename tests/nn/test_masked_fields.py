"""Many tables in one packed table: `MaskedFields` against its dense tables, one after the other."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import recsparse_kernels as rk
from recsparse_kernels.nn import MaskedFields
from recsparse_kernels.testing import backends

ROWS, DIM, BATCH = (40, 1, 13), 10, 6


def dense_tables(mode="sum") -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode=mode) for rows in ROWS)


def bags(seed=1) -> tuple[list, list]:
    """For each field, rows and where each bag begins; some bags are empty."""
    generator = torch.Generator().manual_seed(seed)
    inputs, offsets = [], []
    for rows in ROWS:
        counts = torch.randint(0, 4, (BATCH,), generator=generator)
        inputs.append(torch.randint(0, rows, (int(counts.sum()),), generator=generator))
        offsets.append(counts.cumsum(0) - counts)
    return inputs, offsets


def one_after_the_other(tables, inputs, offsets, weights=None) -> torch.Tensor:
    weights = weights or [None] * len(ROWS)
    return torch.stack([t(*each) for t, *each in zip(tables, inputs, offsets, weights, strict=True)], 1)


class Lookups(TorchDispatchMode):
    """Counts the bag ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "masked_embedding_bag" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", backends("masked_embedding_bag"), indirect=True)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_every_form_of_input_equals_the_tables(mode, backend):
    layer = MaskedFields.from_dense(dense_tables(mode), density=0.4)
    tables, (inputs, offsets) = layer.to_dense(), bags()
    wanted = one_after_the_other(tables, inputs, offsets)
    with Lookups() as lookups:
        torch.testing.assert_close(layer(inputs, offsets), wanted)
    assert len(lookups.names) == 1  # all tables at once
    torch.testing.assert_close(layer(inputs, torch.stack(offsets)), wanted)
    sizes = torch.tensor([0] + [len(i) for i in inputs]).cumsum(0)
    joined = torch.cat([o + before for o, before in zip(offsets, sizes[:-1], strict=True)])
    flat = torch.cat(inputs)
    torch.testing.assert_close(layer(flat, joined), wanted)
    torch.testing.assert_close(layer(flat.int(), torch.cat([joined, sizes[-1:]]).int()), wanted)
    one_each = torch.stack([torch.randint(0, rows, (BATCH,)) for rows in ROWS], 1)
    wanted = torch.stack([t(one_each[:, k : k + 1]) for k, t in enumerate(tables)], 1)
    torch.testing.assert_close(layer(one_each), wanted)


@pytest.mark.parametrize("backend", backends("masked_embedding_bag"), indirect=True)
def test_gradients_with_weights_of_samples(backend):
    layer = MaskedFields.from_dense(dense_tables(), density=0.4)
    tables, (inputs, offsets) = layer.to_dense(), bags()
    weights = [torch.rand(len(rows)) for rows in inputs]
    grad = torch.randn(BATCH, len(ROWS), DIM)
    layer(inputs, offsets, weights).backward(grad)
    one_after_the_other(tables, inputs, offsets, weights).backward(grad)
    wanted = torch.cat([t.weight.grad for t in tables])[layer.bag.mask]
    torch.testing.assert_close(layer.bag.values.grad, wanted)
    one_each = torch.zeros(BATCH, len(ROWS), dtype=torch.int64)
    weight = torch.rand(BATCH, len(ROWS))
    wanted = torch.stack([t.weight[0] for t in tables]) * weight[:, :, None]
    torch.testing.assert_close(layer(one_each, None, weight), wanted)


def test_values_out_of_range():
    layer = MaskedFields.from_dense(dense_tables(), density=0.4)
    good = torch.zeros(2, 3, dtype=torch.int64)
    for field, row in ((0, 40), (1, 1), (2, -1), (2, 13)):  # within the joint table, but for the last
        bad = good.clone()
        bad[1, field] = row
        with pytest.raises(IndexError, match=r"within the tables of its fields, \(40, 1, 13\); 1 of 6"):
            layer(bad)
    rk.set_check_indices("clamp")
    try:
        nearest = layer(torch.tensor([[40, -1, 13], [-5, 7, 14]]))
    finally:
        rk.set_check_indices("raise")
    torch.testing.assert_close(nearest, layer(torch.tensor([[39, 0, 12], [0, 0, 12]])))


def test_errors():
    layer = MaskedFields.from_dense(dense_tables(), density=0.4)
    inputs, offsets = bags()
    with pytest.raises(ValueError, match=r"one tensor for each of the 3 fields; got 2 and 3"):
        layer(inputs[:2], offsets)
    with pytest.raises(ValueError, match=r"offsets must have F \* B or F \* B \+ 1 elements, F = 3; got 5"):
        layer(inputs[0], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input must have shape \[B, F\]"):
        layer(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one field"):
        MaskedFields([], 4)
    with pytest.raises(ValueError, match="one mode and dimension"):
        MaskedFields.from_dense([nn.EmbeddingBag(3, 4), nn.EmbeddingBag(3, 5)])
    with pytest.raises(ValueError, match="must not set padding_idx"):
        MaskedFields.from_dense([nn.Embedding(3, 4, padding_idx=0)])


def test_state_copies_and_dense_checkpoints():
    dense = dense_tables()
    layer = MaskedFields.from_dense(dense, density=0.4)
    assert layer.bag.nnz == round(0.4 * sum(ROWS) * DIM)
    one_each = torch.zeros(2, 3, dtype=torch.int64)
    wanted = layer(one_each)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = MaskedFields(ROWS, DIM, density=0.3)  # another mask of another size
    fresh.load_state_dict(torch.load(file))
    for other in (fresh, copy.deepcopy(layer)):
        assert torch.equal(other(one_each), wanted)
    fresh.load_dense_state_dict(layer.dense_state_dict())
    assert torch.equal(fresh(one_each), wanted)
    layer.load_dense_state_dict(dense.state_dict())  # prunes as from_dense did
    assert torch.equal(layer(one_each), wanted)
    assert layer.memory_report().own_bytes < layer.dense_bytes()
    meta = MaskedFields(ROWS, DIM, device="meta")
    assert meta.starts.is_meta and meta.bag.values.is_meta
    empty = layer(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0, 3, DIM)


def test_compile_and_fused_optimizer():
    layer = MaskedFields.from_dense(dense_tables(), density=0.4)
    inputs, offsets = bags()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, offsets), layer(inputs, offsets))
    before = layer.bag.values.detach().clone()
    layer.bag.fuse_optimizer("sgd", lr=0.5)
    layer(inputs, offsets).sum().backward()
    assert layer.bag.values.grad is None and not torch.equal(before, layer.bag.values)
