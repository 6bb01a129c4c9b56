"""Dynamic Sparse Learning on two ranks: both decide the same, from both ranks' gradients."""

import torch
from torch.nn.parallel import DistributedDataParallel

from recsparse_kernels.nn import MaskedEmbedding
from recsparse_kernels.training import DynamicSparseLearning
from recsparse_kernels.training.schedules import constant

from .ranks import on_two_ranks

V, D = 90, 12


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = MaskedEmbedding(V, D, density=0.4)

    def forward(self, ids):
        return self.table(ids).sum(1)


def train(rank, score, ranks=2):
    torch.manual_seed(rank)  # DistributedDataParallel copies values and index of rank 0
    model = Scores()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = DynamicSparseLearning(
        wrapped, constant(0.3), 3, score=score, score_batches=2, candidate_rows=30, optimizers=optimizer
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        ids, goal = torch.randint(V, (40,), generator=generator), torch.randn(40, generator=generator)
        size = 40 // ranks
        own = slice(rank * size, (rank + 1) * size)
        optimizer.zero_grad()
        (wrapped(ids[own]) - goal[own]).square().mean().backward()
        optimizer.step()
        method.step()
    return model.table.mask.numpy(), model.table.values.detach().numpy()


def train_all(rank):
    return {score: train(rank, score) for score in ("last", "accumulate", "ema")}


def disagree(rank):
    torch.manual_seed(0)
    layer = MaskedEmbedding(V, D, density=0.4)
    with torch.no_grad():
        layer.values += rank * torch.randn(layer.nnz)  # weights drifted apart
    before = layer.mask
    method = DynamicSparseLearning(layer, constant(0.3), 1)
    layer(torch.arange(V)).sum().backward()
    try:
        method.step()
    except RuntimeError as error:
        return str(error), bool((layer.mask == before).all()), method.steps
    return "no error", True, 1


def both(rank):
    return train_all(rank), disagree(rank)


def test_ranks_decide_the_same_and_as_one_would(tmp_path):
    """One pair of processes for all cases: starting them takes longer than the training."""
    (first, first_text), (second, second_text) = on_two_ranks(both, tmp_path)
    for score, (mask, values) in first.items():
        assert (mask == second[score][0]).all() and (values == second[score][1]).all()
        alone, alone_values = train(0, score, ranks=1)
        assert (mask == alone).mean() > 0.99  # the order of sums differs
        assert abs(values.sum() - alone_values.sum()) < 0.05 * abs(alone_values).sum()
    for text, same, steps in (first_text, second_text):
        assert "no longer equal" in text and same and steps == 0
