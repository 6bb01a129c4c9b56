"""Fixed fan-in output layers, for hundreds of thousands to millions of labels.

Source: Navigating Extremes (arXiv 2411.03171); group-shared inputs and the dense block for frequent
labels: HASTE (arXiv 2606.01117).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._check import check_in_features
from ..ops.fan_in import FanInUpdate, column_dtype
from ._base import MemoryReport, PackedModule, copy_requires_grad

FROM_DENSE_ELEMENTS = 2**24  # of the dense weight, looked at together


class FixedFanInLinear(PackedModule):
    r"""Drop-in for ``nn.Linear`` in which each output reads ``fan_in`` of the inputs.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        fan_in: inputs of each output, at most ``in_features``.
        group_size: successive outputs that share their inputs (1, or 16, 32, 64 for speed).

    State: ``weight [O, F]`` (as an attribute `packed_weight`; ``.weight`` is the dense view),
    ``indices [ceil(O / G), F]`` int16 (int32 above 32767 inputs), ``bias [O]``. Inputs start uniformly
    random, each at most once in a row; weights uniform in ``±1 / sqrt(F)``; bias 0.

    Example:
        >>> head = FixedFanInLinear(768, 131_073, fan_in=32)
        >>> offsets, labels = torch.tensor([0, 2, 3]), torch.tensor([7, 99, 131_072])
        >>> head.loss(torch.randn(2, 768), (offsets, labels)).backward()
    """

    dense_type = nn.Linear

    # Called with each output that needs a gradient (None: of `loss_step`, gradient 1), the name of its op
    # and the op's inputs: a training method that scores inputs which are not read watches through it.
    tap: Callable[..., None] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int,
        bias: bool = True,
        *,
        group_size: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0 < fan_in <= in_features:
            raise ValueError(f"fan_in must be in [1, in_features], in_features = {in_features}; got {fan_in}")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1; got {group_size}")
        self.in_features, self.out_features = in_features, out_features
        self.fan_in, self.group_size = fan_in, group_size
        self.update: FanInUpdate | None = None  # the fused optimizer
        packed = torch.empty(out_features, fan_in, device=device, dtype=dtype)
        self._parameters["weight"] = nn.Parameter(packed)  # `weight` itself is the dense view
        rows = -(-out_features // group_size)
        self.register_buffer(
            "indices", torch.empty(rows, fan_in, device=device, dtype=column_dtype(in_features))
        )
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @property
    def packed_weight(self) -> nn.Parameter:
        """The parameter ``[O, F]``."""
        return self._parameters["weight"]

    def reset_parameters(self) -> None:
        """New random inputs and weights, from torch's global generator."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        with torch.no_grad():
            self.packed_weight.zero_()
            self.indices.zero_()
            if self.bias is not None:
                self.bias.zero_()
        ops.fan_in_rewire(
            self.packed_weight, self.indices, self.in_features, threshold=float("inf"),
            init_scale=self.fan_in**-0.5, group_size=self.group_size, seed=seed,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        check_in_features(input, self.in_features)
        output = ops.fan_in_linear(
            input, *self._layer(), group_size=self.group_size, update=self._active_update()
        )
        return self._watched(output, "linear", input)

    def loss(
        self, input: Tensor, positives: tuple[Tensor, Tensor], kind: str = "bce", reduction: str = "mean"
    ) -> Tensor:
        """Multi-label loss (`ops.fan_in_loss`) without the ``[B, O]`` logits.

        Args:
            input: ``[B, I]``.
            positives: ``(offsets [B + 1], labels [nnz])``.
            kind: "bce" or "squared_hinge".
            reduction: "mean" over ``B O``, "sum", or "batchmean".
        """
        check_in_features(input, self.in_features)
        loss = ops.fan_in_loss(
            input, *self._layer(), *positives, kind=kind, reduction=reduction, group_size=self.group_size,
            update=self._active_update(),
        )  # fmt: skip
        return self._watched(loss, "loss", input, positives, kind, reduction)

    def loss_step(
        self, input: Tensor, positives: tuple[Tensor, Tensor], kind: str = "bce", reduction: str = "mean"
    ) -> tuple[Tensor, Tensor]:
        """Loss, gradient to the input, and the fused optimizer's step, in one pass over the labels."""
        if self.update is None:
            raise ValueError("loss_step needs an optimizer: call fuse_optimizer first")
        check_in_features(input, self.in_features)
        if self.tap is not None:
            self.tap(None, "loss", input, positives, kind, reduction)
        return ops.fan_in_loss_step(
            input,
            *self._layer(),
            *positives,
            self.update,
            kind=kind,
            reduction=reduction,
            group_size=self.group_size,
        )

    def _watched(self, output: Tensor, op: str, *inputs) -> Tensor:
        if self.tap is not None and output.requires_grad:
            self.tap(output, op, *inputs)
        return output

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Logits and labels ``[B, k]`` of the k best labels (`ops.fan_in_topk`)."""
        check_in_features(input, self.in_features)
        return ops.fan_in_topk(input, *self._layer(), k, group_size=self.group_size)

    def score(self, input: Tensor, candidates: Tensor) -> Tensor:
        """Logits of ``candidates [B, C]`` (`ops.fan_in_score`)."""
        check_in_features(input, self.in_features)
        return ops.fan_in_score(input, *self._layer(), candidates, group_size=self.group_size)

    def fuse_optimizer(self, kind: str | None = "sgd", **options: Any) -> FanInUpdate | None:
        """Let the backward pass of `forward` and `loss` step weight and bias in training mode.

        They then get no ``.grad``, so that any other optimizer leaves them alone, and no gradient of the
        weight is ever held. The layer may be used once in each backward pass.

        Args:
            kind: "sgd", "adam", "adamw", or None to take the optimizer away.
            options: those of `ops.FanInUpdate`: lr, momentum, weight_decay, betas, eps,
                stochastic_rounding, seed.

        Returns:
            The `ops.FanInUpdate`; assign to its ``lr`` to schedule, save it with its ``state_dict``.
        """
        self.update = None if kind is None else FanInUpdate(kind, **options)
        return self.update

    def rewire(
        self,
        *,
        threshold: float | None = None,
        fraction: float | None = None,
        scope: str = "layer",
        init: str = "zero",
        allow_duplicates: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        reset_state: bool = False,
        seed: int | None = None,
    ) -> int:
        """Drop the smallest connections and regrow as many at random inputs (`ops.fan_in_rewire`).

        Args:
            threshold: drop what is smaller. Either this, or
            fraction: the share to drop, in [0, 1].
            scope: "layer" or "row".
            init: weights of new connections: "zero", or "random" as at the start.
            optimizer: holds state of the packed weight.
            reset_state: set to 0 the state at rewired positions, in ``optimizer`` and in the fused one.
            seed: of the random choices; None takes one from torch's global generator.

        Returns:
            How many connections were rewired.
        """
        if init not in ("zero", "random"):
            raise ValueError(f"init must be 'zero' or 'random'; got {init!r}")
        weight = self.packed_weight
        state = list(self.update.weight_state()) if reset_state and self.update is not None else []
        if reset_state and optimizer is not None:
            slots = optimizer.state.get(weight, {}).values()
            state += [slot for slot in slots if isinstance(slot, Tensor) and slot.shape == weight.shape]
        return int(
            ops.fan_in_rewire(
                weight, self.indices, self.in_features, threshold=threshold, fraction=fraction, scope=scope,
                state=state, init_scale=0.0 if init == "zero" else self.fan_in**-0.5,
                allow_duplicates=allow_duplicates, group_size=self.group_size,
                seed=int(torch.randint(2**62, (), device="cpu")) if seed is None else seed,
            )
        )  # fmt: skip

    @classmethod
    def from_dense(cls, module: nn.Linear, fan_in: int, group_size: int = 1) -> "FixedFanInLinear":
        """Keeps, for each output, the ``fan_in`` inputs of largest magnitude (for each group of outputs:
        of largest sum of squares), in increasing order."""
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module must be an nn.Linear; got {type(module).__name__}")
        layer = torch.nn.utils.skip_init(
            cls, module.in_features, module.out_features, fan_in, module.bias is not None,
            group_size=group_size, device=module.weight.device, dtype=module.weight.dtype,
        )  # fmt: skip
        layer._load_dense(module)
        copy_requires_grad(layer, module)
        return layer.train(module.training)

    def dense_weight(self) -> Tensor:
        columns = self.indices.long().repeat_interleave(self.group_size, 0)[: self.out_features]
        dense = self.packed_weight.new_zeros(self.out_features, self.in_features)
        return dense.scatter_add(1, columns, self.packed_weight)

    def dense_bytes(self) -> int:
        elements = self.out_features * (self.in_features + (self.bias is not None))
        return elements * self.packed_weight.element_size()

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """As the base; a fused optimizer counts with the moments it holds or will hold."""
        report = super().memory_report(optimizer)
        if self.update is None or optimizer is not None:
            return report
        count = sum(p.numel() for p in self.parameters())
        element = self.packed_weight.element_size()
        return dataclasses.replace(
            report,
            optimizer_bytes=4 * self.update.moments * count,
            dense_optimizer_bytes=4 * self.update.moments * (report.dense_bytes // element),
        )

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size > 1 else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, fan_in={self.fan_in}, "
            f"bias={self.bias is not None}{group}, sparsity={1 - self.fan_in / self.in_features:.3f}"
        )

    def _layer(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed_weight, self.indices, self.bias

    def _active_update(self) -> FanInUpdate | None:
        return self.update if self.training and torch.is_grad_enabled() else None

    def _empty_dense(self) -> nn.Linear:
        return torch.nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None,
            device=self.packed_weight.device, dtype=self.packed_weight.dtype,
        )  # fmt: skip

    @torch.no_grad()
    def _load_dense(self, dense: nn.Linear) -> None:
        group = self.group_size
        step = max(1, FROM_DENSE_ELEMENTS // max(1, self.in_features * group))  # rows of indices
        for row in range(0, self.indices.shape[0], step):
            labels = slice(row * group, (row + step) * group)
            block = dense.weight[labels]
            score = block.abs()
            if group > 1:
                square = block.float() ** 2
                missing = -square.shape[0] % group
                square = torch.cat([square, square.new_zeros(missing, self.in_features)])
                score = square.view(-1, group, self.in_features).sum(1)
            columns = score.topk(self.fan_in, dim=1, sorted=False).indices.sort(dim=1).values
            self.indices[row : row + step] = columns.to(self.indices.dtype)
            own = columns.repeat_interleave(group, 0)[: block.shape[0]]
            self.packed_weight[labels] = block.gather(1, own)
        if self.bias is not None:
            self.bias.copy_(dense.bias)
