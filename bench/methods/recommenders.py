"""The backbones of Dynamic Sparse Learning, over dense or packed tables: MF-BPR, LightGCN, NeuMF, MultVAE.

A table is anything called with row numbers; a packed one also gives `all_rows` and `matmul_t`. The
settings (widths, losses, what is masked) are those of the paper's code; where ours differ, it says so.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsparse_kernels.nn import MaskedEmbedding

Table = nn.Embedding | MaskedEmbedding
MakeTable = Callable[[int, int], Table]  # (rows, width)


def all_rows(table: Table) -> Tensor:
    return table.all_rows() if isinstance(table, MaskedEmbedding) else table.weight


def scores_of(vectors: Tensor, table: Table) -> Tensor:
    """``vectors @ weight.T``; a packed table does it without a dense copy."""
    return table.matmul_t(vectors) if isinstance(table, MaskedEmbedding) else vectors @ table.weight.T


def init_normal(table: Table, std: float) -> None:
    nn.init.normal_(table.values if isinstance(table, MaskedEmbedding) else table.weight, std=std)


class _Propagate(torch.autograd.Function):
    """``adjacency @ x`` for a symmetric matrix, whose gradient is the same product."""

    @staticmethod
    def forward(ctx, adjacency, x):
        ctx.csr = adjacency.crow_indices(), adjacency.col_indices(), adjacency.values()
        return _product(*ctx.csr, x)

    @staticmethod
    def backward(ctx, grad):
        return None, _product(*ctx.csr, grad)


def _product(starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """Of a matrix in CSR and x, in a third of the time that torch's CSR product takes on this CPU."""
    return functional.embedding_bag(
        columns, x.contiguous(), starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


class _Margins(torch.autograd.Function):
    """How much the negative scores above the positive: ``v[user] . (v[negative] - v[positive])``, ``[B]``.

    The gradient is a product of ``v`` with a sparse matrix of four elements for each triple.
    """

    TOGETHER = 2048  # triples whose rows stay in the cache

    @staticmethod
    def forward(ctx, v, user, positive, negative):
        ctx.save_for_backward(v, user, positive, negative)
        parts = (part.split(_Margins.TOGETHER) for part in (user, positive, negative))
        return torch.cat([(v[n].sub_(v[p]).mul_(v[u])).sum(1) for u, p, n in zip(*parts, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        v, user, positive, negative = ctx.saved_tensors
        row, order = torch.cat([user, user, positive, negative]).sort(stable=True)
        column = torch.cat([negative, positive, user, user])[order]
        starts = torch.searchsorted(row, torch.arange(len(v) + 1))
        values = torch.cat([grad, -grad, -grad, grad])[order]
        return _product(starts, column, values, v), None, None, None


def bpr_loss(margins: Tensor) -> Tensor:
    """Softplus form: ``mean log(1 + exp(score of the negative - score of the positive))``."""
    return functional.softplus(margins).mean()


class LightGCN(nn.Module):
    """Mean of the table and its ``layers`` propagations over the normalised graph.

    ``layers = 0`` is matrix factorisation with BPR. The propagated ``[V, D]`` are activations of the
    model, dense with any table; weights, gradients and moments are packed.
    """

    def __init__(
        self, users: int, items: int, make_table: MakeTable, adjacency: Tensor, dim=64, layers=3, std=0.1
    ):
        super().__init__()
        self.users, self.layers, self.adjacency = users, layers, adjacency
        self.table = make_table(users + items, dim)
        init_normal(self.table, std)

    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """Users, then items: ``[V, D]``."""
        x = all_rows(self.table) if rows is None else rows
        total = x
        for _ in range(self.layers):
            x = _Propagate.apply(self.adjacency, x)
            total = total + x
        return total / (self.layers + 1)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor], decay: float) -> Tensor:
        """BPR; ``decay`` weighs half the squared norm of the batch's own rows, as in LightGCN."""
        user, positive, negative = batch[0], batch[1] + self.users, batch[2] + self.users
        rows = torch.cat([user, positive, negative])
        if self.layers == 0:
            chosen = self.table(rows)
            of_user, of_positive, of_negative = chosen.chunk(3)
            margins, squares = (of_user * (of_negative - of_positive)).sum(1), chosen.square().sum()
        else:
            table = all_rows(self.table)
            margins = _Margins.apply(self.vectors(table), user, positive, negative)
            # once for each row and how often it is in the batch
            squares = rows.bincount(minlength=len(table)).to(table.dtype) @ table.square().sum(1)
        penalty = squares / (2 * len(user))
        return bpr_loss(margins) + decay * penalty

    @torch.no_grad()
    def ranker(self) -> Callable[[Tensor], Tensor]:
        vectors = self.vectors()
        items = vectors[self.users :].T.contiguous()
        return lambda users: vectors[users] @ items

    def batch(self, data, size: int, generator: torch.Generator):
        return data.sample(size, generator)

    def evaluate(self, data) -> dict[str, float]:
        return _recall(data.evaluate(self.ranker()))


class NeuMF(nn.Module):
    """Matrix factorisation and an MLP side by side. As in the paper, the tables of the MLP are masked only."""

    NEGATIVES = 4  # of each positive in training
    CANDIDATES = 100  # negatives that a held-out item is ranked among

    def __init__(self, users: int, items: int, make_table: MakeTable, dim: int = 16):
        super().__init__()
        self.users, self.items = make_table(users, dim), make_table(items, dim)
        self.gmf_users, self.gmf_items = nn.Embedding(users, dim), nn.Embedding(items, dim)
        for table in (self.users, self.items, self.gmf_users, self.gmf_items):
            init_normal(table, 0.01)
        widths = (2 * dim, 32, 16, 8)
        layers = [
            part for i, o in zip(widths, widths[1:], strict=False) for part in (nn.Linear(i, o), nn.ReLU())
        ]
        self.mlp = nn.Sequential(*layers)
        self.predict = nn.Linear(widths[-1] + dim, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        deep = self.mlp(torch.cat([self.users(users), self.items(items)], -1))
        return self.predict(torch.cat([self.gmf_users(users) * self.gmf_items(items), deep], -1)).squeeze(-1)

    def batch(self, data, size: int, generator: torch.Generator):
        users, positive, negative = data.sample(size, generator)
        more = [data.sample_negatives(users, generator) for _ in range(self.NEGATIVES - 1)]
        items = torch.cat([positive, negative, *more])
        wanted = torch.zeros(len(items))
        wanted[:size] = 1
        return users.repeat(self.NEGATIVES + 1), items, wanted

    def loss(self, batch, decay: float) -> Tensor:
        users, items, wanted = batch
        return functional.binary_cross_entropy_with_logits(self(users, items), wanted)

    @torch.no_grad()
    def evaluate(self, data) -> dict[str, float]:
        """Hit rate and NDCG at 20 of one held-out item of each user among `CANDIDATES` others."""
        generator = torch.Generator().manual_seed(0)
        users, items = data.one_held_out(generator)
        others = torch.stack([data.sample_negatives(users, generator) for _ in range(self.CANDIDATES)], 1)
        ranked = torch.cat([items.unsqueeze(1), others], 1)
        score = torch.cat([
            self(u.repeat_interleave(ranked.shape[1]), r.flatten()).view(r.shape)
            for u, r in zip(users.split(1024), ranked.split(1024), strict=True)
        ])  # fmt: skip
        place = (score[:, 1:] >= score[:, :1]).sum(1)
        hit = (place < 20).float()
        return {"hit20": float(hit.mean()), "ndcg20": float((hit / torch.log2(place + 2.0)).mean())}


class MultVAE(nn.Module):
    """Variational autoencoder with multinomial likelihood: items - 600 - 200 - 600 - items.

    All weights are tables, and masked, as in the paper (there biases too; here they stay dense: packing a
    vector takes more than it saves). The input layer is a bag of rows, the output layer `matmul_t`.
    """

    KL_CAP, KL_STEPS = 0.2, 200_000

    def __init__(self, items: int, make_table: MakeTable, hidden: int = 600, latent: int = 200):
        super().__init__()
        self.weights = nn.ModuleList(
            make_table(rows, width)
            for rows, width in ((items, hidden), (2 * latent, hidden), (hidden, latent), (items, hidden))
        )
        fans = (items, hidden, latent, hidden)
        for table, fan, other in zip(self.weights, fans, (hidden, 2 * latent, hidden, items), strict=True):
            init_normal(table, (2 / (fan + other)) ** 0.5)
        self.biases = nn.ParameterList(torch.zeros(n) for n in (hidden, 2 * latent, hidden, items))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, offsets: Tensor, items: Tensor, drop: bool) -> tuple[Tensor, Tensor, Tensor]:
        first, second, third, last = self.weights
        lengths = offsets.diff()
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        scale = (lengths.clamp(min=1).float() ** -0.5)[row]
        if drop:
            scale = functional.dropout(scale, 0.5)
        # a lookup each, then a sum: packed and dense tables alike
        hidden = torch.zeros(len(lengths), first.embedding_dim).index_add(
            0, row, first(items) * scale.unsqueeze(1)
        )
        hidden = torch.tanh(hidden + self.biases[0])
        mean, log_variance = (scores_of(hidden, second) + self.biases[1]).chunk(2, dim=1)
        latent = mean
        if drop:
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        hidden = torch.tanh(scores_of(latent, third) + self.biases[2])
        return scores_of(hidden, last) + self.biases[3], mean, log_variance

    def batch(self, data, size: int, generator: torch.Generator):
        users = data.active[torch.randint(len(data.active), (size,), generator=generator)]
        histories = data.train.take(users.numpy())
        return torch.from_numpy(histories.offsets), torch.from_numpy(histories.values)

    def loss(self, batch, decay: float) -> Tensor:
        offsets, items = batch
        logits, mean, log_variance = self(offsets, items, drop=True)
        row = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
        likelihood = functional.log_softmax(logits, 1)[row, items].sum() / len(mean)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        self.steps += 1
        weight = min(self.KL_CAP, int(self.steps) / self.KL_STEPS)
        return -likelihood + weight * divergence

    def evaluate(self, data) -> dict[str, float]:
        def ranker(users: Tensor) -> Tensor:
            known = data.train.take(users.numpy())
            return self(torch.from_numpy(known.offsets), torch.from_numpy(known.values), drop=False)[0]

        return _recall(data.evaluate(ranker))


def _recall(metrics) -> dict[str, float]:
    return {"recall20": metrics.recall, "ndcg20": metrics.ndcg}
