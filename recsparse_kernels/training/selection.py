"""The exact number of largest scores out of very many, without a sort.

Radix selection: a histogram of the scores' leading 11 bits finds the bucket of the last one taken, the
next 11 bits within that bucket narrow it down, and so on. Scores are read a chunk at a time and may be computed as
they are read, so a billion of them need no memory of their own. Scores equal to the last one taken are
ranked by a hash of seed and position: the same choice for any chunk size, thread count, device and run.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.selection import HISTOGRAM, MASK
from ..reference.selection import signed

CHUNK = 1 << 18  # scores read at a time: they stay in the cache
GPU_CHUNK = 1 << 22  # on a GPU: enough to fill it
_DIGIT_BITS = 11  # a histogram of 2048 counters is small beside a chunk
_SEED_STEP = 0x9E3779B97F4A7C15  # between the tie keys of two seeds
_LOW = -(1 << 63)


@dataclasses.dataclass(frozen=True)
class ScoreStream:
    """Scores that are computed when they are read.

    Args:
        numel: how many.
        chunk: ``chunk(begin, end)`` gives scores ``[end - begin]``; the same at every call.
        device: of what ``chunk`` gives.
        dtype: of what ``chunk`` gives; narrower ones may be given for float32.
    """

    numel: int
    chunk: Callable[[int, int], Tensor]
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def chunks(self, begin: int = 0, end: int | None = None, name: str = "scores"):
        """``(position of the first, scores)``, a chunk at a time."""
        end = self.numel if end is None else end
        size = CHUNK if self.device.type == "cpu" else GPU_CHUNK
        for at in range(begin, end, size):
            stop = min(at + size, end)
            scores = self.chunk(at, stop)
            if scores.shape != (stop - at,):
                raise ValueError(f"{name}: wanted {stop - at} scores; got shape {tuple(scores.shape)}")
            if (scores.dtype == torch.float64) != (self.dtype == torch.float64):
                raise TypeError(f"{name}: the stream was said to be {self.dtype}; got {scores.dtype}")
            yield at, scores


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Taken: keys above ``key``; and of those equal to it, tie keys of at least ``tie`` (None: no tie key)."""

    key: int
    tie: int | None


_NOTHING = _Cut((1 << 63) - 1, None)


@dataclasses.dataclass
class Selection:
    """What was selected; masks are made on demand, so that they need never exist all at once."""

    counts: list[int]  # of each tensor of scores
    _streams: list["_Keyed"]
    _cuts: list[_Cut]

    def mask(self, index: int, begin: int = 0, end: int | None = None) -> Tensor:
        """Bool ``[end - begin]``: which of scores ``begin:end`` of one tensor are selected."""
        entry, cut = self._streams[index], self._cuts[index]
        end = entry.stream.numel if end is None else end
        out = torch.empty(end - begin, dtype=torch.bool, device=entry.stream.device)
        for at, scores in entry.chunks(begin, end):
            out[at - begin : at - begin + len(scores)] = MASK(scores, cut.key, cut.tie, entry.position(at))
        return out

    def masks(self) -> list[Tensor]:
        return [self.mask(i) for i in range(len(self._streams))]


@dataclasses.dataclass(frozen=True)
class _Keyed:
    """A stream among others: its scores in the dtype of all, and where its tie keys begin."""

    stream: ScoreStream
    dtype: torch.dtype
    first_position: int

    def chunks(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Tensor]]:
        for at, scores in self.stream.chunks(begin, end):
            yield at, scores.to(self.dtype) if self.dtype == torch.float64 else scores

    def position(self, at: int) -> int:
        return signed(self.first_position + at)


