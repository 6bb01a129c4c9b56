"""The exact number of largest scores out of very many, without a sort.

Radix selection: a histogram of the scores' leading 11 bits finds the bucket of the last one taken, the
next 11 bits within that bucket narrow it down, and so on. Scores are read a chunk at a time and may be computed as
they are read, so a billion of them need no memory of their own. Scores equal to the last one taken are
ranked by a hash of seed and position: the same choice for any chunk size, thread count, device and run.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 18  # scores read at a time: they and their keys stay in the cache
_DIGIT_BITS = 11  # a histogram of 2048 counters is small beside a chunk
_LOW = -(1 << 63)


@dataclasses.dataclass(frozen=True)
class ScoreStream:
    """Scores that are computed when they are read.

    Args:
        numel: how many.
        chunk: ``chunk(begin, end)`` gives scores ``[end - begin]``; the same at every call.
        device: of what ``chunk`` gives.
        dtype: likewise.
    """

    numel: int
    chunk: Callable[[int, int], Tensor]
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass
class Selection:
    """What was selected; masks are made on demand, so that they need never exist all at once."""

    counts: list[int]  # of each tensor of scores
    _streams: list[ScoreStream]
    _cuts: list["_Cut"]
    _offsets: list[int]
    _keys: Callable[[Tensor], Tensor]
    _seed: int

    def mask(self, index: int, begin: int = 0, end: int | None = None) -> Tensor:
        """Bool ``[end - begin]``: which of scores ``begin:end`` of one tensor are selected."""
        stream, cut = self._streams[index], self._cuts[index]
        end = stream.numel if end is None else end
        out = torch.empty(end - begin, dtype=torch.bool, device=stream.device)
        for at in range(begin, end, CHUNK):
            stop = min(at + CHUNK, end)
            key = self._keys(stream.chunk(at, stop))
            out[at - begin : stop - begin] = cut.takes(key, self._offsets[index] + at, self._seed)
        return out

    def masks(self) -> list[Tensor]:
        return [self.mask(i) for i in range(len(self._streams))]


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
    wide = torch.float64 if any(s.dtype == torch.float64 for s in streams) else torch.float32
    keys, bits = (_keys64, 64) if wide == torch.float64 else (_keys32, 32)
    eligible = [_eligible(stream, name) for stream, name in zip(streams, names, strict=True)]
    least = [0] * len(streams) if minimum is None else list(minimum)
    most = list(eligible) if maximum is None else [min(m, e) for m, e in zip(maximum, eligible, strict=True)]
    _check_bounds(count, least, most, eligible, names)

    offsets = [0]
    for stream in streams:
        offsets.append(offsets[-1] + stream.numel)
    selection = Selection([0] * len(streams), streams, [_Cut(0, None)] * len(streams), offsets, keys, seed)

    def cut_at(pool: list[int], wanted: int) -> None:
        readers = [(streams[i], offsets[i], keys) for i in pool]
        cut = _find_cut(readers, bits, wanted, seed)
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
    for begin in range(0, stream.numel, CHUNK):
        end = min(begin + CHUNK, stream.numel)
        part = stream.chunk(begin, end)
        if part.shape != (end - begin,):
            raise ValueError(f"{name}: wanted {end - begin} scores; got shape {tuple(part.shape)}")
        low = float(part.min())  # NaN if there is one
        if low != low:
            nans = int(part.isnan().sum())
            raise ValueError(f"{name} must not hold NaN; got {nans} in elements {begin} to {end}")
        found += end - begin - (int((part == -torch.inf).sum()) if low == -torch.inf else 0)
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


# -- keys: integers in the order of the scores ---------------------------------------------------------------


def _keys32(scores: Tensor) -> Tensor:
    bits = (scores.to(torch.float32) + 0.0).view(torch.int32)  # + 0.0: -0 becomes 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats count down


def _keys64(scores: Tensor) -> Tensor:
    bits = (scores.to(torch.float64) + 0.0).view(torch.int64)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


def _tie_keys(begin: int, length: int, seed: int, device) -> Tensor:
    """A permutation of all 64-bit integers (the finalizer of splitmix64), at ``begin + seed * odd``."""
    x = torch.arange(begin, begin + length, dtype=torch.int64, device=device)
    x = x + _signed(seed * 0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(number: int) -> int:
    number &= 0xFFFFFFFFFFFFFFFF
    return number - (1 << 64) if number >> 63 else number


def _shifted(x: Tensor, places: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (x >> places) & ((1 << (64 - places)) - 1)


# -- cuts ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Taken: keys above ``key``; and of those equal to it, tie keys of at least ``tie`` (None: no tie key)."""

    key: int
    tie: int | None

    def takes(self, key: Tensor, begin: int, seed: int) -> Tensor:
        above = key > self.key
        if self.tie is None:
            return above
        equal = key == self.key
        if self.tie == _LOW:
            return above | equal
        return above | (equal & (_tie_keys(begin, len(key), seed, key.device) >= self.tie))


def _find_cut(readers, bits: int, count: int, seed: int) -> _Cut:
    if count == 0:
        return _Cut((1 << (bits - 1)) - 1, None)

    def scores():
        for stream, _, keys in readers:
            for begin in range(0, stream.numel, CHUNK):
                yield keys(stream.chunk(begin, min(begin + CHUNK, stream.numel)))

    key, missing, size = _radix(scores, bits, count)
    if missing == size:
        return _Cut(key, _LOW)

    def ties():
        for stream, offset, keys in readers:
            for begin in range(0, stream.numel, CHUNK):
                equal = keys(stream.chunk(begin, min(begin + CHUNK, stream.numel))) == key
                if bool(equal.any()):
                    yield _tie_keys(offset + begin, len(equal), seed, equal.device)[equal]

    tie, _, _ = _radix(ties, 64, missing)
    return _Cut(key, tie)


def _radix(chunks: Callable, bits: int, count: int) -> tuple[int, int, int]:
    """A key that ``count`` keys or more are at least; how many are needed of those at it, and how many are.

    The two numbers are equal where all keys from this one on are needed.
    """
    prefix, missing, size, shift = 0, count, 0, bits
    while shift:
        top, width = shift == bits, min(_DIGIT_BITS, shift)
        shift -= width
        digits = 1 << width
        histogram = None
        for key in chunks():
            if top:
                digit = (key >> shift) + digits // 2  # the sign bit leads
            else:
                digit = (key[(key >> (shift + width)) == prefix] >> shift) & (digits - 1)
            counts = torch.bincount(digit, minlength=digits)
            histogram = counts if histogram is None else histogram.add_(counts)
        histogram = histogram.cpu()
        above = histogram.flip(0).cumsum(0).flip(0) - histogram  # in higher buckets
        digit = int(((above < missing) & (above + histogram >= missing)).nonzero()[0])
        missing -= int(above[digit])
        size = int(histogram[digit])
        prefix = digit - digits // 2 if top else prefix << width | digit
        if missing == size:  # the whole bucket, whatever its lower digits
            return prefix << shift, missing, size
    return prefix, missing, size


def _count(selection: Selection, index: int) -> int:
    stream = selection._streams[index]
    return sum(
        int(selection.mask(index, begin, min(begin + CHUNK, stream.numel)).count_nonzero())
        for begin in range(0, stream.numel, CHUNK)
    )
