"""Exact selection against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsparse_kernels.training import ScoreStream, select_largest, selection


def brute(scores: list[torch.Tensor], count, least, most) -> list[int]:
    """How many of each: the best of all, within the bounds, by filling one at a time."""
    flat = sorted(
        ((float(v), i) for i, part in enumerate(scores) for v in part.double() if v > -np.inf), reverse=True
    )
    counts = list(least)
    seen = [0] * len(scores)
    left = count - sum(least)
    for _, i in flat:
        seen[i] += 1
        if seen[i] <= least[i]:
            continue  # taken already
        if left and counts[i] < most[i]:
            counts[i] += 1
            left -= 1
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 17, 500, 1200, 1536])
def test_the_largest(dtype, count):
    torch.manual_seed(0)
    scores = [torch.randn(1000).to(dtype), (torch.randn(24, 22) * 3).to(dtype), torch.empty(0, dtype=dtype),
              torch.tensor([-0.0, 0.0, float("inf"), -5, 1e-8, -1e-8, 3, 4], dtype=dtype)]  # fmt: skip
    chosen = select_largest(scores, count)
    masks = chosen.masks()
    assert [int(m.sum()) for m in masks] == chosen.counts and sum(chosen.counts) == count
    kept = torch.cat([s.flatten()[m] for s, m in zip(scores, masks, strict=True)]).double()
    every = torch.cat([s.flatten() for s in scores]).double()
    assert torch.equal(kept.sort().values, every.sort().values[len(every) - count :])


def test_ties_are_seeded_and_exact(monkeypatch):
    scores = torch.zeros(10_001)
    scores[::7] = 1.0
    first = select_largest(scores, 5000, seed=3).mask(0)
    assert first.sum() == 5000 and bool(first[::7].all())
    monkeypatch.setattr(selection, "CHUNK", 123)  # the choice does not depend on how scores are read
    assert torch.equal(first, select_largest(scores, 5000, seed=3).mask(0))
    assert not torch.equal(first, select_largest(scores, 5000, seed=4).mask(0))
    # and is even: every tenth of the positions gets its share of the ties (3571 of 8572)
    ties = first[scores == 0].float()
    assert (ties.unfold(0, 857, 857).mean(1) - 3571 / 8572).abs().max() < 0.08


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds(data):
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = [torch.from_numpy(rng.integers(-3, 4, n) + 10.0 * i) for i, n in enumerate(sizes)]
    for part in scores:
        part += torch.from_numpy(rng.random(len(part))) * 1e-3  # no ties: brute force breaks them its own way
    most = [data.draw(st.integers(0, n)) for n in sizes]
    least = [data.draw(st.integers(0, m)) for m in most]
    count = data.draw(st.integers(sum(least), sum(most)))
    chosen = select_largest(scores, count, minimum=least, maximum=most)
    assert chosen.counts == brute(scores, count, least, most)
    for i, part in enumerate(scores):
        mask = chosen.mask(i)
        assert int(mask.sum()) == chosen.counts[i]
        if 0 < chosen.counts[i] < len(part):
            assert part[mask].min() > part[~mask].max()


def test_streams_are_read_in_chunks(monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 64)
    torch.manual_seed(1)
    values, longest = torch.randn(1000), 0

    def chunk(begin, end):
        nonlocal longest
        longest = max(longest, end - begin)
        return values[begin:end].abs()

    chosen = select_largest(ScoreStream(1000, chunk), 100)
    assert longest == 64
    assert torch.equal(chosen.mask(0, 30, 700), (values.abs() >= values.abs().topk(100).values[-1])[30:700])


def test_errors():
    scores = [torch.arange(10.0), torch.arange(5.0)]
    with pytest.raises(ValueError, match="only 15"):
        select_largest(scores, 16)
    with pytest.raises(ValueError, match="layer b must not hold NaN; got 1"):
        select_largest([scores[0], torch.tensor([1.0, torch.nan])], 2, names=["layer a", "layer b"])
    with pytest.raises(ValueError, match="below the sum of the minima, 9"):
        select_largest(scores, 8, minimum=[5, 4])
    with pytest.raises(ValueError, match="above the sum of the maxima, 4"):
        select_largest(scores, 8, maximum=[2, 2])
    with pytest.raises(ValueError, match=r"minimum 6 must be in \[0, 5\]"):
        select_largest(scores, 8, minimum=[0, 6])
    with pytest.raises(ValueError, match="count must be"):
        select_largest(scores, -1)
    with pytest.raises(TypeError, match="floating"):
        select_largest(torch.arange(4), 1)
    stream = ScoreStream(4, lambda begin, end: torch.ones(end - begin, dtype=torch.float64))
    with pytest.raises(TypeError, match="said to be torch.float32; got torch.float64"):
        select_largest(stream, 2)
    with pytest.raises(ValueError, match="only 3"):  # -inf is never selected
        select_largest(torch.tensor([1.0, -torch.inf, 2.0, 3.0]), 4)
