"""Linear layers with 2:4 weights."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._activation import activation_code
from ..ops._check import check_in_features
from ..reference.sparse24 import check_kept, padded
from ._base import PackedModule, copy_requires_grad


def _packed(weight: Tensor, mask: Tensor | None, transposable: bool) -> tuple[Tensor, Tensor]:
    if mask is None:
        return ops.sparse24_prune(weight, transposable=transposable)
    packed = ops.sparse24_compress(weight, mask.to(weight.device))
    if transposable:
        check_kept(mask.t(), "column", "rows")
    return packed


def _dense_weight(linear: nn.Linear, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The dense weight of a plain or pruned linear layer, and the mask that torch's pruning left on it."""
    pruned = getattr(linear, "weight_mask", None)  # torch.nn.utils.prune: weight_orig, weight_mask
    if pruned is not None and hasattr(linear, "weight_orig"):
        return linear.weight_orig.detach(), pruned.bool() if mask is None else mask
    return linear.weight.detach(), mask


class Sparse24Linear(PackedModule):
    r"""`torch.nn.Linear` that keeps two weights in each group of four inputs, packed.

    ``y = activation(x W^T + b)``, with W stored as ``values [O, P / 2]`` (the Parameter: gradient and
    optimizer state have half the size) and ``metadata [O, P / 8]`` uint8, P = in_features rounded up to
    a multiple of 16.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        activation: None, "relu", "gelu", "silu", "sigmoid" or "tanh", fused into the product.
        transposable: choose masks of 4 x 4 tiles with two in every row and column.

    Where what is stored is 2:4 along both sides, the gradient to the input is a 2:4 product as well, on
    sparse tensor cores (`ops.sparse24_linear`); the layer sees by itself, when it gets a new mask or state.

    A new layer is what `from_dense` makes of a new `torch.nn.Linear`.

    >>> layer = Sparse24Linear.from_dense(nn.Linear(367, 512), activation="relu")
    >>> layer(torch.randn(128, 367)).shape
    torch.Size([128, 512])
    """

    dense_type = nn.Linear
    in_features: int
    out_features: int
    values: nn.Parameter
    metadata: Tensor
    _both_ways = False  # at most two of four are stored in columns too

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        transposable: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        activation_code(activation)  # an unknown name is refused here
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.transposable = transposable
        P = padded(in_features)
        self.values = nn.Parameter(torch.empty(out_features, P // 2, device=device, dtype=dtype))
        self.register_buffer("metadata", torch.empty(out_features, P // 8, device=device, dtype=torch.uint8))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if self.values.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` starts, keeping the largest two of each four."""
        dense = self._empty_dense()
        dense.reset_parameters()
        self._load_dense(dense)

    def forward(self, input: Tensor) -> Tensor:
        check_in_features(input, self.in_features)
        return ops.sparse24_linear(
            input,
            self.values,
            self.metadata,
            self.bias,
            activation=self.activation,
            transposable=self._both_ways,
        )

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        mask: Tensor | None = None,
        transposable: bool = False,
        activation: str | None = None,
    ) -> "Sparse24Linear":
        """The 2:4 layer for a dense one; keeps its device, dtype, training flag and requires_grad.

        Args:
            module: dense layer; also one pruned by ``torch.nn.utils.prune``, whose mask is then taken, and
                one whose weight is a ``torch.sparse.SparseSemiStructuredTensor``.
            mask: ``[O, I]`` bool, at most two True in each group of four along I; None keeps the largest.
            transposable: keep, in each 4 x 4 tile, the best pattern with two in every row and column; of a
                mask that is given, make sure that it keeps at most two of four along O too.
            activation: fused activation of the new layer.

        Raises:
            ValueError: the mask keeps more than two in a group.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module must be a torch.nn.Linear; got {type(module).__name__}")
        weight, mask = _dense_weight(module, mask)
        if isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
            values, metadata = ops.sparse24_from_torch(weight)
        else:
            values, metadata = _packed(weight, mask, transposable)
        new = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            activation=activation,
            transposable=transposable,
            device="meta",
            dtype=weight.dtype,
        )
        new.values = nn.Parameter(values.detach())
        new.metadata = metadata
        new._see_metadata()
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.detach().clone())
        copy_requires_grad(new, module)
        return new.train(module.training)

    @torch.no_grad()
    def refresh(self, weight: Tensor, *, mask: Tensor | None = None) -> None:
        """Take new values and a new mask from a dense weight, in place: same tensors, same storage.

        Args:
            weight: ``[O, I]`` dense weight.
            mask: as in `from_dense`, which need not be transposable; None chooses as ``transposable`` says.

        Raises:
            ValueError: the shape differs, or the mask keeps more than two in a group; nothing has changed.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            wanted = (self.out_features, self.in_features)
            raise ValueError(f"weight must have shape {wanted}; got {tuple(weight.shape)}")
        weight = weight.detach().to(self.values.device)
        values, metadata = _packed(weight, mask, self.transposable and mask is None)
        self.values.copy_(values)
        self.metadata.copy_(metadata)
        self._see_metadata()

    def _see_metadata(self) -> None:
        self._both_ways = ops.sparse24_is_transposable(self.metadata, self.in_features)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._see_metadata()

    def mask(self) -> Tensor:
        """``[O, I]`` bool: the positions that are stored."""
        ones = torch.ones_like(self.values)
        return ops.sparse24_decompress(ones, self.metadata, self.in_features) != 0

    def pack_state(self, name: str, dense: Tensor) -> Tensor | None:
        return ops.sparse24_gather(dense, self.metadata) if name == "values" else None

    def dense_weight(self) -> Tensor:
        return ops.sparse24_decompress(self.values, self.metadata, self.in_features)

    def dense_bytes(self) -> int:
        biases = 0 if self.bias is None else self.out_features
        return (self.out_features * self.in_features + biases) * self.values.element_size()

    def _empty_dense(self) -> nn.Linear:
        # skip_init leaves the memory as it comes and draws no random numbers
        return nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )

    @torch.no_grad()
    def _load_dense(self, dense: nn.Linear) -> None:
        self.refresh(dense.weight)
        if self.bias is not None:
            self.bias.copy_(dense.bias)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f"{text}{activation}{', transposable=True' if self.transposable else ''}, sparsity=2:4"


class Sparse24LinearSTE(nn.Linear):
    r"""`torch.nn.Linear` that computes with a 2:4 weight and trains the dense one, straight-through.

    The dense ``weight`` is the Parameter, ``mask [O, I]`` a buffer; the forward product and the gradient
    to the input use the masked weight, the gradient to ``weight`` is dense (`ops.sparse24_linear_ste`).
    `to_sparse` gives the packed layer for serving.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        activation: fused activation.
        transposable: masks of 4 x 4 tiles with two in every row and column: where sparse tensor cores
            multiply, the gradient to the input is a 2:4 product as well.
        decay: fade what the mask drops (sparse-refined straight-through estimator).
        refresh: "forward" chooses the mask anew in every forward of training, "manual" when `update_mask`
            is called; Hu et al. ("Accelerating transformer pre-training with 2:4 sparsity", ICML 2024)
            do so every 40 steps.
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        transposable: bool = False,
        decay: float = 0.0,
        refresh: str = "manual",
        device=None,
        dtype=None,
    ):
        activation_code(activation)
        if refresh not in ("manual", "forward"):
            raise ValueError(f"refresh must be 'manual' or 'forward'; got {refresh!r}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation, self.transposable, self.decay, self.refresh = (
            activation,
            transposable,
            decay,
            refresh,
        )
        self.register_buffer("mask", torch.empty_like(self.weight, dtype=torch.bool, requires_grad=False))
        if self.weight.device.type != "meta":
            self.update_mask()

    @torch.no_grad()
    def update_mask(self) -> None:
        """Choose the mask from the dense weight, in place."""
        self.mask.copy_(ops.sparse24_mask(self.weight, transposable=self.transposable))

    def forward(self, input: Tensor) -> Tensor:
        if self.refresh == "forward" and self.training:
            self.update_mask()
        return ops.sparse24_linear_ste(
            input,
            self.weight,
            self.mask,
            self.bias,
            activation=self.activation,
            decay=self.decay,
            transposable=self.transposable,
        )

    @classmethod
    def from_dense(cls, module: nn.Linear, *, mask: Tensor | None = None, **options) -> "Sparse24LinearSTE":
        """The layer for a dense one, with a copy of its weight.

        Args:
            module: dense layer, or one pruned by ``torch.nn.utils.prune``, whose mask is then taken.
            mask: ``[O, I]`` bool, at most two True in each group of four along I, and where
                ``transposable`` is True along O; None chooses.
            options: the keyword arguments of the constructor.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module must be a torch.nn.Linear; got {type(module).__name__}")
        weight, mask = _dense_weight(module, mask)
        new = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            device="meta",
            dtype=weight.dtype,
            **options,
        )
        if mask is not None:
            _packed(weight, mask, new.transposable)  # refuses a mask that is not 2:4
        new.weight = nn.Parameter(weight.clone())
        new.mask = ops.sparse24_mask(weight, transposable=new.transposable) if mask is None else mask.clone()
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.detach().clone())
        copy_requires_grad(new, module)
        return new.train(module.training)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """A dense layer with the same output before the activation: the masked weight."""
        dense = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        dense.weight.copy_(torch.where(self.mask, self.weight, 0))
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def to_sparse(self) -> Sparse24Linear:
        """The packed layer with the same output."""
        return Sparse24Linear.from_dense(
            self, mask=self.mask, transposable=self.transposable, activation=self.activation
        )

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return (
            f"{super().extra_repr()}{activation}, sparsity=2:4, refresh={self.refresh!r}, decay={self.decay}"
        )


