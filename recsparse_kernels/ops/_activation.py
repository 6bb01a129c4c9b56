"""Names of the fused activations and the numbers that the ops take (csrc/cpu/types.h)."""

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3, "sigmoid": 4, "tanh": 5}


def activation_code(name: str | None, argument: str = "activation") -> int:
    """The op's number for an activation name.

    Raises:
        ValueError: the name is none of `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(repr(known) for known in ACTIVATIONS)
        raise ValueError(f"{argument} must be one of {known}; got {name!r}")
    return ACTIVATIONS[name]