def select_largest(
    scores: Tensor | ScoreStream | Sequence[Tensor | ScoreStream],
    count: int,
    *,
    seed: int = 0,
    minimum: Sequence[int] | None = None,
    maximum: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Selection:
    """Select the ``count`` largest scores over all tensors together, exactly.

    Args:
        scores: one or several tensors or streams, any floating dtype. ``-inf`` is never selected.
        seed: ranks equal scores.
        minimum, maximum: at least and at most so many of each tensor; the rest of the count goes to the
            largest of what is left.
        names: of the tensors, for messages.

    Raises:
        ValueError: a score is NaN; there are fewer than ``count`` to select from; or the minima or
            maxima leave no way to select ``count``.
    """
    single = isinstance(scores, (Tensor, ScoreStream))
    streams = [_stream(entry) for entry in ([scores] if single else scores)]
    names = list(names) if names is not None else [f"scores[{i}]" for i in range(len(streams))]
    eligible = [_eligible(stream, name) for stream, name in zip(streams, names, strict=True)]
    least = [0] * len(streams) if minimum is None else list(minimum)
    most = list(eligible) if maximum is None else [min(m, e) for m, e in zip(maximum, eligible, strict=True)]
    _check_bounds(count, least, most, eligible, names)

    dtype = torch.float64 if any(s.dtype == torch.float64 for s in streams) else torch.float32
    keyed, position = [], seed * _SEED_STEP
    for stream in streams:
        keyed.append(_Keyed(stream, dtype, position))
        position += stream.numel
    selection = Selection([0] * len(streams), keyed, [_NOTHING] * len(streams))

    def cut_at(pool: list[int], wanted: int) -> None:
        cut = _find_cut([keyed[i] for i in pool], wanted)
        for i in pool:
            selection._cuts[i] = cut
            selection.counts[i] = wanted if len(pool) == 1 else _count(selection, i)

    pool, left = list(range(len(streams))), count
    while pool:
        cut_at(pool, left)
        short = [i for i in pool if selection.counts[i] < least[i]]
        over = [i for i in pool if selection.counts[i] > most[i]]
        if not short and not over:
            break
        # Bounds that are violated by more in total do bind in the solution: fix those, then look again.
        lacking = sum(least[i] - selection.counts[i] for i in short)
        beyond = sum(selection.counts[i] - most[i] for i in over)
        bounds, binding = (least, short) if lacking >= beyond else (most, over)
        for i in binding:
            cut_at([i], bounds[i])
            left -= bounds[i]
        pool = [i for i in pool if i not in binding]
    return selection


def _stream(entry: Tensor | ScoreStream) -> ScoreStream:
    if isinstance(entry, ScoreStream):
        return entry
    if not isinstance(entry, Tensor) or not entry.is_floating_point():
        got = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
        raise TypeError(f"scores must be floating tensors or ScoreStreams; got {got}")
    flat = entry.detach().reshape(-1)
    return ScoreStream(flat.numel(), lambda begin, end: flat[begin:end], flat.device, flat.dtype)


def _eligible(stream: ScoreStream, name: str) -> int:
    found = 0
    for begin, part in stream.chunks(name=name):
        low = float(part.min())  # NaN if there is one
        if low != low:
            nans, end = int(part.isnan().sum()), begin + len(part)
            raise ValueError(f"{name} must not hold NaN; got {nans} in elements {begin} to {end}")
        found += len(part) - (int((part == -torch.inf).sum()) if low == -torch.inf else 0)
    return found


def _check_bounds(count, least, most, eligible, names) -> None:
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be an int of at least 0; got {count!r}")
    if count > sum(eligible):
        raise ValueError(f"count is {count}, but there are only {sum(eligible)} scores to select from")
    for i, name in enumerate(names):
        if not 0 <= least[i] <= most[i]:
            raise ValueError(f"{name}: minimum {least[i]} must be in [0, {most[i]}], the most it can give")
    if sum(least) > count:
        raise ValueError(f"count is {count}, below the sum of the minima, {sum(least)}: {_few(names, least)}")
    if sum(most) < count:
        raise ValueError(f"count is {count}, above the sum of the maxima, {sum(most)}: {_few(names, most)}")


def _few(names, numbers) -> str:
    text = ", ".join(f"{name} {number}" for name, number in list(zip(names, numbers, strict=True))[:8])
    return text + (", ..." if len(names) > 8 else "")


# -- cuts ----------------------------------------------------------------------------------------------------


def _find_cut(pool: list[_Keyed], count: int) -> _Cut:
    if count == 0:
        return _NOTHING

    def histogram(ties_of: int | None, shift: int, width: int, first: int) -> Tensor:
        counts = None
        for entry in pool:
            for at, scores in entry.chunks():
                part = HISTOGRAM(scores, ties_of, entry.position(at), shift, width, first)
                counts = part if counts is None else counts.add_(part)
        return counts.cpu()

    bits = 64 if pool[0].dtype == torch.float64 else 32
    key, missing, size = _radix(functools.partial(histogram, None), bits, count)
    if missing == size:
        return _Cut(key, _LOW)
    tie, _, _ = _radix(functools.partial(histogram, key), 64, missing)
    return _Cut(key, tie)


def _radix(histogram: Callable[[int, int, int], Tensor], bits: int, count: int) -> tuple[int, int, int]:
    """A key that ``count`` keys or more are at least; how many are needed of those at it, and how many are.

    The two numbers are equal where all keys from this one on are needed.
    """
    first, missing, size, shift = -1, count, 0, bits
    while shift:
        width = min(_DIGIT_BITS, shift)
        # keys are signed: the first digits begin below zero
        first = -(1 << (width - 1)) if shift == bits else first << width
        shift -= width
        counts = histogram(shift, width, first)
        above = counts.flip(0).cumsum(0).flip(0) - counts  # in higher buckets
        digit = int(((above < missing) & (above + counts >= missing)).nonzero()[0])
        missing -= int(above[digit])
        size = int(counts[digit])
        first += digit
        if missing == size:  # the whole bucket, whatever its lower digits
            break
    return first << shift, missing, size


def _count(selection: Selection, index: int) -> int:
    entry, cut = selection._streams[index], selection._cuts[index]
    return sum(
        int(MASK(scores, cut.key, cut.tie, entry.position(at)).count_nonzero())
        for at, scores in entry.chunks()
    )
