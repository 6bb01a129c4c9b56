"""Pure schedules, ``step -> fraction``: they hold no state, compare equal, pickle, and print as written.

Before ``begin_step`` a schedule has its first value, at ``end_step`` its last. Past its end it raises,
because a method that is stepped longer than it was planned for is a mistake in the plan; ``hold=True``
keeps the last value instead.

>>> fraction = cosine(0.5, 0.005, end_step=1000)
>>> round(fraction(500), 4)
0.2525
"""

import dataclasses
import math

__all__ = ["Schedule", "constant", "cosine", "cubic", "linear", "piecewise"]

_SHAPES = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1 - t,
    "cubic": lambda t: (1 - t) ** 3,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """From ``start`` to ``end`` over ``[begin_step, end_step]``; made by the functions of this module."""

    kind: str
    start: float
    end: float
    begin_step: int
    end_step: int
    hold: bool

    def __post_init__(self):
        for name in ("start", "end"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite; got {getattr(self, name)}")
        for name in ("begin_step", "end_step"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an int; got {getattr(self, name)!r}")
        if not 0 <= self.begin_step < self.end_step:
            raise ValueError(
                f"begin_step must be at least 0 and below end_step; got {self.begin_step} and {self.end_step}"
            )

    def __call__(self, step: int) -> float:
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        if step > self.end_step and not self.hold:
            raise ValueError(
                f"step {step} is past the end of {self}: give a later end_step, or hold=True to keep {self.end}"
            )
        if step >= self.end_step:
            return self.end
        t = max(step - self.begin_step, 0) / (self.end_step - self.begin_step)
        return self.end + (self.start - self.end) * _SHAPES[self.kind](t)

    def __str__(self) -> str:
        begin = f", begin_step={self.begin_step}" if self.begin_step else ""
        hold = ", hold=True" if self.hold else ""
        return f"{self.kind}({self.start:g}, {self.end:g}{begin}, end_step={self.end_step}{hold})"


def cosine(
    start: float, end: float = 0.0, *, end_step: int, begin_step: int = 0, hold: bool = False
) -> Schedule:
    """Half a cosine: ``end + (start - end) / 2 * (1 + cos(pi t))``; slow, fast, slow."""
    return Schedule("cosine", start, end, begin_step, end_step, hold)


def linear(
    start: float, end: float = 0.0, *, end_step: int, begin_step: int = 0, hold: bool = False
) -> Schedule:
    """A straight line."""
    return Schedule("linear", start, end, begin_step, end_step, hold)


def cubic(
    start: float, end: float = 0.0, *, end_step: int, begin_step: int = 0, hold: bool = False
) -> Schedule:
    """``end + (start - end) (1 - t)^3``: fast first, then slow (gradual pruning, Zhu and Gupta 2017)."""
    return Schedule("cubic", start, end, begin_step, end_step, hold)


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: int) -> float:
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        return self.value

    def __str__(self) -> str:
        return f"constant({self.value:g})"


def constant(value: float) -> _Constant:
    """The same value at every step; has no end."""
    if not math.isfinite(value):
        raise ValueError(f"value must be finite; got {value}")
    return _Constant(value)


@dataclasses.dataclass(frozen=True)
class _Piecewise:
    pieces: tuple[tuple[int, float], ...]

    def __call__(self, step: int) -> float:
        return self.pieces[self.index(step)][1]

    def index(self, step: int) -> int:
        """Which piece a step belongs to."""
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        for i, (end_step, _) in enumerate(self.pieces):
            if step < end_step:
                return i
        raise ValueError(f"step {step} is past the end of {self}: its last piece ends at {self.end_step}")

    @property
    def end_step(self) -> int:
        return self.pieces[-1][0]

    def __str__(self) -> str:
        return f"piecewise({', '.join(f'({end}, {value:g})' for end, value in self.pieces)})"


def piecewise(*pieces: tuple[int, float]) -> _Piecewise:
    """``(end_step, value)`` pairs, ends rising: each value holds up to, and not including, its end."""
    if not pieces:
        raise ValueError("piecewise needs at least one (end_step, value)")
    begin = 0
    for end_step, value in pieces:
        if not isinstance(end_step, int) or end_step <= begin:
            raise ValueError(f"end_step must be an int above {begin}; got {end_step!r} in {pieces}")
        if not math.isfinite(value):
            raise ValueError(f"value must be finite; got {value} in {pieces}")
        begin = end_step
    return _Piecewise(tuple((end, float(value)) for end, value in pieces))
