"""Fixed fan-in output layers: each label reads F chosen inputs.

    output[b, o] = sum_f weight[o, f] * input[b, indices[o // G, f]] + bias[o]

Letters: B batch, I in_features, O out_features (labels), F fan_in, G group_size (labels that share one
row of indices).

Source: Navigating Extremes (arXiv 2411.03171); group-shared inputs: HASTE (arXiv 2606.01117).
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..reference import fan_in as reference
from ._backend import Op
from ._check import (
    INDEX_DTYPES,
    check_device,
    check_dtype,
    check_like,
    check_shape,
    check_tensor,
    in_autocast,
    shape,
)

COLUMN_DTYPES = (torch.int16, torch.int32)  # of `indices`
LOSSES = {"bce": reference.BCE, "squared_hinge": reference.SQUARED_HINGE}
REDUCTIONS = {"mean": reference.MEAN, "sum": reference.SUM, "batchmean": reference.BATCHMEAN}
OPTIMIZERS = {"sgd": reference.SGD, "adam": reference.ADAM, "adamw": reference.ADAMW}
SCOPES = {"layer": reference.LAYER, "row": reference.ROW}


def column_dtype(in_features: int) -> torch.dtype:
    """int16 when every index fits, else int32."""
    return torch.int16 if in_features <= torch.iinfo(torch.int16).max else torch.int32


@dataclasses.dataclass
class FanInUpdate:
    """An optimizer that steps inside the backward pass, so that no gradient of the weight exists.

    Args:
        kind: "sgd", "adam" or "adamw", with the formulas of ``torch.optim``.
        lr: learning rate; assign to it between steps to schedule.
        momentum: of SGD.
        weight_decay: on weight and bias; decoupled in "adamw".
        betas, eps: of Adam.
        stochastic_rounding: round to bfloat16 up or down with probability, so that small steps are not
            lost; the random bits depend on ``seed``, the step and the element's number alone.

    ``state`` holds the float32 moments of the weight, then of the bias; empty until the first step.
    """

    kind: str = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    stochastic_rounding: bool = False
    seed: int = 0
    step: int = 0
    state: list[Tensor] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        _choice("kind", self.kind, OPTIMIZERS)
        for name, value in (
            ("momentum", self.momentum),
            ("betas[0]", self.betas[0]),
            ("betas[1]", self.betas[1]),
        ):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1); got {value}")
        for name in ("lr", "weight_decay", "eps"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if self.momentum and self.kind != "sgd":
            raise ValueError(f"momentum belongs to 'sgd'; {self.kind!r} takes betas")

    @property
    def moments(self) -> int:
        """State tensors for each parameter."""
        return 2 if self.kind != "sgd" else int(self.momentum > 0)

    def weight_state(self) -> list[Tensor]:
        """Moments of the weight, for `fan_in_rewire` to reset."""
        return self.state[: self.moments]

    def empty_state(self, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Shapes and dtypes of ``state``, on the meta device."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        parameters = [weight] if bias is None else [weight, bias]
        return [
            torch.empty_like(p, dtype=wide, device="meta") for p in parameters for _ in range(self.moments)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "state": list(self.state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.state = [tensor.clone() for tensor in state_dict["state"]]

    def _prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        """Check, and make the moments where they are missing."""
        if self.stochastic_rounding and weight.dtype != torch.bfloat16:
            raise TypeError(f"stochastic_rounding needs a bfloat16 weight; got {weight.dtype}")
        parameters = [weight] if bias is None else [weight, bias]
        for name, parameter in zip(("weight", "bias"), parameters, strict=False):
            if not parameter.is_contiguous():
                raise ValueError(
                    f"{name} is updated in place and must be contiguous; got strides {parameter.stride()}"
                )
        if not self.state:
            self.state = [
                torch.zeros_like(like, device=weight.device) for like in self.empty_state(weight, bias)
            ]
        wanted = [tuple(like.shape) for like in self.empty_state(weight, bias)]
        if [tuple(m.shape) for m in self.state] != wanted:
            raise ValueError(f"state must have shapes {wanted}; got {[tuple(m.shape) for m in self.state]}")
        self.state = [m.to(weight.device) for m in self.state]

    def _arguments(self) -> tuple:
        """The optimizer arguments of the ops, for the next step."""
        beta1 = self.momentum if self.kind == "sgd" else self.betas[0]
        return (
            OPTIMIZERS[self.kind], float(self.lr), float(self.weight_decay), float(beta1),
            float(self.betas[1]), float(self.eps), self.step + 1, self.stochastic_rounding, self.seed,
        )  # fmt: skip


# ---- public functions ----


def fan_in_linear(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 1,
    update: FanInUpdate | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Linear map in which each output reads ``F`` chosen inputs.

    Args:
        input: ``[..., I]``, float32, bfloat16, float16 or float64.
        weight: ``[O, F]``, same dtype.
        indices: ``[ceil(O / G), F]``, int16 or int32: the columns of ``input`` read by each group of
            labels, in ``[0, I)``. Repeated columns in a row add up.
        bias: ``[O]`` or None.
        group_size: G, how many successive labels share a row of ``indices``.
        update: steps weight and bias inside the backward pass (`fan_in_linear_update`); no ``.grad`` then.
        backend: "native", "triton" or "reference"; None takes the fastest that is available.

    Returns:
        ``[..., O]``, same dtype; accumulated in float32. Differentiable in input, weight and bias, each
        gradient the same for any number of threads.

    Raises:
        IndexError: an index is outside ``[0, I)``.

    Example:
        >>> x, w = torch.randn(32, 768), torch.randn(100_000, 32)
        >>> columns = torch.randint(0, 768, (100_000, 32), dtype=torch.int16)
        >>> fan_in_linear(x, w, columns).shape
        torch.Size([32, 100000])
    """
    check_dtype("input", input)
    if input.dim() == 0:
        raise ValueError(f"input must have shape [..., I]; got {shape(input)}")
    _check_layer(weight, indices, bias, group_size)
    rows = input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input
    if update is None:
        _check_input(input, weight)
        output = LINEAR(rows, weight, indices, bias, group_size, backend=backend)
    else:
        update._prepare(weight, bias)
        output = _UpdatingLinear.apply(
            rows.to(weight.dtype), weight, indices, bias, group_size, update, backend
        )
    return output if input.dim() == 2 else output.reshape(*input.shape[:-1], weight.shape[0])


