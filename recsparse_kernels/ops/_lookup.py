"""Checks of lookups, the same for every kind of table: the arguments of ``nn.Embedding`` and ``nn.EmbeddingBag``."""

from torch import Tensor

from ._check import INDEX_DTYPES, check_device, check_dtype, check_shape, check_tensor, shape

POOLING_MODES = ("sum", "mean", "max")


def padding_index(padding_idx: int | None, num_embeddings: int) -> int:
    """As torch: negative counts from the end; -1 for None.

    Raises:
        ValueError: outside the table.
    """
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx must be in [{-num_embeddings}, {num_embeddings}); got {padding_idx}")
    return padding_idx % num_embeddings


def check_mode(mode: str, **not_for_max: bool) -> None:
    """``not_for_max``: options by name, each of which needs sum or mean when it is set."""
    if mode not in POOLING_MODES:
        raise ValueError(f"mode must be one of {POOLING_MODES}; got {mode!r}")
    for name, given in not_for_max.items():
        if given and mode == "max":
            raise ValueError(f"{name} needs mode 'sum' or 'mean'; got 'max'")


def check_bags(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> None:
    """Bags are ``[N]`` with offsets, or ``[B, L]``."""
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError(
                "offsets must be None with a 2-D input, [bags, length]: it gives the bags already"
            )
        if include_last_offset:
            raise ValueError("include_last_offset must be False with a 2-D input, [bags, length]")
        return
    if input.dim() != 1:
        raise ValueError(f"input must have shape [N] with offsets, or [bags, length]; got {shape(input)}")
    if offsets is None:
        raise ValueError("offsets must be given with a 1-D input: it says where each bag begins; got None")
    check_dtype("offsets", offsets, INDEX_DTYPES)
    check_shape("offsets", offsets, (None,), "[bags]")
    check_device("offsets", offsets, "input", input)
    if include_last_offset and offsets.shape[0] == 0:
        raise ValueError("offsets must have at least one element with include_last_offset; got none")


def check_sample_weights(per_sample_weights: Tensor | None, input: Tensor) -> None:
    """Any floating dtype, the shape of ``input``."""
    if per_sample_weights is None:
        return
    check_tensor("per_sample_weights", per_sample_weights)
    if not per_sample_weights.is_floating_point():
        raise TypeError(f"per_sample_weights must be floating; got {per_sample_weights.dtype}")
    check_shape("per_sample_weights", per_sample_weights, tuple(input.shape), "the shape of input")
    check_device("per_sample_weights", per_sample_weights, "input", input)
