"""Low-rank linear and DCN-v2 cross layers: public functions, autograd and fake functions."""

import torch
from torch import Tensor

from ..reference import low_rank as reference
from ._activation import activation_code
from ._backend import Op
from ._check import check_device, check_dtype, check_like, check_shape, in_autocast

_FROM_OUTPUT = (1, 4, 5)  # ReLU, sigmoid, tanh: the derivative follows from the output

_linear_grad = Op(
    reference.low_rank_linear_grad,
    fake=lambda grad_output, input, down, up, mid, bias, output, mid_activation, activation, needs: (
        _fake_grads(
            needs,
            input,
            (1, input.shape),
            (2, down.shape),
            (4, up.shape),
            (8, down.shape[:1]),
            (16, up.shape[:1]),
        )
    ),
    autocast=False,
)
_cross_grad = Op(
    reference.low_rank_cross_grad,
    fake=lambda grad_output, x0, x, down, up, mid, bias, needs: (
        _fake_grads(needs, x, (32, x.shape), (1, x.shape), (2, down.shape), (4, up.shape), (16, up.shape[:1]))
    ),
    autocast=False,
)


def _fake_grads(needs: int, like: Tensor, *wanted) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape if needs & bit else (0,)) for bit, shape in wanted)


def _needs(ctx, **bits: int) -> int:
    """Bits of the arguments (by position in the op) that want a gradient."""
    return sum(
        getattr(reference, "NEEDS_" + name)
        for name, position in bits.items()
        if ctx.needs_input_grad[position]
    )


def _or_none(grads, needs: int, *bits: int) -> tuple:
    return tuple(grad if needs & bit else None for grad, bit in zip(grads, bits, strict=True))


def _linear_context(ctx, inputs, output):
    input, down, up, _, bias, ctx.mid_activation, ctx.activation, _ = inputs
    kept = output[0] if ctx.activation in _FROM_OUTPUT else None
    ctx.save_for_backward(input, down, up, output[1], bias, kept)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, grad_output, _, *, backend):
    if grad_output is None:
        return (None,) * 8
    needs = _needs(ctx, INPUT=0, DOWN=1, UP=2, MID_BIAS=3, BIAS=4)
    input, down, up, mid, bias, output = ctx.saved_tensors
    codes = ctx.mid_activation, ctx.activation
    grads = _linear_grad(grad_output, input, down, up, mid, bias, output, *codes, needs, backend=backend)
    return (*_or_none(grads, needs, 1, 2, 4, 8, 16), None, None, None)


def _cross_context(ctx, inputs, output):
    x0, x, down, up, bias, _ = inputs
    ctx.save_for_backward(x0, x, down, up, output[1], bias)
    ctx.set_materialize_grads(False)


def _cross_backward(ctx, grad_output, _, *, backend):
    if grad_output is None:
        return (None,) * 6
    needs = _needs(ctx, X0=0, INPUT=1, DOWN=2, UP=3, BIAS=4)
    x0, x, down, up, mid, bias = ctx.saved_tensors
    grads = _cross_grad(grad_output, x0, x, down, up, mid, bias, needs, backend=backend)
    return (*_or_none(grads, needs, 32, 1, 2, 4, 16), None)


_linear = Op(
    reference.low_rank_linear,
    fake=lambda input, down, up, mid_bias, bias, mid_activation, activation, keep_mid: (
        input.new_empty(input.shape[0], up.shape[0]),
        input.new_empty(input.shape[0] if keep_mid else 0, down.shape[0]),
    ),
    backward=_linear_backward,
    setup_context=_linear_context,
)
_cross = Op(
    reference.low_rank_cross,
    fake=lambda x0, x, down, up, bias, keep_mid: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0] if keep_mid else 0, down.shape[0]),
    ),
    backward=_cross_backward,
    setup_context=_cross_context,
)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_rows(input: Tensor) -> Tensor:
    """[..., I] as [B, I]."""
    return input.unsqueeze(0) if input.dim() == 1 else input.flatten(0, -2)


def _check_factors(input_name: str, input: Tensor, down: Tensor, up: Tensor) -> None:
    check_dtype(input_name, input)
    if input.dim() == 0:
        raise ValueError(f"{input_name} must have shape [..., I]; got a scalar")
    check_shape("down", down, (None, input.shape[-1]), "[R, I]")
    check_shape("up", up, (None, down.shape[0]), "[O, R]")
    _check_match(input_name, input, down=down, up=up)


def _check_match(input_name: str, input: Tensor, **others: Tensor) -> None:
    """Same device; same dtype outside autocast, which casts."""
    for name, tensor in others.items():
        check_dtype(name, tensor)
        if in_autocast(input):
            check_device(name, tensor, input_name, input)
        else:
            check_like(name, tensor, input_name, input)


def low_rank_linear(
    input: Tensor,
    down: Tensor,
    up: Tensor,
    mid_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mid_activation: str | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Linear map through ``R`` features: ``act(act_mid(input @ down.T + mid_bias) @ up.T + bias)``.

    The ``[B, R]`` intermediate stays in cache; biases and activations are applied there too.

    Args:
        input: ``[..., I]``, float32, float16, bfloat16 or (reference backend) float64.
        down: ``[R, I]``, same dtype as ``input`` (as all that follow; autocast casts them alike).
        up: ``[O, R]``.
        mid_bias: ``[R]`` or None.
        bias: ``[O]`` or None.
        mid_activation: between the factors: "relu", "gelu", "silu", "sigmoid", "tanh" or None.
        activation: at the end, likewise.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        ``[..., O]``, same dtype as ``input``; accumulated in float32.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation or backend.
        TypeError: a dtype that is not supported or differs from that of ``input``.
    """
    _check_factors("input", input, down, up)
    codes = activation_code(mid_activation, "mid_activation"), activation_code(activation)
    if mid_bias is not None:
        check_shape("mid_bias", mid_bias, (down.shape[0],), "[R]")
        _check_match("input", input, mid_bias=mid_bias)
    if bias is not None:
        check_shape("bias", bias, (up.shape[0],), "[O]")
        _check_match("input", input, bias=bias)
    keep_mid = _wants_grad(input, down, up, mid_bias, bias)
    output, _ = _linear(_as_rows(input), down, up, mid_bias, bias, *codes, keep_mid, backend=backend)
    return output.reshape(*input.shape[:-1], up.shape[0])


def low_rank_cross(
    x0: Tensor, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    r"""DCN-v2 cross layer with a low-rank matrix: ``x0 * (x @ down.T @ up.T + bias) + x``.

    Args:
        x0: ``[..., I]``, the input of the first cross layer.
        x: ``[..., I]``, the output of the layer before; same shape and dtype.
        down: ``[R, I]`` ("V" in DCN-v2 code).
        up: ``[I, R]`` ("W" or "U" there).
        bias: ``[I]`` or None.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        ``[..., I]``, same dtype as ``x``; accumulated in float32.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend.
        TypeError: a dtype that is not supported or differs from that of ``x``.

    Source: DCN V2, arXiv 2008.13535, section 3.
    """
    _check_factors("x", x, down, up)
    check_shape("up", up, (x.shape[-1], down.shape[0]), "[I, R]")
    check_shape("x0", x0, tuple(x.shape), "the shape of x")
    _check_match("x", x, x0=x0)
    if bias is not None:
        check_shape("bias", bias, (up.shape[0],), "[I]")
        _check_match("x", x, bias=bias)
    keep_mid = _wants_grad(x0, x, down, up, bias)
    output, _ = _cross(_as_rows(x0), _as_rows(x), down, up, bias, keep_mid, backend=backend)
    return output.reshape(x.shape)