def fan_in_loss(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    *,
    kind: str = "bce",
    reduction: str = "mean",
    group_size: int = 1,
    update: FanInUpdate | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-label loss over all ``O`` labels; neither logits nor their gradients ever exist as ``[B, O]``.

    With the logits ``z = fan_in_linear(...)`` and ``t = 1`` at positives, 0 elsewhere:
    "bce" sums ``log(1 + exp(z)) - t z``, "squared_hinge" sums ``max(0, 1 - (2 t - 1) z)^2``.

    Args:
        input, weight, indices, bias, group_size: as in `fan_in_linear`; input ``[B, I]``.
        offsets: ``[B + 1]`` int32 or int64, from 0, not decreasing, to ``len(labels)``.
        labels: ``[nnz]`` int32 or int64: the positives of row b are ``labels[offsets[b]:offsets[b + 1]]``,
            in ``[0, O)``, in any order. A label given twice counts once.
        reduction: "mean" over ``B O``, "sum", or "batchmean" (the sum over B).
        update: steps weight and bias inside the backward pass; they then get no ``.grad``. The loss may
            be scaled or added to others, and the backward pass runs once.

    Returns:
        Scalar, float32 (float64 for float64 inputs). Differentiable in input, weight and bias: the
        backward pass computes the logits again, chunk by chunk, and holds nothing between the passes.

    Raises:
        IndexError: a label or an index is out of range.
        ValueError: offsets are not monotonic.
    """
    check_shape("input", input, (None, None), "[B, I]")
    _check_layer(weight, indices, bias, group_size)
    _check_positives(offsets, labels, input)
    codes = (_choice("kind", kind, LOSSES), _choice("reduction", reduction, REDUCTIONS), group_size)
    if update is None:
        _check_input(input, weight)
        return LOSS(input, weight, indices, bias, offsets, labels, *codes, backend=backend)
    update._prepare(weight, bias)
    return _UpdatingLoss.apply(
        input.to(weight.dtype), weight, indices, bias, offsets, labels, codes, update, backend
    )


def fan_in_loss_step(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    update: FanInUpdate,
    *,
    kind: str = "bce",
    reduction: str = "mean",
    group_size: int = 1,
    input_grad: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Loss, gradient to the input and the optimizer step on weight and bias, in one pass over the labels.

    For training loops that do without autograd in the head; `fan_in_loss` with ``update`` gives the same
    step through ``loss.backward()``, computing the logits twice.

    Args:
        input_grad: False leaves out the gradient to the input; the result is then empty.
        others: as in `fan_in_loss`.

    Returns:
        The loss before the step (scalar), and its gradient to the input ``[B, I]``.
    """
    check_shape("input", input, (None, None), "[B, I]")
    _check_layer(weight, indices, bias, group_size)
    check_like("input", input, "weight", weight)
    _check_positives(offsets, labels, input)
    codes = (_choice("kind", kind, LOSSES), _choice("reduction", reduction, REDUCTIONS), group_size)
    update._prepare(weight, bias)
    one = torch.ones((), dtype=_loss_dtype(weight), device=weight.device)
    with torch.no_grad():
        result = LOSS_STEP(
            one, input, weight, indices, bias, offsets, labels, update.state, *codes, input_grad,
            *update._arguments(), backend=backend,
        )  # fmt: skip
    update.step += 1
    return result


def fan_in_linear_update(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    update: FanInUpdate,
    *,
    group_size: int = 1,
    backend: str | None = None,
) -> None:
    r"""One optimizer step on weight and bias, in place, without an ``[O, F]`` gradient.

    Args:
        grad_output: ``[B, O]``, the gradient of the loss to the layer's output.
        others: as in `fan_in_linear`, input ``[B, I]``.
    """
    check_shape("input", input, (None, None), "[B, I]")
    _check_layer(weight, indices, bias, group_size)
    check_like("input", input, "weight", weight)
    check_like("grad_output", grad_output, "weight", weight)
    check_shape("grad_output", grad_output, (input.shape[0], weight.shape[0]), "[B, O]")
    update._prepare(weight, bias)
    with torch.no_grad():
        LINEAR_UPDATE(
            grad_output,
            input,
            weight,
            indices,
            bias,
            update.state,
            group_size,
            *update._arguments(),
            backend=backend,
        )
    update.step += 1


def fan_in_topk(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    group_size: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The ``k`` best labels of each row, without the ``[B, O]`` logits.

    Args:
        input, weight, indices, bias, group_size: as in `fan_in_linear`; input ``[B, I]``.
        k: how many, at most ``O``.

    Returns:
        Logits ``[B, k]``, largest first, and their labels ``[B, k]`` int64. Equal logits come lowest label
        first; NaN counts as the largest, as in ``torch.topk``. The logits are differentiable.
    """
    check_shape("input", input, (None, None), "[B, I]")
    _check_layer(weight, indices, bias, group_size)
    _check_input(input, weight)
    if not 0 <= k <= weight.shape[0]:
        raise ValueError(f"k must be in [0, O], O = {weight.shape[0]}; got {k}")
    return TOPK(input, weight, indices, bias, k, group_size, backend=backend)


def fan_in_score(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    *,
    group_size: int = 1,
    backend: str | None = None,
) -> Tensor:
    r"""Logits of chosen labels: ``output[b, c]`` is that of row b for label ``candidates[b, c]``.

    Args:
        input, weight, indices, bias, group_size: as in `fan_in_linear`; input ``[B, I]``.
        candidates: ``[B, C]`` int32 or int64, in ``[0, O)``.

    Returns:
        ``[B, C]``, differentiable in input, weight and bias.

    Raises:
        IndexError: a candidate or an index is out of range.
    """
    check_shape("input", input, (None, None), "[B, I]")
    _check_layer(weight, indices, bias, group_size)
    _check_input(input, weight)
    check_dtype("candidates", candidates, INDEX_DTYPES)
    check_shape("candidates", candidates, (input.shape[0], None), "[B, C]")
    check_device("candidates", candidates, "input", input)
    return SCORE(input, weight, indices, bias, candidates, group_size, backend=backend)


def fan_in_rewire(
    weight: Tensor,
    indices: Tensor,
    in_features: int,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    scope: str = "layer",
    state: list[Tensor] = (),
    init_scale: float = 0.0,
    allow_duplicates: bool = False,
    group_size: int = 1,
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Drop the smallest connections and regrow as many at random inputs, in place.

    The score of a connection is the magnitude of its weight; where G labels share their inputs, the root
    mean square over the group, and all G weights go together.

    Args:
        weight: ``[O, F]``, contiguous; changed.
        indices: ``[ceil(O / G), F]`` int16 or int32, contiguous; changed.
        in_features: I; new indices are uniform in ``[0, I)``.
        threshold: drop scores below it. Either this, or
        fraction: drop this share, in [0, 1], rounded to the nearest whole number of connections; the
            count is exact, ties are broken at random.
        scope: with ``fraction``: "layer" (the smallest of the whole layer) or "row" (of each row of indices).
        state: optimizer tensors of shape ``[O, F]``, contiguous; set to 0 where rewired.
        init_scale: 0 gives new connections weight 0, as the paper; else uniform in ±init_scale.
        allow_duplicates: False draws among the inputs that the row does not read yet.
        seed: of all random choices; the result does not depend on the number of threads.

    Returns:
        How many connections were rewired, int64 scalar tensor.

    Raises:
        ValueError: not exactly one of threshold and fraction; a tensor that cannot be changed in place.
    """
    _check_layer(weight, indices, None, group_size)
    if (threshold is None) == (fraction is None):
        raise ValueError(f"give either threshold or fraction; got threshold={threshold}, fraction={fraction}")
    if fraction is not None and not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1]; got {fraction}")
    if threshold is not None and threshold != threshold:
        raise ValueError("threshold must be a number; got NaN")
    if in_features - 1 > torch.iinfo(indices.dtype).max:
        raise ValueError(f"in_features {in_features} does not fit indices of {indices.dtype}")
    if not allow_duplicates and weight.shape[1] > in_features:
        raise ValueError(
            f"a row of {weight.shape[1]} distinct indices needs as many inputs; in_features is {in_features}"
        )
    for name, tensor in (
        ("weight", weight),
        ("indices", indices),
        *((f"state[{i}]", s) for i, s in enumerate(state)),
    ):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} is changed in place and must be contiguous; got strides {tensor.stride()}"
            )
    for i, tensor in enumerate(state):
        check_shape(f"state[{i}]", tensor, tuple(weight.shape), "[O, F]")
    criterion = reference.THRESHOLD if fraction is None else reference.FRACTION
    amount = float(threshold if fraction is None else fraction)
    with torch.no_grad():
        return REWIRE(
            weight, indices, list(state), in_features, group_size, criterion, _choice("scope", scope, SCOPES),
            amount, float(init_scale), allow_duplicates, seed, backend=backend,
        )  # fmt: skip


