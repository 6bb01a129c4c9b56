"""2:4 semi-structured weights: prune masks, compress, decompress, linear.

The storage is defined at the top of recsparse_kernels/reference/sparse24.py: two values for each group
of four columns, and 2 bits of metadata for each value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from ..reference import sparse24 as reference
from ..reference.sparse24 import padded
from . import _check as check
from ._activation import activation_backward, activation_code, needs_sum
from ._backend import TEST_BACKENDS, Op

__all__ = [
    "sparse24_compress",
    "sparse24_compress_both",
    "sparse24_decompress",
    "sparse24_from_torch",
    "sparse24_gather",
    "sparse24_is_transposable",
    "sparse24_linear",
    "sparse24_linear_ste",
    "sparse24_mask",
    "sparse24_prune",
    "sparse24_prune_both",
    "sparse24_transpose",
]


def sparse24_mask(weight: Tensor, *, transposable: bool = False, backend: str | None = None) -> Tensor:
    r"""Which elements a 2:4 weight keeps: the largest magnitudes.

    Args:
        weight: ``[O, I]``, any floating dtype.
        transposable: False keeps the two largest of each group of four along I (of equal ones the
            first). True keeps, in each 4 x 4 tile, the best of the 90 patterns with two in every row
            and column, so that the transposed weight is 2:4 as well (of equal ones the first in
            lexicographic order); exact, not a greedy search.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        ``[O, I]`` bool, True means kept. NaN counts as the largest magnitude. A last group or tile that
        is not whole keeps at most two as well.
    """
    check.check_dtype("weight", weight)
    check.check_shape("weight", weight, (None, None), "[O, I]")
    return _mask(weight, bool(transposable), backend=backend)


def sparse24_compress(weight: Tensor, mask: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    r"""Pack a masked weight; differentiable with respect to ``weight`` (zero where not kept).

    Args:
        weight: ``[O, I]``, any floating dtype.
        mask: ``[O, I]`` bool, at most two True in each group of four along I. A group with fewer stores
            zeros at its highest free columns.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        values ``[O, P / 2]``, metadata ``[O, P / 8]`` uint8, P = I rounded up to a multiple of 16.

    Raises:
        ValueError: the mask keeps more than two in a group: the message names the first.
    """
    _check_mask(weight, mask)
    return _compress(weight, mask, backend=backend)


def sparse24_prune(
    weight: Tensor, *, transposable: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""`sparse24_mask` and `sparse24_compress` together: no mask is made where the backend can do without.

    Args:
        weight: ``[O, I]``, any floating dtype; differentiable as in `sparse24_compress`.
        transposable: as in `sparse24_mask`.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        values ``[O, P / 2]``, metadata ``[O, P / 8]`` uint8.
    """
    check.check_dtype("weight", weight)
    check.check_shape("weight", weight, (None, None), "[O, I]")
    return _prune(weight, bool(transposable), backend=backend)


