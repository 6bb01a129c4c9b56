"""Low-rank linear layer."""

import math

import torch
from torch import Tensor, nn

from ..ops import low_rank_linear
from ..ops._activation import activation_code
from ._base import PackedModule, copy_requires_grad
from ._factorize import factorize, fit_rank, pick_rank


class LowRankLinear(PackedModule):
    r"""``nn.Linear`` through ``rank`` features: ``act(act_mid(x @ down.T + mid_bias) @ up.T + bias)``.

    ``R (I + O)`` weights in place of ``I O``: smaller below ``rank = I O / (I + O)``, faster below about
    the same. With ``mid_activation`` it is the two-layer variant of arXiv 2405.18146 and stands for no
    dense layer any more.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        rank: R.
        mid_bias: a bias ``[R]`` between the factors.
        mid_activation: between the factors: "relu", "gelu", "silu", "sigmoid", "tanh" or None.
        activation: at the end, likewise; `to_dense` gives the layer without it.

    State: ``down [R, I]``, ``up [O, R]``, ``mid_bias [R]``, ``bias [O]``.
    """

    dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        mid_bias: bool = False,
        mid_activation: str | None = None,
        activation: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        activation_code(mid_activation, "mid_activation")
        activation_code(activation)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.mid_activation, self.activation = mid_activation, activation
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.up = nn.Parameter(torch.empty(out_features, rank, **factory))
        self.mid_bias = nn.Parameter(torch.empty(rank, **factory)) if mid_bias else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Elements of ``up @ down`` get the variance of ``nn.Linear``'s weight, 1 / (3 I)."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.down, -bound, bound)
        up_bound = math.sqrt(3 / self.rank)
        nn.init.uniform_(self.up, -up_bound, up_bound)
        for vector in (self.mid_bias, self.bias):
            if vector is not None:
                nn.init.uniform_(vector, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return low_rank_linear(
            input,
            self.down,
            self.up,
            self.mid_bias,
            self.bias,
            mid_activation=self.mid_activation,
            activation=self.activation,
        )

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        rank: int | None = None,
        *,
        energy: float | None = None,
        multiple_of: int = 1,
        mid_activation: str | None = None,
        activation: str | None = None,
    ) -> "LowRankLinear":
        """The best approximation of the weight at a rank (truncated singular value decomposition).

        The root of each singular value goes into either factor.

        Args:
            module: an ``nn.Linear``; left as it is.
            rank: R in [1, min(I, O)]; or
            energy: the share of the weight's squared norm to keep, in (0, 1]: the smallest rank that
                does, rounded up to a multiple of ``multiple_of``.
            mid_activation, activation: as in the constructor; with the former the layer has to be
                fine-tuned.

        Raises:
            ValueError: both or none of rank and energy are given, or out of range.
        """
        values, down, up = factorize(module.weight)
        rank = pick_rank(values, rank, energy, multiple_of)
        bias = module.bias
        layer = cls.from_factors(
            down[:rank].to(module.weight.dtype),
            up[:, :rank].to(module.weight.dtype),
            bias=None if bias is None else bias.detach(),
            mid_activation=mid_activation,
            activation=activation,
        )
        copy_requires_grad(layer, module)
        return layer.train(module.training)

    @classmethod
    def from_factors(
        cls,
        down: Tensor,
        up: Tensor,
        mid_bias: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        mid_activation: str | None = None,
        activation: str | None = None,
    ) -> "LowRankLinear":
        """The layer with copies of the given ``down [R, I]``, ``up [O, R]`` and biases."""
        layer = cls(
            down.shape[1],
            up.shape[0],
            down.shape[0],
            bias is not None,
            mid_bias=mid_bias is not None,
            mid_activation=mid_activation,
            activation=activation,
            device=down.device,
            dtype=down.dtype,
        )
        given = {"down": down, "up": up, "mid_bias": mid_bias, "bias": bias}
        layer.load_state_dict({name: value for name, value in given.items() if value is not None})
        return layer

    def dense_weight(self) -> Tensor:
        """``up @ down``, ``[O, I]``."""
        if self.mid_activation is not None:
            raise ValueError(f"a layer with mid_activation={self.mid_activation!r} has no dense weight")
        return self.up @ self.down

    def _dense_bias(self) -> Tensor | None:
        bias = self.bias
        if self.mid_bias is not None:
            through = self.up @ self.mid_bias
            bias = through if bias is None else bias + through
        return bias

    def _empty_dense(self) -> nn.Linear:
        has_bias = self.bias is not None or self.mid_bias is not None
        return nn.Linear(
            self.in_features, self.out_features, has_bias, device=self.down.device, dtype=self.down.dtype
        )

    def to_dense(self) -> nn.Linear:
        """``nn.Linear`` with the same output before ``activation``; the mid bias goes into its bias.

        Raises:
            ValueError: the layer has a ``mid_activation``.
        """
        dense = self._empty_dense()
        with torch.no_grad():
            dense.weight.copy_(self.dense_weight())
            if dense.bias is not None:
                dense.bias.copy_(self._dense_bias())
        return dense.train(self.training)

    def _load_dense(self, dense: nn.Linear) -> None:
        _, down, up = factorize(dense.weight)
        with torch.no_grad():
            self.down.copy_(fit_rank(down, self.rank, 0))
            self.up.copy_(fit_rank(up, self.rank, 1))
            if self.bias is not None:
                self.bias.copy_(dense.bias)
                if self.mid_bias is not None:
                    self.mid_bias.zero_()
            elif self.mid_bias is not None:  # the dense bias has to pass through the factors
                self.mid_bias.copy_(
                    torch.linalg.lstsq(self.up.double(), dense.bias.double()[:, None]).solution[:, 0]
                )

    def dense_bytes(self) -> int:
        has_bias = self.bias is not None or self.mid_bias is not None
        return self.out_features * (self.in_features + has_bias) * self.down.element_size()

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        text += f", bias={self.bias is not None}"
        if self.mid_bias is not None:
            text += ", mid_bias=True"
        for name in ("mid_activation", "activation"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        dense = self.in_features * self.out_features
        kept = self.rank * (self.in_features + self.out_features)
        return text + (f", weights={kept / dense:.3g} of dense" if dense else "")
