"""DCN-v2 cross layers with low-rank matrices."""

import torch
from torch import Tensor, nn

from ..ops import low_rank_cross
from ._base import PackedModule, copy_requires_grad
from ._factorize import factorize, fit_rank, pick_rank


class LowRankCross(PackedModule):
    r"""One cross layer, ``x0 * (x @ down.T @ up.T + bias) + x``.

    It replaces the ``nn.Linear(I, I)`` inside ``x0 * linear(x) + x``: that is its dense layer.

    Args:
        in_features: I.
        rank: R.
        bias, device, dtype: as in ``nn.Linear``.

    State: ``down [R, I]``, ``up [I, R]``, ``bias [I]``.
    Source: DCN V2, arXiv 2008.13535.
    """

    dense_type = nn.Linear

    def __init__(self, in_features: int, rank: int, bias: bool = True, *, device=None, dtype=None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        self.in_features, self.rank = in_features, rank
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.up = nn.Parameter(torch.empty(in_features, rank, **factory))
        self.bias = nn.Parameter(torch.empty(in_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As TorchRec's ``LowRankCrossNet``: Xavier normal factors, no bias."""
        nn.init.xavier_normal_(self.down)
        nn.init.xavier_normal_(self.up)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return low_rank_cross(x0, x, self.down, self.up, self.bias)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, rank: int | None = None, *, energy: float | None = None, multiple_of: int = 1
    ) -> "LowRankCross":
        """The cross layer whose matrix is the best approximation of ``module.weight`` at a rank.

        Args:
            module: the square ``nn.Linear`` of the dense cross layer; left as it is.
            rank, energy, multiple_of: as in ``LowRankLinear.from_dense``.

        Raises:
            ValueError: the weight is not square; both or none of rank and energy are given, or out of range.
        """
        if module.weight.shape[0] != module.weight.shape[1]:
            raise ValueError(f"module.weight must be square, [I, I]; got {tuple(module.weight.shape)}")
        values, _, _ = factors = factorize(module.weight)
        weight = module.weight
        layer = cls(
            weight.shape[0],
            pick_rank(values, rank, energy, multiple_of),
            module.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer._load_factors(*factors[1:], module.bias)
        copy_requires_grad(layer, module)
        return layer.train(module.training)

    def _load_factors(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        with torch.no_grad():
            self.down.copy_(fit_rank(down, self.rank, 0))
            self.up.copy_(fit_rank(up, self.rank, 1))
            if self.bias is not None:
                self.bias.copy_(bias)

    def dense_weight(self) -> Tensor:
        """``up @ down``, ``[I, I]``."""
        return self.up @ self.down

    def _empty_dense(self) -> nn.Linear:
        width, like = self.in_features, self.down
        return nn.Linear(width, width, self.bias is not None, device=like.device, dtype=like.dtype)

    def _load_dense(self, dense: nn.Linear) -> None:
        self._load_factors(*factorize(dense.weight)[1:], dense.bias)

    def dense_bytes(self) -> int:
        return self.in_features * (self.in_features + (self.bias is not None)) * self.down.element_size()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, rank={self.rank}, bias={self.bias is not None}"


class CrossNet(nn.Module):
    r"""Dense cross network, ``x = x0 * (kernels[i] x + bias[i]) + x``; keys as TorchRec's ``CrossNet``."""

    def __init__(self, in_features: int, num_layers: int, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.in_features, self.num_layers = in_features, num_layers
        self.kernels = nn.ParameterList(
            nn.init.xavier_normal_(torch.empty(in_features, in_features, **factory))
            for _ in range(num_layers)
        )
        self.bias = nn.ParameterList(torch.zeros(in_features, 1, **factory) for _ in range(num_layers))

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for kernel, bias in zip(self.kernels, self.bias, strict=True):
            x = input * nn.functional.linear(x, kernel, bias[:, 0]) + x
        return x


class LowRankCrossNet(PackedModule):
    r"""A stack of `LowRankCross` layers on one input, with TorchRec's names and arguments.

    ``x = input * (x @ V_kernels[i].T @ W_kernels[i].T + bias[i]) + x``. A checkpoint of TorchRec's
    ``LowRankCrossNet`` loads with ``load_state_dict``.

    Args:
        in_features: I.
        num_layers: how many layers.
        low_rank: R.

    State: ``W_kernels.i [I, R]`` (up), ``V_kernels.i [R, I]`` (down), ``bias.i [I]``.
    """

    dense_type = CrossNet

    def __init__(self, in_features: int, num_layers: int, low_rank: int = 1, *, device=None, dtype=None):
        super().__init__()
        if low_rank < 1:
            raise ValueError(f"low_rank must be at least 1; got {low_rank}")
        factory = {"device": device, "dtype": dtype}
        self.in_features, self.num_layers, self.low_rank = in_features, num_layers, low_rank
        self.W_kernels = nn.ParameterList(
            torch.empty(in_features, low_rank, **factory) for _ in range(num_layers)
        )
        self.V_kernels = nn.ParameterList(
            torch.empty(low_rank, in_features, **factory) for _ in range(num_layers)
        )
        self.bias = nn.ParameterList(torch.empty(in_features, **factory) for _ in range(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for kernel in (*self.W_kernels, *self.V_kernels):
            nn.init.xavier_normal_(kernel)
        for bias in self.bias:
            nn.init.zeros_(bias)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for up, down, bias in zip(self.W_kernels, self.V_kernels, self.bias, strict=True):
            x = low_rank_cross(input, x, down, up, bias)
        return x

    @classmethod
    def from_dense(cls, module: nn.Module, rank: int) -> "LowRankCrossNet":
        """Every layer's matrix at its best approximation of rank ``rank``.

        Args:
            module: a `CrossNet`, TorchRec's, or any with ``kernels`` (``[I, I]`` each) and ``bias``.
        """
        kernels = list(module.kernels)
        if not kernels:
            raise ValueError("module must have at least one layer; got none")
        width = kernels[0].shape[0]
        if not 1 <= rank <= width:
            raise ValueError(f"rank must be in [1, {width}]; got {rank}")
        net = cls(width, len(kernels), rank, device=kernels[0].device, dtype=kernels[0].dtype)
        net._load_dense(module)
        copy_requires_grad(net, module)
        return net.train(module.training)

    def _load_dense(self, dense: nn.Module) -> None:
        with torch.no_grad():
            for i, (kernel, bias) in enumerate(zip(dense.kernels, dense.bias, strict=True)):
                _, down, up = factorize(kernel)
                self.V_kernels[i].copy_(fit_rank(down, self.low_rank, 0))
                self.W_kernels[i].copy_(fit_rank(up, self.low_rank, 1))
                self.bias[i].copy_(bias.reshape(-1))

    def dense_weight(self) -> Tensor:
        """``[num_layers, I, I]``."""
        return torch.stack([up @ down for up, down in zip(self.W_kernels, self.V_kernels, strict=True)])

    def _empty_dense(self) -> CrossNet:
        like = self.W_kernels[0]
        return CrossNet(self.in_features, self.num_layers, device=like.device, dtype=like.dtype)

    def to_dense(self) -> CrossNet:
        """A `CrossNet` with the same output."""
        dense = self._empty_dense()
        with torch.no_grad():
            for i, kernel in enumerate(self.dense_weight()):
                dense.kernels[i].copy_(kernel)
                dense.bias[i].copy_(self.bias[i][:, None])
        return dense.train(self.training)

    def dense_bytes(self) -> int:
        each = self.in_features * (self.in_features + 1)
        return self.num_layers * each * self.W_kernels[0].element_size()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_layers={self.num_layers}, low_rank={self.low_rank}"
