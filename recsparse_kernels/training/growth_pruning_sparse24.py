"""The 2:4 mode of alternate growth and pruning (ours): linear layers that are 2:4 in the sparse phases.

Masks are transposable: as many weights of each input as of each output stay, and where sparse tensor
cores multiply the gradient to the input is a 2:4 product too. Values, their gradient and
their optimizer state have half the size meanwhile. What a 2:4 mask drops is itself at most two of each
four, so that it is kept, where it is to come back, at the same half size.
"""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import Sparse24Linear
from ..optimizer_remap import remap_optimizer
from ..reference.sparse24 import padded
from ..swap import swap_modules, unswap_modules
from ._method import check_finite, check_own_weight, check_tensor_state, generator

MIN_SIDE = 64  # a 2:4 product of smaller layers is not faster than a dense one


def find_linears(model: nn.Module) -> list[str]:
    """Linear layers with both sides at least `MIN_SIDE`."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and min(module.in_features, module.out_features) >= MIN_SIDE
    ]


class Sparse24Phases:
    """Swaps the named layers to 2:4 and back, with their optimizer state."""

    def __init__(self, model: nn.Module, names: list[str], optimizers: list, grow: str, seed: int):
        if not names:
            raise ValueError(f"the model has no nn.Linear with sides of at least {MIN_SIDE}: name the layers")
        for name in names:
            module = dict(model.named_modules()).get(name)
            if type(module) is not nn.Linear:
                raise TypeError(f"layer {name!r} must be an nn.Linear; got {type(module).__name__}")
            check_own_weight(model, name, module)
        self.model, self.names, self.optimizers, self.grow, self.seed = model, names, optimizers, grow, seed
        for left in swap_modules(model, self._rules(), min_numel=0, dry_run=True).left:
            if left.name in names:
                raise ValueError(f"layer {left.name!r} cannot become 2:4: {left.reason}")
        layers = [model.get_submodule(name) for name in dict.fromkeys(names)]
        self.numel = sum(x.out_features * padded(x.in_features) // 2 for x in layers)  # of all values
        self.dropped: dict[str, Tensor] = {}  # layer -> values that the mask dropped, packed as 2:4
        self._report = None

    @property
    def sparse(self) -> bool:
        return self._report is not None

    def is_packed(self, module: nn.Module) -> bool:
        return isinstance(module, Sparse24Linear)

    def check_weights(self) -> None:
        """ValueError if a weight is NaN."""
        for name in self.names:
            layer = self.model.get_submodule(name)
            check_finite(f"weight of {name!r}", layer.values if self.sparse else layer.weight)

    def change(self, sparse: bool, step: int) -> None:
        self.to_dense(step)
        if sparse:
            self.to_sparse()

    def _rules(self) -> dict:
        return {name: lambda m: Sparse24Linear.from_dense(m, transposable=True) for name in self.names}

    def to_sparse(self) -> None:
        if self.grow == "frozen":
            self.dropped = {name: self._packed_rest(name) for name in self.names}
        self._report = swap_modules(self.model, self._rules(), min_numel=0)
        self._carry(self._report)

    @torch.no_grad()
    def _packed_rest(self, name: str) -> Tensor:
        weight = self.model.get_submodule(name).weight
        mask = ops.sparse24_mask(weight, transposable=True)
        return ops.sparse24_compress(weight, ~mask)[0]

    def to_dense(self, step: int) -> None:
        if not self.sparse:
            return
        masks = {name: self.model.get_submodule(name).mask() for name in self.names}
        self._carry(unswap_modules(self.model, self._report))
        self._report = None
        for name, mask in masks.items():
            self._fill(name, mask, step)
        self.dropped = {}

    @torch.no_grad()
    def _fill(self, name: str, mask: Tensor, step: int) -> None:
        layer = self.model.get_submodule(name)
        if self.grow == "frozen" and name in self.dropped:
            _, metadata = ops.sparse24_compress(layer.weight, ~mask)
            rest = ops.sparse24_decompress(self.dropped[name], metadata, layer.in_features)
            layer.weight.copy_(torch.where(mask, layer.weight, rest))
        elif self.grow == "random":
            draw = torch.rand(mask.shape, generator=generator(self.seed, step, name))
            fresh = ((2 * draw - 1) / math.sqrt(layer.in_features)).to(layer.weight)
            layer.weight.copy_(torch.where(mask, layer.weight, fresh))

    def _carry(self, report) -> None:
        for optimizer in self.optimizers:
            remap_optimizer(optimizer, report)

    # -- state: values and masks are the model's own ---------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        return dict(self.dropped)

    def check_state(self, state: dict, sparse: bool) -> None:
        wanted = set(self.names) if sparse and self.grow == "frozen" else set()
        if set(state) != wanted:
            raise ValueError(f"packed must have {sorted(wanted)}; got {sorted(state)}")
        for name in wanted:
            layer = self.model.get_submodule(name)
            like = layer.values if self.sparse else ops.sparse24_compress(
                layer.weight.detach(), ops.sparse24_mask(layer.weight.detach())
            )[0]  # fmt: skip
            check_tensor_state(f"packed of {name!r}", state[name], like)

    def take_state(self, state: dict, sparse: bool) -> None:
        self.to_dense(step=0)
        if sparse:
            self.to_sparse()
        self.dropped = dict(state)