def sparse24_compress_both(
    weight: Tensor, mask: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""`sparse24_compress` of W and of its transpose W', in one pass over the weight; differentiable.

    Args:
        weight: ``[O, I]``, any floating dtype.
        mask: ``[O, I]`` bool, at most two True in each group of four along I and in each along O, as
            `sparse24_mask` with ``transposable=True`` gives.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        values ``[O, P / 2]``, metadata ``[O, P / 8]`` uint8 of W, P = I rounded up to a multiple of 16;
        values_t ``[I, Q / 2]``, metadata_t ``[I, Q / 8]`` uint8 of W', Q = O rounded up so.

    Raises:
        ValueError: the mask keeps more than two in a group of a row or a column: the message names the first.
    """
    _check_mask(weight, mask)
    return _compress_both(weight, mask, backend=backend)


def sparse24_prune_both(
    weight: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""`sparse24_prune` with a transposable mask, and the pack of the transposed weight, in one pass.

    Args:
        weight: ``[O, I]``, any floating dtype; differentiable as in `sparse24_compress`.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        values, metadata, values_t, metadata_t as in `sparse24_compress_both`.
    """
    check.check_dtype("weight", weight)
    check.check_shape("weight", weight, (None, None), "[O, I]")
    return _prune_both(weight, backend=backend)


def sparse24_transpose(
    values: Tensor, metadata: Tensor, in_features: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""The pack of the transpose W' from that of W; differentiable with respect to ``values``.

    Args:
        values: ``[O, P / 2]``, P = ``in_features`` rounded up to a multiple of 16.
        metadata: ``[O, P / 8]`` uint8, of a weight that is 2:4 along O too (`sparse24_is_transposable`).
            Where it is not, the first two that are stored of four rows of a column stay; nothing is
            checked, for on a GPU that would mean to wait for it.
        in_features: I.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        values_t ``[I, Q / 2]``, metadata_t ``[I, Q / 8]`` uint8, Q = O rounded up to a multiple of 16.
    """
    _check_packed(values, metadata, in_features)
    return _transpose(values, metadata, in_features, backend=backend)


def sparse24_is_transposable(metadata: Tensor, in_features: int) -> bool:
    r"""Whether at most two of each four rows are stored in every column, zeros that fill groups up included.

    Args:
        metadata: ``[O, P / 8]`` uint8, P = ``in_features`` rounded up to a multiple of 16. The answer is
            waited for; of a tensor without data (meta, fake) it is False.
        in_features: I.
    """
    _check_metadata(metadata, in_features, "metadata", metadata)
    if metadata.is_meta or isinstance(metadata, FakeTensor):
        return False
    groups = torch.stack((metadata & 15, metadata >> 4), dim=2).flatten(1)
    one = torch.ones_like(groups)
    sets = one << (groups & 3) | one << (groups >> 2)
    # bit c: column c of the group is stored; four rows, [O / 4, 4, P / 4]
    sets = F.pad(sets, (0, 0, 0, -len(sets) % 4)).unflatten(0, (-1, 4))
    stored = torch.stack([(sets >> place & 1).sum(1, dtype=torch.uint8) for place in range(4)], dim=2)
    return bool((stored.flatten(1)[:, :in_features] <= 2).all())


def sparse24_gather(dense: Tensor, metadata: Tensor, *, backend: str | None = None) -> Tensor:
    r"""The elements of a dense ``[O, I]`` tensor at the kept positions: values ``[O, P / 2]``.

    The inverse of `sparse24_decompress` for any dense tensor: a gradient, a moment, newer weights.
    """
    check.check_dtype("dense", dense)
    check.check_shape("dense", dense, (None, None), "[O, I]")
    _check_metadata(metadata, dense.shape[1], "dense", dense)
    check.check_shape("metadata", metadata, (dense.shape[0], None), "[O, P / 8]")
    return _gather(dense, metadata, backend=backend)


def sparse24_decompress(
    values: Tensor, metadata: Tensor, in_features: int, *, backend: str | None = None
) -> Tensor:
    r"""The dense weight, differentiable with respect to ``values``.

    Args:
        values: ``[O, P / 2]``, P = ``in_features`` rounded up to a multiple of 16.
        metadata: ``[O, P / 8]`` uint8.
        in_features: I.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        ``[O, I]``, zero where nothing was kept.
    """
    _check_packed(values, metadata, in_features)
    return _decompress(values, metadata, in_features, backend=backend)


def sparse24_linear(
    input: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    transposable: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""``activation(input @ W.T + bias)`` with a compressed 2:4 weight ``W [O, I]``.

    Args:
        input: ``[..., I]``, float32, bfloat16, float16 (float64: reference).
        values: ``[O, P / 2]``, same dtype as ``input``, P = I rounded up to a multiple of 16.
        metadata: ``[O, P / 8]`` uint8; any bytes are safe, two equal positions in a group are not a
            weight that `sparse24_decompress` can give back.
        bias: ``[O]`` or None.
        activation: None, "relu", "gelu" (erf form), "silu", "sigmoid" or "tanh", fused.
        transposable: ``metadata`` is 2:4 along O too (`sparse24_is_transposable`; not checked). Where
            sparse tensor cores multiply (CUDA C++, bfloat16 and float16), the gradient to ``input`` is
            then a 2:4 product with the transposed pack; elsewhere one pack serves as well.
        backend: "native", "triton" or "reference"; None takes the fastest measured, else the first available.

    Returns:
        ``[..., O]``, dtype of ``input``, accumulated in float32. Gradients: ``input``, ``values`` (only
        at kept positions), ``bias``.

    An infinite or NaN input reaches the outputs that keep its column; a dense product would turn the
    others into NaN too (0 * inf), and so do backends "reference" and "triton", and float32 on CUDA.

    Backend "triton" expands tiles of the weight in registers and multiplies them as dense, for Triton has
    no sparse matrix instruction: it saves bytes (small batch), not operations.
    """
    check.check_dtype("input", input)
    if input.dim() == 0:
        raise ValueError("input must have shape [..., I]; got a tensor without dimensions")
    _check_packed(values, metadata, input.shape[-1])
    _check_operands(input, "values", values, bias, values.shape[0])
    code = activation_code(activation)
    keep_sum = needs_sum(code) and _wants_grad(input, values, bias)
    rows = _as_rows(input)
    second_pack = _second_pack(values, transposable, backend)
    output, _ = _linear(rows, values, metadata, bias, code, keep_sum, second_pack, backend=backend)
    return output.reshape(*input.shape[:-1], values.shape[0])


def sparse24_linear_ste(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    decay: float = 0.0,
    transposable: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""2:4 linear that trains the dense weight, by the straight-through estimator.

    The forward product and the gradient to ``input`` use the masked weight, compressed on the fly; the
    gradient to ``weight`` is dense, as if nothing had been masked.

    Args:
        input: ``[..., I]``.
        weight: ``[O, I]``, same dtype.
        mask: ``[O, I]`` bool; None takes what ``sparse24_prune(weight, transposable=transposable)`` keeps.
        bias: ``[O]`` or None.
        activation: as in `sparse24_linear`.
        decay: adds ``decay * weight`` to the gradient of what the mask drops (sparse-refined
            straight-through estimator, Zhou et al., "Learning N:M fine-grained structured sparse neural
            networks from scratch", ICLR 2021): dropped weights fade instead of flickering.
        transposable: ``mask`` keeps at most two of four in columns too. Where sparse tensor cores
            multiply (CUDA C++, bfloat16 and float16), the weight is packed both ways, so that the
            gradient to ``input`` is a 2:4 product as well. The CPU's kernel of that gradient costs no
            more from one pack.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        ``[..., O]``.
    """
    check.check_dtype("input", input)
    if input.dim() == 0:
        raise ValueError("input must have shape [..., I]; got a tensor without dimensions")
    check.check_shape("weight", weight, (None, input.shape[-1]), "[O, I]")
    _check_operands(input, "weight", weight, bias, weight.shape[0])
    if decay < 0:
        raise ValueError(f"decay must not be negative; got {decay}")
    code = activation_code(activation)
    keep_sum = needs_sum(code) and _wants_grad(input, weight, bias)
    frozen = weight.detach()
    if _wants_grad(input) and _second_pack(weight, transposable, backend):
        if mask is None:
            packs = sparse24_prune_both(frozen, backend=backend)
        else:
            packs = sparse24_compress_both(frozen, mask, backend=backend)
    elif mask is None:
        packs = (*sparse24_prune(frozen, transposable=transposable, backend=backend), None, None)
    else:
        packs = (*sparse24_compress(frozen, mask, backend=backend), None, None)
    rows = _as_rows(input)
    output, _ = _linear_ste(rows, weight, *packs, bias, code, keep_sum, float(decay), backend=backend)
    return output.reshape(*input.shape[:-1], weight.shape[0])


def sparse24_from_torch(tensor: Tensor) -> tuple[Tensor, Tensor]:
    r"""values, metadata of a ``torch.sparse.SparseSemiStructuredTensor``.

    The CUTLASS layout of 16-bit types is read directly, on any device; any other (cuSPARSELt, float32,
    which torch prunes 1:2) goes through ``to_dense()``, where torch can do that.
    """
    from torch.sparse import SparseSemiStructuredTensor
    from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

    if not isinstance(tensor, SparseSemiStructuredTensor):
        raise TypeError(f"tensor must be a SparseSemiStructuredTensor; got {type(tensor).__name__}")
    O, I = tensor.shape
    meta, packed = getattr(tensor, "meta", None), tensor.packed
    if meta is not None and meta.dtype == torch.int16 and meta.dim() == 2 and packed is not None:
        if packed.dtype in (torch.float16, torch.bfloat16) and packed.shape == (O, I // 2):
            # torch scatters natural-order metadata for the tensor cores: gather it back
            at = _calculate_meta_reordering_scatter_offsets(O, meta.shape[1], meta.dtype, meta.device)
            natural = meta.reshape(-1).gather(0, at).view(O, -1)
            return packed.clone(), natural.view(torch.uint8).clone()
    dense = tensor.to_dense()
    return sparse24_compress(dense, dense != 0)


def _as_rows(input: Tensor) -> Tensor:
    """``[..., I]`` as ``[B, I]``; sizes are spelled out, as -1 has no meaning where I is 0."""
    if input.dim() == 2:
        return input
    return input.unsqueeze(0) if input.dim() == 1 else input.flatten(0, -2)


def _check_mask(weight: Tensor, mask: Tensor) -> None:
    check.check_dtype("weight", weight)
    check.check_shape("weight", weight, (None, None), "[O, I]")
    check.check_dtype("mask", mask, (torch.bool,))
    check.check_shape("mask", mask, tuple(weight.shape), "that of weight")
    check.check_device("mask", mask, "weight", weight)


def _second_pack(weight: Tensor, transposable: bool, backend: str | None) -> bool:
    """Whether the gradient to the input takes the pack of W': where a product with the weight runs on
    sparse tensor cores, 16-bit types in CUDA C++."""
    device_type = weight.device.type
    if not transposable or device_type == "meta":
        return False
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    picked = backend or _linear.backends(device_type, dtype)[0]
    return picked == "native" and device_type == "cuda" or picked in TEST_BACKENDS


def _check_metadata(metadata: Tensor, in_features: int, like_name: str, like: Tensor) -> None:
    check.check_dtype("metadata", metadata, (torch.uint8,))
    letters = f"[O, P / 8], P = {padded(in_features)} for in_features {in_features},"
    check.check_shape("metadata", metadata, (None, padded(in_features) // 8), letters)
    check.check_device("metadata", metadata, like_name, like)


def _check_packed(values: Tensor, metadata: Tensor, in_features: int) -> None:
    if in_features < 0:
        raise ValueError(f"in_features must not be negative; got {in_features}")
    check.check_dtype("values", values)
    _check_metadata(metadata, in_features, "values", values)
    wanted = (metadata.shape[0], 4 * metadata.shape[1])
    check.check_shape("values", values, wanted, "[O, P / 2]")


def _check_operands(input: Tensor, name: str, weight: Tensor, bias: Tensor | None, out_features: int) -> None:
    autocast = check.in_autocast(input)  # casts to one dtype
    for operand_name, operand in ((name, weight), ("bias", bias)):
        if operand is None:
            continue
        check.check_dtype(operand_name, operand)
        if autocast:
            check.check_device(operand_name, operand, "input", input)
        else:
            check.check_like(operand_name, operand, "input", input)
    if bias is not None:
        check.check_shape("bias", bias, (out_features,), "[O]")


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- registration: fake, gradient, autocast, shape class ----


def _mask_fake(weight, transposable):
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


def _packed_fake(weight):
    O, P = weight.shape[0], padded(weight.shape[1])
    return weight.new_empty(O, P // 2), weight.new_empty(O, P // 8, dtype=torch.uint8)


def _packed_both_fake(weight):
    O, I = weight.shape
    return *_packed_fake(weight), *_packed_fake(weight.new_empty(I, O))


def _transpose_fake(values, metadata, in_features):
    return _packed_fake(values.new_empty(in_features, values.shape[0]))


def _gather_fake(dense, metadata):
    return dense.new_empty(metadata.shape[0], metadata.shape[1] * 4)


def _decompress_fake(values, metadata, in_features):
    return values.new_empty(values.shape[0], in_features)


def _linear_fake(input, values, metadata, bias, activation, keep_sum, transposable):
    shape = (input.shape[0], values.shape[0])
    return input.new_empty(shape), input.new_empty(shape if keep_sum else (0,))


def _linear_ste_fake(
    input, weight, values, metadata, values_t, metadata_t, bias, activation, keep_sum, decay
):
    return _linear_fake(input, values, metadata, bias, activation, keep_sum, False)


# Of the ops that pack, one way (values, metadata) or both. A stored zero that only fills a group up has
# no gradient: such are where the mask keeps fewer than two, as a transposable one may at an edge.


def _compress_setup(ctx, inputs, output):
    ctx.sizes = inputs[0].shape
    ctx.save_for_backward(inputs[1], *output[1::2])
    ctx.mark_non_differentiable(*output[1::2])


def _compress_backward(ctx, *grads, backend):
    mask, *metadata = ctx.saved_tensors
    return torch.where(mask, _grad_of_packs(ctx, grads, metadata, backend), 0), None


def _prune_setup(ctx, inputs, output):
    weight, *options = inputs
    transposable = options != [False]
    ctx.sizes, ctx.options = weight.shape, len(options)
    ctx.save_for_backward(weight if transposable else None, *output[1::2])
    ctx.mark_non_differentiable(*output[1::2])


def _prune_backward(ctx, *grads, backend):
    weight, *metadata = ctx.saved_tensors
    grad = _grad_of_packs(ctx, grads, metadata, backend)
    if weight is not None:
        grad = torch.where(_mask(weight, True, backend=backend), grad, 0)
    return grad, *[None] * ctx.options


def _grad_of_packs(ctx, grads, metadata, backend):
    O, I = ctx.sizes
    grad = _decompress(grads[0], metadata[0], I, backend=backend)
    if len(metadata) == 1:
        return grad
    return grad + _decompress(grads[2], metadata[1], O, backend=backend).t()


def _transpose_setup(ctx, inputs, output):
    values, metadata, _ = inputs
    ctx.out_features = values.shape[0]
    ctx.save_for_backward(metadata, output[1])
    ctx.mark_non_differentiable(output[1])


def _transpose_backward(ctx, grad_values_t, _, *, backend):
    metadata, metadata_t = ctx.saved_tensors
    dense = _decompress(grad_values_t, metadata_t, ctx.out_features, backend=backend)
    return _gather(dense.t(), metadata, backend=backend), None, None


def _decompress_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _decompress_backward(ctx, grad_dense, *, backend):
    (metadata,) = ctx.saved_tensors
    return _gather(grad_dense, metadata, backend=backend), None, None


def _gather_setup(ctx, inputs, output):
    dense, metadata = inputs
    ctx.in_features = dense.shape[1]
    ctx.save_for_backward(metadata)


def _gather_backward(ctx, grad_values, *, backend):
    (metadata,) = ctx.saved_tensors
    return _decompress(grad_values, metadata, ctx.in_features, backend=backend), None


def _linear_setup(ctx, inputs, output):
    input, values, metadata, bias, activation, keep_sum, transposable = inputs
    ctx.activation, ctx.keep_sum, ctx.transposable = activation, keep_sum, transposable
    from_output = activation != 0 and not needs_sum(activation)
    saved = output[1] if keep_sum else output[0] if from_output else None
    ctx.save_for_backward(input, values, metadata, bias, saved)
    ctx.mark_non_differentiable(output[1])


def _grad_sum(ctx, grad_output, input, values, metadata, bias, saved, backend):
    """Gradient before the activation; the sum is computed again where it was not kept."""
    if needs_sum(ctx.activation) and not ctx.keep_sum:
        saved, _ = _linear(input, values, metadata, bias, 0, False, False, backend=backend)
    return activation_backward(grad_output, saved, ctx.activation)


def _input_gradient(grad, pack, pack_t, in_features, backend):
    """A product with the pack of W' where there is one. A second derivative does without: the gradient
    op says that it has none."""
    if pack_t is None:
        return _grad_input(grad, *pack, in_features, backend=backend)
    return _linear(grad, *pack_t, None, 0, False, False, backend=backend)[0]


def _linear_backward(ctx, grad_output, _, *, backend):
    input, values, metadata, bias, saved = ctx.saved_tensors
    grad = _grad_sum(ctx, grad_output, input, values, metadata, bias, saved, backend)
    wanted = ctx.needs_input_grad
    grad_input = grad_values = grad_bias = None
    if wanted[0]:
        in_features, pack_t = input.shape[1], None
        if ctx.transposable and not torch.is_grad_enabled():
            pack_t = _transpose(values, metadata, in_features, backend=backend)
        grad_input = _input_gradient(grad, (values, metadata), pack_t, in_features, backend)
    if wanted[1]:
        grad_values = _grad_values(grad, input, metadata, backend=backend)
    if wanted[3]:
        grad_bias = grad.sum(0)
    return grad_input, grad_values, None, grad_bias, None, None, None


def _linear_ste_setup(ctx, inputs, output):
    input, weight, values, metadata, values_t, metadata_t, bias, activation, keep_sum, decay = inputs
    ctx.activation, ctx.keep_sum, ctx.decay = activation, keep_sum, decay
    from_output = activation != 0 and not needs_sum(activation)
    saved = output[1] if keep_sum else output[0] if from_output else None
    ctx.save_for_backward(input, weight, values, metadata, values_t, metadata_t, bias, saved)
    ctx.mark_non_differentiable(output[1])


def _linear_ste_backward(ctx, grad_output, _, *, backend):
    input, weight, values, metadata, values_t, metadata_t, bias, saved = ctx.saved_tensors
    grad = _grad_sum(ctx, grad_output, input, values, metadata, bias, saved, backend)
    wanted = ctx.needs_input_grad
    grad_input = grad_weight = grad_bias = None
    if wanted[0]:
        pack_t = None if values_t is None or torch.is_grad_enabled() else (values_t, metadata_t)
        grad_input = _input_gradient(grad, (values, metadata), pack_t, input.shape[1], backend)
    if wanted[1]:
        grad_weight = grad.t() @ input
        if ctx.decay:
            dropped = weight - _decompress(values, metadata, weight.shape[1], backend=backend)
            grad_weight = grad_weight + ctx.decay * dropped
    if wanted[6]:
        grad_bias = grad.sum(0)
    return grad_input, grad_weight, None, None, None, None, grad_bias, None, None, None


def _size_class(n: int) -> int:
    """The power of two at or above n."""
    return 1 << max(int(n) - 1, 0).bit_length()


def _linear_class(input, values, *_):
    B, I, O = input.shape[0], input.shape[1], values.shape[0]
    return f"B{_size_class(B)} I{_size_class(I)} O{_size_class(O)}"


def _grad_input_class(grad_sum, values, metadata, in_features):
    return f"B{_size_class(grad_sum.shape[0])} I{_size_class(in_features)} O{_size_class(values.shape[0])}"


def _grad_values_class(grad_sum, input, metadata):
    B, I, O = input.shape[0], input.shape[1], grad_sum.shape[1]
    return f"B{_size_class(B)} I{_size_class(I)} O{_size_class(O)}"


_mask = Op(reference.sparse24_mask, fake=_mask_fake, autocast=False)
_compress = Op(
    reference.sparse24_compress,
    fake=lambda weight, mask: _packed_fake(weight),
    backward=_compress_backward,
    setup_context=_compress_setup,
    autocast=False,
)
_prune = Op(
    reference.sparse24_prune,
    fake=lambda weight, transposable: _packed_fake(weight),
    backward=_prune_backward,
    setup_context=_prune_setup,
    autocast=False,
)
_compress_both = Op(
    reference.sparse24_compress_both,
    fake=lambda weight, mask: _packed_both_fake(weight),
    backward=_compress_backward,
    setup_context=_compress_setup,
    autocast=False,
)
_prune_both = Op(
    reference.sparse24_prune_both,
    fake=_packed_both_fake,
    backward=_prune_backward,
    setup_context=_prune_setup,
    autocast=False,
)
_transpose = Op(
    reference.sparse24_transpose,
    fake=_transpose_fake,
    backward=_transpose_backward,
    setup_context=_transpose_setup,
    autocast=False,
)
_gather = Op(
    reference.sparse24_gather,
    fake=_gather_fake,
    backward=_gather_backward,
    setup_context=_gather_setup,
    autocast=False,
)
_decompress = Op(
    reference.sparse24_decompress,
    fake=_decompress_fake,
    backward=_decompress_backward,
    setup_context=_decompress_setup,
    autocast=False,
)
_linear = Op(
    reference.sparse24_linear,
    fake=_linear_fake,
    backward=_linear_backward,
    setup_context=_linear_setup,
    shape_class=_linear_class,
)
_linear_ste = Op(
    reference.sparse24_linear_ste,
    fake=_linear_ste_fake,
    backward=_linear_ste_backward,
    setup_context=_linear_ste_setup,
    shape_class=lambda input, weight, values, *_: _linear_class(input, values),
)
_grad_input = Op(
    reference.sparse24_linear_grad_input,
    fake=lambda grad_sum, values, metadata, in_features: grad_sum.new_empty(grad_sum.shape[0], in_features),
    autocast=False,
    shape_class=_grad_input_class,
)
_grad_values = Op(
    reference.sparse24_linear_grad_values,
    fake=lambda grad_sum, input, metadata: input.new_empty(metadata.shape[0], metadata.shape[1] * 4),
    autocast=False,
    shape_class=_grad_values_class,
)
