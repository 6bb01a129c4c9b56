"""The two models of the demo, dense: what a user would have before the swap."""

import torch
from torch import Tensor, nn

from .data import Ragged

# facebookresearch/dlrm, Criteo Kaggle
EMBEDDING_DIM = 16
BOTTOM = (512, 256, 64, EMBEDDING_DIM)
TOP = (512, 256, 1)
HIDDEN = 512  # of the label model
DROPOUT = 0.5
SPARSE_GRADIENT_ROWS = 10_000  # tables above this many rows get gradients over the looked-up rows only


class DLRM(nn.Module):
    """Click probability (as a logit) from numeric features and one id a field.

    All fields share one table, each from its own row on, so that a lookup is one call.
    Without numeric features there is no bottom MLP.
    """

    def __init__(self, num_numeric: int, field_sizes: tuple[int, ...]):
        super().__init__()
        starts = torch.tensor([0, *field_sizes[:-1]]).cumsum(0)
        self.register_buffer("field_start", starts, persistent=False)
        self.table = nn.Embedding(sum(field_sizes), EMBEDDING_DIM, sparse=True)
        with torch.no_grad():
            for start, size in zip(starts.tolist(), field_sizes, strict=True):
                self.table.weight[start : start + size].uniform_(-(size**-0.5), size**-0.5)
        self.bottom = _mlp(num_numeric, BOTTOM, last_relu=True) if num_numeric else None
        vectors = len(field_sizes) + (num_numeric > 0)
        rows, columns = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)
        self.top = _mlp(len(self.pairs) + (EMBEDDING_DIM if num_numeric else 0), TOP, last_relu=False)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        """numeric [B, M], ids [B, fields] -> logits [B]"""
        vectors = self.table(ids + self.field_start)
        if self.bottom is None:
            return self.top(self._dots(vectors)).squeeze(1)
        bottom = self.bottom(numeric)
        vectors = torch.cat((bottom.unsqueeze(1), vectors), dim=1)
        return self.top(torch.cat((bottom, self._dots(vectors)), dim=1)).squeeze(1)

    def _dots(self, vectors: Tensor) -> Tensor:
        """The dot product of each pair of vectors: [B, F, D] -> [B, F (F - 1) / 2]"""
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)


def _mlp(width: int, widths: tuple[int, ...], last_relu: bool) -> nn.Sequential:
    layers = []
    for i, out in enumerate(widths):
        linear = nn.Linear(width, out)
        nn.init.normal_(linear.weight, std=(2 / (width + out)) ** 0.5)
        nn.init.normal_(linear.bias, std=out**-0.5)
        layers += [linear, nn.ReLU()] if last_relu or i + 1 < len(widths) else [linear]
        width = out
    return nn.Sequential(*layers)


class LabelModel(nn.Module):
    """Sparse features -> hidden layer -> a score for each label.

    ``head`` maps [B, HIDDEN] to [B, labels]: nn.Linear, or FixedFanInLinear, whose loss and top-k never
    hold the scores of all labels.
    """

    def __init__(self, num_features: int, head: nn.Module):
        super().__init__()
        self.encoder = nn.EmbeddingBag(
            num_features,
            HIDDEN,
            mode="sum",
            include_last_offset=True,
            sparse=num_features > SPARSE_GRADIENT_ROWS,
        )
        nn.init.uniform_(self.encoder.weight, -(num_features**-0.5), num_features**-0.5)
        self.encoder_bias = nn.Parameter(torch.zeros(HIDDEN))
        self.dropout = nn.Dropout(DROPOUT)
        self.head = head

    def hidden(self, features: Ragged) -> Tensor:
        values, offsets = torch.from_numpy(features.values), torch.from_numpy(features.offsets)
        weights = torch.from_numpy(features.weights)
        bag = self.encoder(values, offsets, per_sample_weights=weights)
        return self.dropout(torch.relu(bag + self.encoder_bias))

    def scores(self, features: Ragged) -> Tensor:
        """[B, labels]"""
        return self.head(self.hidden(features))

    def loss(self, features: Ragged, labels: Ragged) -> Tensor:
        """Binary cross-entropy over all labels, summed over labels, mean over rows."""
        hidden = self.hidden(features)
        if isinstance(self.head, nn.Linear):
            scores = self.head(hidden)
            row, label = torch.from_numpy(labels.row_of_value()), torch.from_numpy(labels.values)
            # the same as binary_cross_entropy_with_logits on a multi-hot target, without building that
            return (nn.functional.softplus(scores).sum() - scores[row, label].sum()) / len(labels)
        positives = torch.from_numpy(labels.offsets), torch.from_numpy(labels.values)
        return self.head.loss(hidden, positives, kind="bce", reduction="batchmean")

    def topk(self, features: Ragged, k: int) -> Tensor:
        """The k best labels of each row, [B, k]."""
        hidden = self.hidden(features)
        if isinstance(self.head, nn.Linear):
            return self.head(hidden).topk(k, dim=1).indices
        return self.head.topk(hidden, k)[1]


def set_prior(head: nn.Module, counts: Tensor, rows: int) -> None:
    """Start every label's bias at its log-odds, so that training need not find out that labels are rare."""
    rate = (counts.double() + 0.5) / (rows + 1.0)
    with torch.no_grad():
        head.bias.copy_(torch.logit(rate.clamp(max=0.999)))
