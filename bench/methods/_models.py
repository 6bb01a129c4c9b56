"""Click models with one table a field, in the form that feature mimicking can fold."""

import torch
from torch import Tensor, nn

from recsparse_kernels.training import FieldEmbeddings

DIM = 16
DEEP = (400, 400, 400)  # DeepFM's and DCN's towers in arXiv 2405.18146
CROSS_LAYERS = 2


def _tower(widths: tuple[int, ...]) -> nn.Sequential:
    layers = []
    for width, out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width, out), nn.ReLU()]
    return nn.Sequential(*layers)


class ClickModel(nn.Module):
    """Tables, and a first layer that reads their rows flattened; numeric features go in beside."""

    def __init__(self, num_numeric: int, field_sizes: tuple[int, ...], interaction: bool = False):
        super().__init__()
        self.embeddings = FieldEmbeddings(field_sizes, DIM, interaction=interaction, sparse=True)
        for table in self.embeddings.tables:
            nn.init.uniform_(table.weight, -(table.num_embeddings**-0.5), table.num_embeddings**-0.5)
        self.num_numeric, self.features = num_numeric, len(field_sizes) * DIM

    def _first(self, width: int) -> None:
        self.first = nn.Linear(self.features, width)
        self.first_numeric = nn.Linear(self.num_numeric, width, bias=False) if self.num_numeric else None

    def _enter(self, z: Tensor, numeric: Tensor) -> Tensor:
        hidden = self.first(z.flatten(1))
        return torch.relu(hidden if self.first_numeric is None else hidden + self.first_numeric(numeric))


class DeepFM(ClickModel):
    """logit = first order + factorisation machine + tower (Guo et al. 2017)."""

    fields = {"embeddings": "first"}

    def __init__(self, num_numeric: int, field_sizes: tuple[int, ...]):
        super().__init__(num_numeric, field_sizes, interaction=True)
        starts = torch.tensor((0, *field_sizes[:-1])).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)
        self.order = nn.EmbeddingBag(sum(field_sizes), 1, mode="sum", sparse=True)
        nn.init.zeros_(self.order.weight)
        self._first(DEEP[0])
        self.tower = _tower(DEEP)
        self.last = nn.Linear(DEEP[-1], 1)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        z, _, interaction = self.embeddings(ids)
        deep = self.last(self.tower(self._enter(z, numeric)))
        return (self.order(ids + self.starts) + interaction + deep).squeeze(1)


class DCNv2(ClickModel):
    """Cross layers beside a tower (Wang et al. 2021): x0 * (W x + b) + x."""

    fields = {"embeddings": "first"}

    def __init__(self, num_numeric: int, field_sizes: tuple[int, ...]):
        super().__init__(num_numeric, field_sizes)
        width = self.features + num_numeric
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(CROSS_LAYERS))
        self._first(DEEP[0])
        self.tower = _tower(DEEP)
        self.last = nn.Linear(width + DEEP[-1], 1)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        z, x, _ = self.embeddings(ids)
        x0 = torch.cat((x.flatten(1), numeric), 1)
        crossed = x0
        for layer in self.cross:
            crossed = x0 * layer(crossed) + crossed
        return self.last(torch.cat((crossed, self.tower(self._enter(z, numeric))), 1)).squeeze(1)


class FieldDLRM(ClickModel):
    """DLRM (Naumov et al. 2019), Criteo Kaggle widths; an interaction stands between tables and MLP, so
    nothing can be folded."""

    fields = {"embeddings": None}

    def __init__(self, num_numeric: int, field_sizes: tuple[int, ...]):
        super().__init__(num_numeric, field_sizes)
        self.bottom = _tower((num_numeric, 512, 256, 64, DIM)) if num_numeric else None
        vectors = len(field_sizes) + (num_numeric > 0)
        rows, columns = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)
        self.top = _tower((len(self.pairs) + (DIM if num_numeric else 0), 512, 256))
        self.last = nn.Linear(256, 1)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        vectors = self.embeddings(ids).x
        bottom = [] if self.bottom is None else [self.bottom(numeric)]
        if bottom:
            vectors = torch.cat((bottom[0].unsqueeze(1), vectors), 1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.last(self.top(torch.cat((*bottom, dots), 1))).squeeze(1)


MODELS = {"DeepFM": DeepFM, "DCN-v2": DCNv2, "DLRM": FieldDLRM}
