"""User-item interactions as collaborative filtering needs them: a graph, BPR samples, ranked evaluation."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recsparse_kernels.demo.data import Ragged
from recsparse_kernels.demo.data.interactions import parse
from recsparse_kernels.demo.metrics import LabelMetrics, label_metrics

EVALUATION_USERS = 1024  # ranked together: their scores are [users, items]
TOP = 20


class Interactions:
    """Training and held-out items of each user; users and items are numbered from 0."""

    def __init__(self, train: Path, test: Path):
        histories, held_out = parse(train), parse(test)
        self.users = 1 + max(max(histories), max(held_out))
        self.items = 1 + max(int(items.max()) for part in (histories, held_out) for items in part.values())
        empty = np.empty(0, np.int64)
        self.train = Ragged.from_lists([histories.get(user, empty) for user in range(self.users)])
        self.test = Ragged.from_lists([held_out.get(user, empty) for user in range(self.users)])
        self.active = torch.from_numpy(np.flatnonzero(self.train.lengths))
        self._offsets, self._items = torch.from_numpy(self.train.offsets), torch.from_numpy(self.train.values)
        users = torch.from_numpy(self.train.row_of_value())
        self._pairs = (users * self.items + self._items).sort().values

    def adjacency(self) -> Tensor:
        """``D^-1/2 [[0, R], [R', 0]] D^-1/2`` as sparse CSR, users before items."""
        users, items = self.train.row_of_value(), self.train.values + self.users
        row, column = np.concatenate([users, items]), np.concatenate([items, users])
        order = np.lexsort((column, row))
        row, column = row[order], column[order]
        degree = np.bincount(row, minlength=self.users + self.items)
        values = (degree[row] * degree[column]).astype(np.float64) ** -0.5
        starts = np.concatenate(([0], np.cumsum(degree)))
        size = (self.users + self.items,) * 2
        tensors = (torch.from_numpy(t) for t in (starts, column, values.astype(np.float32)))
        return torch.sparse_csr_tensor(*tensors, size, check_invariants=False)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Users uniform, one of their items each, and an item that they do not have."""
        draw = torch.randint(len(self.active), (count,), generator=generator)
        users = self.active[draw]
        begin, end = self._offsets[users], self._offsets[users + 1]
        positive = self._items[begin + (torch.rand(count, generator=generator) * (end - begin)).long()]
        return users, positive, self.sample_negatives(users, generator)

    def sample_negatives(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """For each user an item, uniform among those without a training pair."""
        negative = torch.randint(self.items, users.shape, generator=generator)
        while len(wrong := self.has(users, negative).nonzero().squeeze(1)):
            negative[wrong] = torch.randint(self.items, (len(wrong),), generator=generator)
        return negative

    def one_held_out(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Every user with held-out items, and one of them."""
        lengths = torch.from_numpy(self.test.lengths)
        users = lengths.nonzero().squeeze(1)
        place = (torch.rand(len(users), generator=generator) * lengths[users]).long()
        return users, torch.from_numpy(self.test.values)[torch.from_numpy(self.test.offsets)[users] + place]

    def has(self, users: Tensor, items: Tensor) -> Tensor:
        """Which of these pairs are in the training set."""
        keys = users * self.items + items
        at = torch.searchsorted(self._pairs, keys).clamp_(max=len(self._pairs) - 1)
        return self._pairs[at] == keys

    def evaluate(self, scores) -> LabelMetrics:
        """Recall@20 and NDCG@20 over all users that have held-out items; training items are not ranked.

        Args:
            scores: function of users ``[n]`` int64 to their scores ``[n, items]``.
        """
        tested = np.flatnonzero(self.test.lengths)
        best = []
        with torch.inference_mode():
            for part in np.array_split(tested, max(1, -(-len(tested) // EVALUATION_USERS))):
                ranked = scores(torch.from_numpy(part))
                known = self.train.take(part)
                ranked[torch.from_numpy(known.row_of_value()), torch.from_numpy(known.values)] = -torch.inf
                best.append(ranked.topk(TOP, dim=1).indices)
        return label_metrics(torch.cat(best).numpy(), self.test.take(tested), items=True)