class SemiSparseLinear(Sparse24LinearSTE):
    """`Sparse24LinearSTE` with torchao's name and habits: transposable masks, new in every forward."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options):
        options = {"transposable": True, "refresh": "forward", **options}
        super().__init__(in_features, out_features, bias, **options)


def swap_linear_with_semi_sparse_linear(model: nn.Module, config: dict[str, type[nn.Module]]) -> None:
    """Replace the linear layers named in ``config`` ({fully qualified name: class}), in place.

    torchao's function of this name. Any class with a ``from_dense`` will do: `SemiSparseLinear`,
    `Sparse24Linear`.

    Raises:
        ValueError: a name is not a linear layer of the model; the model is as it was.
    """
    modules = dict(model.named_modules())
    for name in config:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(
                f"{name!r} is not a torch.nn.Linear of the model; got {type(modules.get(name)).__name__}"
            )
    _replace(model, {name: cls.from_dense(modules[name]) for name, cls in config.items()})


def swap_semi_sparse_linear_with_linear(model: nn.Module) -> None:
    """Replace every 2:4 layer by a dense one, in place (torchao's function of this name)."""
    packed = (Sparse24Linear, Sparse24LinearSTE)
    _replace(model, {n: m.to_dense() for n, m in model.named_modules() if isinstance(m, packed)})


def _replace(model: nn.Module, new: dict[str, nn.Module]) -> None:
    for name, module in new.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