# ---- checks ----


def _choice(name: str, value: str, table: dict[str, int]) -> int:
    if value not in table:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, table))}; got {value!r}")
    return table[value]


def _check_layer(weight: Tensor, indices: Tensor, bias: Tensor | None, group_size: int) -> None:
    check_dtype("weight", weight)
    check_shape("weight", weight, (None, None), "[O, F]")
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number of at least 1; got {group_size!r}")
    check_dtype("indices", indices, COLUMN_DTYPES)
    check_device("indices", indices, "weight", weight)
    rows = -(-weight.shape[0] // group_size)
    check_shape("indices", indices, (rows, weight.shape[1]), "[ceil(O / group_size), F]")
    if bias is not None:
        check_tensor("bias", bias)
        check_like("bias", bias, "weight", weight)
        check_shape("bias", bias, (weight.shape[0],), "[O]")


def _check_positives(offsets: Tensor, labels: Tensor, input: Tensor) -> None:
    for name, tensor in (("offsets", offsets), ("labels", labels)):
        check_dtype(name, tensor, INDEX_DTYPES)
        check_device(name, tensor, "input", input)
    check_shape("offsets", offsets, (input.shape[0] + 1,), "[B + 1]")
    check_shape("labels", labels, (None,), "[number of positives]")


def rows_of_positives(offsets: Tensor, labels: Tensor, input: Tensor, out_features: int) -> Tensor:
    """The row of each positive, ``[nnz]`` int64; raises as `fan_in_loss` does. Reads the tensors on the host."""
    _check_positives(offsets, labels, input)
    return reference._positive_rows(offsets, labels, input.shape[0], out_features)


def _check_input(input: Tensor, weight: Tensor) -> None:
    """Same dtype and device; inside autocast the op casts."""
    if in_autocast(input):
        check_device("input", input, "weight", weight)
    else:
        check_like("input", input, "weight", weight)


def _loss_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


# ---- fused optimizer: the backward pass writes to the weight ----


class _UpdatingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, indices, bias, offsets, labels, codes, update, backend):
        ctx.save_for_backward(input, weight, indices, bias, offsets, labels)
        ctx.codes, ctx.update, ctx.backend = codes, update, backend
        with torch.autocast(input.device.type, enabled=False):  # as the backward pass, at the weight's dtype
            return LOSS(input, weight, indices, bias, offsets, labels, *codes, backend=backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        input, weight, indices, bias, offsets, labels = ctx.saved_tensors
        _, grad_input = LOSS_STEP(
            grad_loss, input, weight, indices, bias, offsets, labels, ctx.update.state, *ctx.codes,
            ctx.needs_input_grad[0], *ctx.update._arguments(), backend=ctx.backend,
        )  # fmt: skip
        ctx.update.step += 1
        return grad_input if ctx.needs_input_grad[0] else None, *(None,) * 8


class _UpdatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, indices, bias, group_size, update, backend):
        ctx.save_for_backward(input, weight, indices, bias)
        ctx.group_size, ctx.update, ctx.backend = group_size, update, backend
        with torch.autocast(input.device.type, enabled=False):
            return LINEAR(input, weight, indices, bias, group_size, backend=backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        input, weight, indices, bias = ctx.saved_tensors
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = LINEAR_GRAD_INPUT(
                grad_output, weight, indices, input.shape[1], ctx.group_size, backend=ctx.backend
            )
        LINEAR_UPDATE(
            grad_output, input, weight, indices, bias, ctx.update.state, ctx.group_size,
            *ctx.update._arguments(), backend=ctx.backend,
        )  # fmt: skip
        ctx.update.step += 1
        return grad_input, *(None,) * 6


# ---- registration ----


def _fake_linear(input, weight, indices, bias, group_size):
    return input.new_empty(input.shape[0], weight.shape[0])


def _fake_linear_grad_input(grad_output, weight, indices, in_features, group_size):
    return grad_output.new_empty(grad_output.shape[0], in_features)


def _fake_linear_grad_weight(grad_output, input, indices, group_size):
    return input.new_empty(grad_output.shape[1], indices.shape[1])


def _fake_loss(input, *arguments):
    return input.new_empty((), dtype=_loss_dtype(input))


def _fake_loss_grad(
    grad_loss,
    input,
    weight,
    indices,
    bias,
    offsets,
    labels,
    kind,
    reduction,
    group_size,
    input_grad,
    weight_grad,
):
    return (
        torch.empty_like(input) if input_grad else input.new_empty(0),
        torch.empty_like(weight) if weight_grad else weight.new_empty(0),
        torch.empty_like(bias) if weight_grad and bias is not None else weight.new_empty(0),
    )


def _fake_loss_step(
    grad_loss,
    input,
    weight,
    indices,
    bias,
    offsets,
    labels,
    state,
    kind,
    reduction,
    group_size,
    input_grad,
    *optimizer,
):
    grad_input = torch.empty_like(input) if input_grad else input.new_empty(0)
    return input.new_empty((), dtype=_loss_dtype(input)), grad_input


def _fake_topk(input, weight, indices, bias, k, group_size):
    return input.new_empty(input.shape[0], k), input.new_empty(input.shape[0], k, dtype=torch.int64)


def _fake_score(input, weight, indices, bias, candidates, group_size):
    return input.new_empty(candidates.shape)


def _fake_score_grad_input(grad_output, weight, indices, candidates, in_features, group_size):
    return grad_output.new_empty(grad_output.shape[0], in_features)


def _fake_score_grad_weight(grad_output, input, indices, candidates, out_features, group_size):
    return input.new_empty(out_features, indices.shape[1])


def _fake_rewire(weight, *arguments):
    return weight.new_empty((), dtype=torch.int64)


def _setup_linear(ctx, inputs, output):
    input, weight, indices, bias, ctx.group_size = inputs
    ctx.save_for_backward(input, weight, indices)


def _backward_linear(ctx, grad_output, backend):
    input, weight, indices = ctx.saved_tensors
    need_input, need_weight, _, need_bias, _ = ctx.needs_input_grad
    grad_input = grad_weight = grad_bias = None
    if need_input:
        grad_input = LINEAR_GRAD_INPUT(
            grad_output, weight, indices, input.shape[1], ctx.group_size, backend=backend
        )
    if need_weight:
        grad_weight = LINEAR_GRAD_WEIGHT(grad_output, input, indices, ctx.group_size, backend=backend)
    if need_bias:
        grad_bias = grad_output.sum(0)
    return grad_input, grad_weight, None, grad_bias, None


def _setup_loss(ctx, inputs, output):
    *tensors, ctx.kind, ctx.reduction, ctx.group_size = inputs
    ctx.save_for_backward(*tensors)


def _backward_loss(ctx, grad_loss, backend):
    tensors = ctx.saved_tensors
    need_input, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    grad_input, grad_weight, grad_bias = LOSS_GRAD(
        grad_loss, *tensors, ctx.kind, ctx.reduction, ctx.group_size, need_input, need_weight or need_bias,
        backend=backend,
    )  # fmt: skip
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        None,
        grad_bias if need_bias else None,
        *(None,) * 5,
    )


