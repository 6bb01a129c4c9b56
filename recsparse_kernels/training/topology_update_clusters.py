"""The auxiliary objective of arXiv 2411.03171: for a while the encoder also predicts clusters of labels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..nn.fan_in_head import label_order
from ..ops._check import check_shape
from ..ops.fan_in import rows_of_positives
from ._method import check_count, check_finite
from .schedules import Schedule


class ClusterObjective(nn.Module):
    r"""``(1 - a) main + a auxiliary``, with a dense layer over label clusters, until ``a`` has fallen to 0.

    Early in training most labels of a sparse layer pass hardly any gradient to the encoder; a cluster is hit
    by each row's positives. Kept for long it takes capacity away from the labels (the paper: 4 to 15
    epochs, ``a`` from 0.4 along a cosine).

    Args:
        in_features: of the encoder's output.
        clusters: ``[O]`` int64, the cluster of each label (`cluster_labels`).
        weight: a, ``step -> weight``, for instance ``cosine(0.4, end_step=...)``. From its ``end_step`` on
            the main loss is returned as it is.

    Example:
        >>> objective = ClusterObjective(64, torch.arange(1000) // 50, cosine(0.4, end_step=200))
        >>> # loss = objective(step, head.loss(hidden, positives), hidden, positives)
    """

    def __init__(
        self, in_features: int, clusters: Tensor, weight: Schedule | Callable[[int], float], *,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if not callable(weight):
            raise TypeError(f"weight must be a schedule, step -> weight; got {weight!r}")
        if not isinstance(clusters, Tensor):
            raise TypeError(f"clusters must be a tensor; got {type(clusters).__name__}")
        if clusters.dim() != 1 or clusters.dtype not in (torch.int32, torch.int64) or not len(clusters):
            raise ValueError(
                f"clusters must be int64 [O], one for each label; got {clusters.dtype} {tuple(clusters.shape)}"
            )
        if int(clusters.min()) < 0:
            raise ValueError(f"clusters must not be negative; got {int(clusters.min())}")
        self.weight = weight
        self.register_buffer("clusters", clusters.to(device, torch.int64))
        self.head: nn.Linear | None = nn.Linear(
            in_features, int(clusters.max()) + 1, device=device, dtype=dtype
        )

    def active(self, step: int) -> bool:
        end = getattr(self.weight, "end_step", None)
        return self.head is not None and (end is None or step < end)

    def forward(self, step: int, main: Tensor, hidden: Tensor, positives: tuple[Tensor, Tensor]) -> Tensor:
        """The mixed loss; ``positives`` are ``(offsets [B + 1], labels)`` as for the main loss."""
        if not self.active(step):
            return main
        a = self.weight(step)
        if not 0 <= a <= 1:
            raise ValueError(f"weight must be in [0, 1]; the schedule gives {a} at step {step}")
        return (1 - a) * main + a * self.loss(hidden, positives)

    def loss(self, hidden: Tensor, positives: tuple[Tensor, Tensor]) -> Tensor:
        """Binary cross-entropy against which clusters hold a positive, mean over rows and clusters."""
        if self.head is None:
            raise RuntimeError("the cluster head was dropped")
        offsets, labels = positives
        row = rows_of_positives(offsets, labels, hidden, len(self.clusters))
        logits = self.head(hidden)
        targets = torch.zeros_like(logits)
        targets[row, self.clusters[labels.long()]] = 1
        return nn.functional.binary_cross_entropy_with_logits(logits, targets)

    def drop(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Free the head once it is no longer used, and its place and moments in an optimizer."""
        if self.head is None:
            return
        own = {id(p) for p in self.head.parameters()}
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            for parameter in self.head.parameters():
                optimizer.state.pop(parameter, None)
        self.head = None

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        saved = {key for key in state_dict if key.startswith(prefix)}
        clusters = state_dict.get(prefix + "clusters")
        if saved == {prefix + "clusters"} and clusters.shape == self.clusters.shape and rest[1]:
            self.head = None  # saved after `drop`
        super()._load_from_state_dict(state_dict, prefix, *rest)


def cluster_labels(embeddings: Tensor, size: int) -> Tensor:
    """Clusters of ``size`` like labels each, by balanced halving: ``[O]`` int64.

    Args:
        embeddings: ``[O, D]``, for instance the mean features of each label's positives.

    Raises:
        ValueError: shape, size, or NaN in the embeddings.
    """
    check_count("size", size)
    check_shape("embeddings", embeddings, (None, None), "[O, D]")
    check_finite("embeddings", embeddings)
    labels, device = len(embeddings), embeddings.device
    order = label_order(torch.zeros(labels, device=device), embeddings=embeddings, group_size=max(size, 2))
    clusters = torch.empty(labels, dtype=torch.int64, device=device)
    clusters[order] = torch.arange(labels, device=device) // size
    return clusters
