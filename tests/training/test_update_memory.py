"""Topology updates make nothing of the size of the dense weight, nor a second copy of the packed one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recsparse_kernels.nn import FixedFanInLinear, MaskedEmbedding
from recsparse_kernels.training import (
    DynamicSparseLearning,
    TopologyUpdate,
    selection,
    topology_update_gradient,
)
from recsparse_kernels.training import dynamic_sparse_learning_table as table_file
from recsparse_kernels.training.schedules import constant


class Watch(TorchDispatchMode):
    """The largest memory that an op made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("score", ["last", "ema"])
def test_masks_move_within_the_packed_memory(score, monkeypatch):
    for module in (selection, table_file):
        monkeypatch.setattr(module, "CHUNK" if module is selection else "BLOCK_ELEMENTS", 1 << 10)
    monkeypatch.setattr(selection, "_DIGIT_BITS", 8)  # histograms of 16 bits are larger than this table
    layer = MaskedEmbedding(8000, 32, density=0.3)
    layer.fuse_optimizer("adam", lr=0.01)
    method = DynamicSparseLearning(layer, constant(0.3), 1, score=score, candidate_rows=500)
    for _ in range(2):
        layer(torch.randint(8000, (100,))).sum().backward()
        with Watch() as watch:
            assert method.step() is not None
    packed = layer.nnz * 4
    assert watch.largest < packed / 3, (watch.largest, packed)
    with watch:
        layer.all_rows()
    assert watch.largest == 8000 * 32 * 4  # the watch does see one


@pytest.mark.parametrize("regrow", ["random", "gradient"])
def test_rewiring_makes_no_dense_weight(regrow, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 1 << 10)
    monkeypatch.setattr(topology_update_gradient, "BLOCK_ELEMENTS", 1 << 10)
    layer = FixedFanInLinear(256, 4000, 16)
    method = TopologyUpdate(layer, update_every=1, end_step=3, drop_fraction=0.3, regrow=regrow)
    layer.loss(torch.randn(2, 256), (torch.tensor([0, 1, 3]), torch.tensor([5, 7, 9]))).backward()
    with Watch() as watch:
        method.step()
    assert watch.largest <= 4000 * 16 * 8, watch.largest  # [O, F] int64 in the native op at most
    assert watch.largest < 4000 * 256 * 4 / 4


def test_checks_before_rewiring_hold_little():
    layer = FixedFanInLinear(64, 1 << 16, 64)  # 16 MiB of weights
    with Watch() as watch:
        TopologyUpdate(layer, update_every=1, end_step=1, drop_fraction=0.1).step()
    assert watch.largest < 1 << 22, watch.largest