def _setup_topk(ctx, inputs, output):
    input, weight, indices, bias, _, ctx.group_size = inputs
    ctx.save_for_backward(input, weight, indices, output[1])


def _backward_topk(ctx, grad_values, grad_labels, backend):
    need_input, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    grads = _candidate_grads(ctx, grad_values, need_input, need_weight, need_bias, backend)
    return *grads, None, None


def _setup_score(ctx, inputs, output):
    input, weight, indices, bias, candidates, ctx.group_size = inputs
    ctx.save_for_backward(input, weight, indices, candidates)


def _backward_score(ctx, grad_output, backend):
    need_input, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    grads = _candidate_grads(ctx, grad_output, need_input, need_weight, need_bias, backend)
    return *grads, None, None


def _candidate_grads(ctx, grad, need_input, need_weight, need_bias, backend):
    """Gradients to input, weight, indices (None) and bias."""
    input, weight, indices, labels = ctx.saved_tensors
    grad_input = grad_weight = grad_bias = None
    if need_input:
        grad_input = SCORE_GRAD_INPUT(
            grad, weight, indices, labels, input.shape[1], ctx.group_size, backend=backend
        )
    if need_weight:
        grad_weight = SCORE_GRAD_WEIGHT(
            grad, input, indices, labels, weight.shape[0], ctx.group_size, backend=backend
        )
    if need_bias:  # index_add_ goes through its source in order
        wide = grad.to(_loss_dtype(grad)).flatten()
        grad_bias = wide.new_zeros(weight.shape[0]).index_add(0, labels.flatten(), wide).to(weight.dtype)
    return grad_input, grad_weight, None, grad_bias


