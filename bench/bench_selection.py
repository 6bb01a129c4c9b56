"""Exact selection of the k largest of many scores, as a mask, against `torch.topk` and sorting all of them."""

import pytest
import torch

from bench.harness import Case, compare
from recsparse_kernels.training import select_largest

COUNT = 1 << 24  # 64 MiB: above the last-level cache


def mask_of(indices, scores):
    return torch.zeros(scores.shape, dtype=torch.bool).index_fill_(0, indices, True)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5])
@pytest.mark.parametrize("kind", ["normal", "mostly zero"])
def test_selection(share, kind, benchmark):
    scores, k = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)), int(share * COUNT)
    if kind == "mostly zero":  # growth scores: rows without a gradient
        scores[k // 2 :] = 0

    def check():
        mask = select_largest(scores, k).mask(0)
        assert int(mask.sum()) == k
        assert torch.equal(scores[mask].sort(descending=True).values, scores.topk(k).values)

    compare(
        Case("select_largest", "forward", f"N={COUNT} k={k} {kind}"),
        {
            "topk": lambda: mask_of(scores.topk(k, sorted=False).indices, scores),
            "sort": lambda: mask_of(scores.sort(descending=True).indices[:k], scores),
            "ours": lambda: select_largest(scores, k).mask(0),
        },
        dense="topk",
        check=check,
        rounds=5,
        work_bytes=4 * COUNT,
        benchmark=benchmark,
    )
