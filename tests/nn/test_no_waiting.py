"""No layer waits for a GPU: forward and backward on tensors without data, of which nothing can be asked."""

import pytest
import torch

from recsparse_kernels import nn

IDS = torch.zeros(4, 2, dtype=torch.int64)
BAGS = IDS.flatten(), torch.tensor([0, 3])
ROWS = torch.zeros(4, 16)
POSITIVES = torch.tensor([0, 2, 2, 3, 3]), torch.tensor([1, 2, 0])
CASES = {
    "MaskedEmbedding": (lambda: nn.MaskedEmbedding(9, 16), (IDS,)),
    "MaskedEmbeddingBag": (lambda: nn.MaskedEmbeddingBag(9, 16, mode="sum"), (IDS,)),
    "MaskedEmbeddingBag, offsets": (lambda: nn.MaskedEmbeddingBag(9, 16, mode="mean"), BAGS),
    "MaskedFields": (lambda: nn.MaskedFields([5, 6], 16), (IDS,)),
    "MaskedFields, offsets": (lambda: nn.MaskedFields([5, 6], 16), (BAGS[0], torch.arange(4))),
    "MaskedLinear": (lambda: nn.MaskedLinear(16, 8), (ROWS,)),
    "LowRankEmbedding": (lambda: nn.LowRankEmbedding(9, 16, rank=4, mean=True), (IDS,)),
    "LowRankEmbeddingBag": (lambda: nn.LowRankEmbeddingBag(9, 16, rank=4, mode="mean"), BAGS),
    "LowRankEmbeddingBag, max": (lambda: nn.LowRankEmbeddingBag(9, 16, rank=4, mode="max"), (IDS,)),
    "LowRankFields": (lambda: nn.LowRankFields([5, 6], 16, 4, interaction=True), (IDS,)),
    "LowRankLinear": (lambda: nn.LowRankLinear(16, 8, 4), (ROWS,)),
    "LowRankCross": (lambda: nn.LowRankCross(16, 4), (ROWS, ROWS)),
    "Sparse24Linear": (lambda: nn.Sparse24Linear(16, 8), (ROWS,)),
    "Sparse24LinearSTE": (lambda: nn.Sparse24LinearSTE(16, 8), (ROWS,)),
    "FixedFanInLinear": (lambda: nn.FixedFanInLinear(16, 30, 4), (ROWS,)),
    "FixedFanInLinear.loss": (lambda: nn.FixedFanInLinear(16, 30, 4).loss, (ROWS, POSITIVES)),
    "FixedFanInLinear.topk": (lambda: nn.FixedFanInLinear(16, 30, 4).topk, (ROWS, 3)),
    "FanInHead": (lambda: nn.FanInHead(16, 30, 4, intermediate=16, dense_labels=3), (ROWS,)),
    "FanInHead.loss": (lambda: nn.FanInHead(16, 30, 4, intermediate=16).loss, (ROWS, POSITIVES)),
    "FanInHead.score": (lambda: nn.FanInHead(16, 30, 4, dense_labels=3).score, (ROWS, IDS)),
    "FanInHead.topk": (lambda: nn.FanInHead(16, 30, 4, dense_labels=3).topk, (ROWS, 3)),
}


def without_data(value):
    if isinstance(value, tuple):
        return tuple(map(without_data, value))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def run(case):
    call, inputs = case[0](), case[1]
    module = getattr(call, "__self__", call)
    module.to("meta")
    result = call(*without_data(inputs))
    first = result if isinstance(result, torch.Tensor) else result[0]
    first.sum().backward()
    assert any(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("mode", ["raise", "clamp", "none"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward(case, mode, check_indices):
    check_indices(mode)
    run(case)


def test_a_wait_is_found():
    """The one that is left: how many of the positives a dense block has."""
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run((lambda: nn.FanInHead(16, 30, 4, dense_labels=3).loss, (ROWS, POSITIVES)))