def _nothing(*arguments) -> None:
    return None


_IN_PLACE = ("weight", "bias", "state")
LINEAR = Op(
    reference.fan_in_linear, fake=_fake_linear, backward=_backward_linear, setup_context=_setup_linear
)
LINEAR_GRAD_INPUT = Op(reference.fan_in_linear_grad_input, fake=_fake_linear_grad_input, autocast=False)
LINEAR_GRAD_WEIGHT = Op(reference.fan_in_linear_grad_weight, fake=_fake_linear_grad_weight, autocast=False)
LINEAR_UPDATE = Op(reference.fan_in_linear_update, fake=_nothing, mutates=_IN_PLACE, autocast=False)
LOSS = Op(reference.fan_in_loss, fake=_fake_loss, backward=_backward_loss, setup_context=_setup_loss)
LOSS_GRAD = Op(reference.fan_in_loss_grad, fake=_fake_loss_grad, autocast=False)
LOSS_STEP = Op(reference.fan_in_loss_step, fake=_fake_loss_step, mutates=_IN_PLACE, autocast=False)
TOPK = Op(reference.fan_in_topk, fake=_fake_topk, backward=_backward_topk, setup_context=_setup_topk)
SCORE = Op(reference.fan_in_score, fake=_fake_score, backward=_backward_score, setup_context=_setup_score)
SCORE_GRAD_INPUT = Op(reference.fan_in_score_grad_input, fake=_fake_score_grad_input, autocast=False)
SCORE_GRAD_WEIGHT = Op(reference.fan_in_score_grad_weight, fake=_fake_score_grad_weight, autocast=False)
REWIRE = Op(
    reference.fan_in_rewire, fake=_fake_rewire, mutates=("weight", "indices", "state"), autocast=False
)
