"""Small packed layers, so that the swap is tested by itself, and look-alikes of other libraries' layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsparse_kernels.nn._base import PackedModule, copy_requires_grad


class HalfLinear(PackedModule):
    """Keeps, of each pair of neighbours in a row, the larger; ``mask`` (True: kept) overrules."""

    dense_type = nn.Linear

    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        like = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.zeros(out_features, in_features // 2, **like))
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None
        self.register_buffer(
            "second", torch.zeros(out_features, in_features // 2, dtype=torch.bool, device=device)
        )

    @classmethod
    def from_dense(cls, module, *, mask=None):
        weight = module.weight.detach()
        new = cls(*weight.shape[::-1], module.bias is not None, device=weight.device, dtype=weight.dtype)
        new._load_dense(module, mask)
        copy_requires_grad(new, module)
        return new.train(module.training)

    def _load_dense(self, dense, mask=None):
        weight = dense.weight.detach()
        pairs = weight.reshape(self.out_features, -1, 2)
        if mask is not None:
            if not bool((mask.reshape(self.out_features, -1, 2).sum(-1) == 1).all()):
                raise ValueError("mask must keep one of each pair")
            pairs = mask.reshape(self.out_features, -1, 2).to(weight.dtype)
        self.second.copy_(pairs[..., 1].abs() > pairs[..., 0].abs())
        with torch.no_grad():
            self.values.copy_(self.pack_state("values", weight))
            if self.bias is not None:
                self.bias.copy_(dense.bias)

    def pack_state(self, name, dense):
        if name != "values":
            return None
        pairs = dense.reshape(self.out_features, -1, 2)
        return torch.where(self.second, pairs[..., 1], pairs[..., 0])

    def dense_weight(self):
        zero = torch.zeros_like(self.values)
        pairs = [torch.where(self.second, zero, self.values), torch.where(self.second, self.values, zero)]
        return torch.stack(pairs, -1).reshape(self.out_features, self.in_features)

    def _empty_dense(self):
        like = {"device": self.values.device, "dtype": self.values.dtype}
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)

    def dense_bytes(self):
        count = self.out_features * (self.in_features + (self.bias is not None))
        return count * self.values.element_size()

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dense_weight(), self.bias)


class RankLinear(PackedModule):
    """``up @ down`` by SVD: no positions in the dense weight."""

    dense_type = nn.Linear

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.down = nn.Parameter(torch.zeros(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_dense(cls, module, rank=2):
        new = cls(module.in_features, module.out_features, rank, module.bias is not None)
        new._load_dense(module)
        return new

    def _load_dense(self, dense):
        u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
        rank = self.down.shape[0]
        with torch.no_grad():
            self.up.copy_(u[:, :rank] * s[:rank])
            self.down.copy_(v[:rank])
            if self.bias is not None:
                self.bias.copy_(dense.bias)

    def dense_weight(self):
        return self.up @ self.down

    def _empty_dense(self):
        return nn.Linear(self.in_features, self.out_features, self.bias is not None)

    def dense_bytes(self):
        return 4 * self.out_features * (self.in_features + (self.bias is not None))

    def forward(self, input):
        return F.linear(F.linear(input, self.down), self.up, self.bias)


class HalfEmbedding(PackedModule):
    """An embedding without its odd columns."""

    dense_type = nn.Embedding

    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.values = nn.Parameter(torch.zeros(num_embeddings, embedding_dim // 2))

    @classmethod
    def from_dense(cls, module):
        new = cls(module.num_embeddings, module.embedding_dim)
        new._load_dense(module)
        return new

    def _load_dense(self, dense):
        with torch.no_grad():
            self.values.copy_(dense.weight[:, ::2])

    def pack_state(self, name, dense):
        return dense[:, ::2].clone()

    def dense_weight(self):
        return torch.stack([self.values, torch.zeros_like(self.values)], -1).flatten(1)

    def _empty_dense(self):
        return nn.Embedding(self.num_embeddings, self.embedding_dim)

    def dense_bytes(self):
        return 4 * self.num_embeddings * self.embedding_dim

    def forward(self, input):
        return F.embedding(input, self.dense_weight())


class PyGLinear(nn.Module):
    """Written like PyG's Linear: not a subclass of torch's."""

    def __init__(self, in_channels, out_channels, bias=True):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.bias = nn.Parameter(torch.randn(out_channels)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    """Written like Hugging Face's Conv1D: weight [I, O]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class FMEmbedding(nn.Module):
    """Written like RecBole's FMEmbedding: one table behind field offsets."""

    def __init__(self, field_dims, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        self.offsets = [0, *torch.tensor(field_dims).cumsum(0)[:-1].tolist()]

    def forward(self, input_x):
        return self.embedding(input_x + input_x.new_tensor(self.offsets).unsqueeze(0))


PyGLinear.__module__, PyGLinear.__qualname__ = "torch_geometric.nn.dense.linear", "Linear"
Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
FMEmbedding.__module__, FMEmbedding.__qualname__ = "recbole.model.layers", "FMEmbedding"


class Tower(nn.Module):
    """A small ranking model: two tables, an MLP, a head; written as users do."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleDict({"user": nn.Embedding(300, 16), "item": nn.Embedding(400, 16)})
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, 100)
        self.click = nn.Linear(64, 1)

    def forward(self, user, item):
        hidden = self.mlp(torch.cat([self.tables["user"](user), self.tables["item"](item)], -1))
        return self.head(hidden), self.click(hidden)


def ids(batch=8):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(0, n, (batch,), generator=generator) for n in (300, 400))
