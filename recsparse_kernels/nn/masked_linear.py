"""Linear layer whose weight is pruned element by element and stores only what is kept."""

import torch
from torch import Tensor, nn

from ._base import PackedModule, copy_requires_grad
from .masked_embedding import MaskedEmbedding


class MaskedLinear(PackedModule):
    r"""``nn.Linear`` with any mask over its weight: one multiply-add for each weight kept.

    ``y = x W^T + bias`` with ``W [O, I]`` as a packed table of O rows. The Parameter ``packed.values``,
    its gradient and its optimizer state have as many elements as are kept.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        density: of the random mask to start with; exactly ``round(density * O * I)`` weights are kept.

    State: ``packed.values [nnz]``, ``packed.rows`` (mask bits and row starts), ``packed.bases``, ``bias``.
    """

    dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        density: float = 0.2,
        _packed: MaskedEmbedding | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        factory = {"device": device, "dtype": dtype}
        self.packed = _packed or MaskedEmbedding(out_features, in_features, density=density, **factory)
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        if _packed is None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Values with the variance that outputs of ``nn.Linear`` start with, at this density."""
        kept = max(self.packed.density * self.in_features, 1e-12)
        bound = min(kept, 1) * kept**-0.5  # as fan-in `kept`; not above 1
        nn.init.uniform_(self.packed.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(max(self.in_features, 1) ** -0.5), max(self.in_features, 1) ** -0.5)

    def forward(self, input: Tensor) -> Tensor:
        output = self.packed.matmul_t(input)
        if self.bias is None:
            return output
        # without gradients in place: no second [B, O] tensor. torch.func forbids it for the output of an op
        bias = self.bias.to(output.dtype)  # another inside autocast
        return output + bias if torch.is_grad_enabled() else output.add_(bias)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, *, density: float | None = None, mask: Tensor | None = None
    ) -> "MaskedLinear":
        """The packed layer for a dense one; keeps its device, dtype, training flag and requires_grad.

        Args:
            density: keep exactly ``round(density * O * I)`` weights, the largest magnitudes.
            mask: bool ``[O, I]``, or mask bits ``[O, ceil(I/8)]`` uint8; not together with ``density``.
                With neither, a mask of ``torch.nn.utils.prune`` if the module has one, else what is not 0.

        Raises:
            TypeError: the module is not an ``nn.Linear``.
            ValueError: both ``density`` and ``mask``; shape of the mask.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module must be a torch.nn.Linear; got {type(module).__name__}")
        if density is None and mask is None:
            mask = getattr(module, "weight_mask", module.weight.detach()) != 0
        table = _as_embedding(module.weight.detach())
        new = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            module.weight.device,
            module.weight.dtype,
            _packed=MaskedEmbedding.from_dense(table, density=density, mask=mask),
        )
        if module.bias is not None:
            with torch.no_grad():
                new.bias.copy_(module.bias)
        new.requires_grad_(True)
        copy_requires_grad(new, module)
        return new.train(module.training)

    def refresh(self, weight: Tensor, mask: Tensor) -> bool:
        """New values and a new mask from a dense weight, in place; see `MaskedEmbedding.refresh`."""
        return self.packed.refresh(weight, mask)

    @property
    def density(self) -> float:
        """Kept over all weights."""
        return self.packed.density

    @property
    def mask(self) -> Tensor:
        """Bool ``[O, I]``, built on every read."""
        return self.packed.mask

    def dense_weight(self) -> Tensor:
        return self.packed.dense_weight()

    def _empty_dense(self) -> nn.Linear:
        values = self.packed.values
        return nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=values.device,
            dtype=values.dtype,
        )

    @torch.no_grad()
    def _load_dense(self, dense: nn.Linear) -> None:
        self.packed._load_dense(_as_embedding(dense.weight.detach()))
        if self.bias is not None:
            self.bias.copy_(dense.bias)

    def pack_state(self, name: str, dense: Tensor) -> Tensor | None:
        return self.packed.pack_state("values", dense) if name == "packed.values" else None

    def dense_bytes(self) -> int:
        biases = 0 if self.bias is None else self.out_features
        return (self.in_features * self.out_features + biases) * self.packed.dtype.itemsize

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Another mask fits, with more or fewer values; a bias that does not keeps all from being taken."""
        bias = state_dict.get(prefix + "bias")
        if self.bias is not None and bias is not None and bias.shape != self.bias.shape:
            for key in [k for k in state_dict if k.startswith(prefix + "packed.")]:
                del state_dict[key]
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={self.density:.4g}"
        )


def _as_embedding(weight: Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(weight)  # shares its memory
