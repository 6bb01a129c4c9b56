"""Histograms and masks over the order of scores, on every backend: whole numbers, so equal to the last bit."""

import pytest
import torch

from recsparse_kernels.ops.selection import HISTOGRAM, MASK
from recsparse_kernels.reference import selection as reference
from recsparse_kernels.testing import backends
from recsparse_kernels.testing.selection import make_scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# shift, width, first: leading digits of 32 and 64 bits, ones in the middle, the last
DIGITS = [(21, 11, -1024), (53, 11, -1024), (10, 11, 1 << 18), (0, 10, 0x3F800000), (30, 12, -2), (0, 1, 0)]


def ordered(scores: torch.Tensor) -> list[int]:
    """Keys by another way: sign and magnitude of the floats' bits, one at a time."""
    out = []
    for value in scores.float().tolist():
        bits = int(torch.tensor(abs(value)).view(torch.int32))
        out.append(-bits - 1 if value < 0 else bits)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_in_the_order_of_the_scores(dtype):
    scores = make_scores("few", 50, dtype)
    assert reference._keys(scores).tolist() == ordered(scores)


@pytest.mark.parametrize("backend", backends("selection_histogram"), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "few", "zeros"])
def test_histogram(backend, dtype, kind):
    for count in (1, 300, 2999):
        scores, position = make_scores(kind, count, dtype), (1 << 63) - 7
        for shift, width, first in DIGITS:
            for ties_of in (None, 0, 0x3F800000):
                got = HISTOGRAM(scores, ties_of, position, shift, width, first, backend=backend)
                wanted = reference.selection_histogram(scores, ties_of, position, shift, width, first)
                assert got.dtype == torch.int64 and torch.equal(got, wanted), (count, shift, ties_of)


@pytest.mark.parametrize("backend", backends("selection_mask"), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "few", "zeros"])
def test_mask(backend, dtype, kind):
    for count in (1, 300, 2999):
        scores = make_scores(kind, count, dtype)
        for key in (0, 0x3F800000, -0x3F800001, (1 << 63) - 1):
            for tie in (None, -(1 << 63), 0, (1 << 63) - 1):
                got = MASK(scores, key, tie, -5, backend=backend)
                assert torch.equal(got, reference.selection_mask(scores, key, tie, -5)), (count, key, tie)


@pytest.mark.parametrize("backend", backends("selection_mask"), indirect=True)
def test_empty_and_strided(backend):
    empty = torch.empty(0)
    assert HISTOGRAM(empty, None, 0, 21, 11, -1024, backend=backend).tolist() == [0] * 2048
    assert MASK(empty, 0, None, 0, backend=backend).shape == (0,)
    wide = make_scores("normal", 2000, torch.float32).view(500, 4)
    apart = wide[:, 1]
    for ties_of in (None, 0):
        got = HISTOGRAM(apart, ties_of, 3, 21, 11, -1024, backend=backend)
        wanted = HISTOGRAM(apart.contiguous(), ties_of, 3, 21, 11, -1024, backend=backend)
        assert torch.equal(got, wanted)
    assert torch.equal(MASK(apart, 0, 0, 3, backend=backend), MASK(apart.clone(), 0, 0, 3, backend=backend))


@pytest.mark.parametrize("backend", backends("selection_mask", interpreter=False), indirect=True)
def test_any_number_of_threads_counts_alike(backend, threads):
    scores = make_scores("normal", 1 << 18, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((HISTOGRAM(scores, None, 0, 21, 11, -1024, backend=backend),
                        MASK(scores, 0, 0, 0, backend=backend)))  # fmt: skip
    for histogram, mask in results[1:]:
        assert torch.equal(histogram, results[0][0]) and torch.equal(mask, results[0][1])


@pytest.mark.parametrize("backend", backends("selection_mask"), indirect=True)
def test_opcheck(backend):
    scores = make_scores("normal", 100, torch.float32)
    torch.library.opcheck(HISTOGRAM.overload(backend), (scores, 0, 5, 21, 11, -1024))
    torch.library.opcheck(HISTOGRAM.overload(backend), (scores, None, 5, 21, 11, -1024))
    torch.library.opcheck(MASK.overload(backend), (scores, 0, None, 5))
    torch.library.opcheck(MASK.overload(backend), (scores, 0, 3, 5))


@pytest.mark.parametrize("backend", backends("selection_mask"), indirect=True)
def test_bad_input(backend):
    scores = torch.zeros(4)
    for bad in ((scores, None, 0, 64, 11, 0), (scores, None, 0, -1, 11, 0), (scores, None, 0, 0, 13, 0),
                (scores, None, 0, 0, 0, 0), (scores.view(2, 2), None, 0, 0, 1, 0)):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            HISTOGRAM(*bad, backend=backend)
    with pytest.raises(ValueError, match="scores"):
        MASK(scores.view(2, 2), 0, None, 0, backend=backend)
