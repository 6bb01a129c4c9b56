import copy

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from recsparse_kernels import nn as packed  # noqa: E402
from recsparse_kernels.demo import measure, train, variants  # noqa: E402
from recsparse_kernels.demo.data import Ragged, generate_click_log  # noqa: E402
from recsparse_kernels.demo.models import DLRM, HIDDEN, LabelModel, set_prior  # noqa: E402

SIZES = (50, 400, 1000)
SWAPPED = {
    "dense": {},
    "2:4 MLP": {"bottom.2": packed.Sparse24Linear, "bottom.4": packed.Sparse24Linear,
                "top.0": packed.Sparse24Linear, "top.2": packed.Sparse24Linear},
    "masked tables, density 0.2": {"table": packed.MaskedEmbedding},
    "low-rank MLP and tables": {"bottom.2": packed.LowRankLinear, "bottom.4": packed.LowRankLinear,
                                "top.0": packed.LowRankLinear, "top.2": packed.LowRankLinear,
                                "table": packed.LowRankEmbedding},
    "all together": {"bottom.2": packed.Sparse24Linear, "bottom.4": packed.Sparse24Linear,
                     "top.0": packed.LowRankLinear, "top.2": packed.Sparse24Linear,
                     "table": packed.MaskedEmbedding},
}  # fmt: skip


@pytest.fixture(scope="module")
def log():
    return generate_click_log(2_000, 0, SIZES + (20,))


@pytest.mark.parametrize("variant", variants.CLICK_VARIANTS, ids=lambda variant: variant.name)
def test_swaps_what_it_says_and_trains(variant, log):
    torch.manual_seed(0)
    dense = DLRM(13, log.field_sizes)
    model = copy.deepcopy(dense)
    lines = variant.swap(model)
    changed = {
        name: type(layer)
        for name, layer in model.named_modules()
        if type(layer) is not type(dict(dense.named_modules()).get(name))
    }
    assert changed == SWAPPED[variant.name]
    assert len(lines) == len(changed)
    data, rows = train.ClickTensors(log), torch.arange(512)
    before = data.loss(model, rows).item()
    optimizers = train.make_optimizers(model, lambda: data.loss(model, rows), train.Rates(0.05, 1e-3))
    for _ in range(5):
        train.step(data.loss(model, rows), optimizers)
    assert data.loss(model, rows).item() < before
    dense_optimizers = train.make_optimizers(dense, lambda: data.loss(dense, rows), train.Rates(0.05, 1e-3))
    train.step(data.loss(dense, rows), dense_optimizers)
    if changed:
        assert measure.parameter_bytes(model) < measure.parameter_bytes(dense)
        assert measure.optimizer_bytes(optimizers) < measure.optimizer_bytes(dense_optimizers)
    # the table gets gradients over looked-up rows only, packed or not
    assert [type(o).__name__ for o in optimizers] == ["Adam", "Adagrad"]


def test_fan_in_loss_and_top_labels_are_those_of_the_dense_layer():
    torch.manual_seed(0)
    heads = dict(variants.label_heads(700))
    assert list(heads) == ["dense head", "fixed fan-in 64 of 512", "fixed fan-in 32 of 512"]
    head = heads["fixed fan-in 32 of 512"]()
    assert head.fan_in == 32
    model = LabelModel(30, head).eval()
    set_prior(model.head, torch.arange(700), 1000)
    dense = copy.deepcopy(model)
    dense.head = model.head.to_dense()
    assert type(dense.head) is torch.nn.Linear and dense.head.in_features == HIDDEN
    features = Ragged.from_lists([np.array([1, 4]), np.array([7])], [np.array([0.5, 1.0]), np.array([2.0])])
    labels = Ragged.from_lists([np.array([3, 699]), np.array([], int)])
    torch.testing.assert_close(model.loss(features, labels), dense.loss(features, labels))
    torch.testing.assert_close(model.scores(features), dense.scores(features))
    assert model.topk(features, 5).tolist() == dense.topk(features, 5).tolist()
