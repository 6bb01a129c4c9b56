"""What every layer of the package offers besides ``forward``."""

import copy
import dataclasses
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import place_table

WEIGHT_VIEW_LIMIT_BYTES = 256 * 2**20  # `.weight` warns when its dense copy is larger


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of a layer against the dense layer it stands for."""

    dense_bytes: int
    own_bytes: int
    optimizer_bytes: int
    dense_optimizer_bytes: int

    @property
    def ratio(self) -> float:
        """Own over dense bytes of state (parameters and buffers)."""
        return self.own_bytes / self.dense_bytes if self.dense_bytes else 1.0


class PackedModule(nn.Module):
    """Base of the layers that store less than the dense layer they replace.

    A subclass has ``dense_type``, ``from_dense``, ``dense_weight``, ``_empty_dense``, and
    ``_load_dense``; this class derives the rest from them.
    """

    dense_type: ClassVar[type[nn.Module]]
    lookup_names: ClassVar[tuple[str, ...]] = ()  # tensors read at random: kept on huge pages

    def _place_tables(self) -> None:
        place_table(*(getattr(self, name) for name in self.lookup_names))

    def _apply(self, fn, recurse=True):  # .to(), .float(), ...: other memory
        super()._apply(fn, recurse)
        self._place_tables()
        return self

    def __setstate__(self, state):  # copy.deepcopy, pickle
        super().__setstate__(state)
        self._place_tables()

    @classmethod
    def from_dense(cls, module: nn.Module, **options: Any) -> "PackedModule":
        """The packed layer for a dense one; keeps its device, dtype, bias and training flag."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The dense weight this layer stands for, differentiable with respect to its parameters."""
        raise NotImplementedError

    def _empty_dense(self) -> nn.Module:
        """A dense layer of the same shape, device and dtype, parameters not yet meaningful."""
        raise NotImplementedError

    def _load_dense(self, dense: nn.Module) -> None:
        """Become, in place, what ``from_dense(dense)`` with this layer's options would be."""
        raise NotImplementedError

    @torch.no_grad()
    def pack_state(self, name: str, dense: Tensor) -> Tensor | None:
        """What a tensor laid out like the dense weight (an optimizer's moment) becomes for a parameter.

        Args:
            name: of one of this layer's parameters.
            dense: same shape as `dense_weight`, any floating dtype.

        Returns:
            The entries at the kept positions, laid out like the parameter; None when the parameter has
            no positions in the dense weight (a low-rank factor).

        Here the positions are found by numbering the parameter's entries and looking where the numbers
        come out in `dense_weight`; a subclass that knows them overrides this.
        """
        own = self._parameters.get(name)
        if own is None or name == "bias" or own.numel() == 0:
            return None
        probe = copy.copy(self)
        parameters = {key: None if p is None else p.detach().double() for key, p in self._parameters.items()}
        numbers = torch.arange(1, own.numel() + 1, dtype=torch.float64, device=own.device)
        probe.__dict__["_parameters"] = {**parameters, name: numbers.view(own.shape)}
        found = probe.dense_weight().flatten()
        at = found.nonzero().squeeze(1)
        slots = found[at].long() - 1
        one_to_one = torch.equal(slots.double() + 1, found[at]) and slots.numel() == slots.unique().numel()
        if not one_to_one or slots.numel() == 0 or int(slots.min()) < 0 or int(slots.max()) >= own.numel():
            return None
        packed = dense.new_zeros(own.numel())
        packed[slots] = dense.flatten()[at]
        return packed.view(own.shape)

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, for code that reads ``layer.weight``; warns above a size limit."""
        size = self.dense_bytes()
        if size > WEIGHT_VIEW_LIMIT_BYTES:
            warnings.warn(
                f"{type(self).__name__}.weight builds a dense copy of {size / 2**20:.0f} MiB on every read",
                stacklevel=2,
            )
        return self.dense_weight()

    def to_dense(self) -> nn.Module:
        """A dense layer with the same output: exact on what was kept, zero elsewhere."""
        dense = self._empty_dense()
        with torch.no_grad():
            dense.weight.copy_(self.dense_weight())
            if getattr(dense, "bias", None) is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def dense_state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The state of `to_dense`, for loading into the model as it was before the swap."""
        return self.to_dense().state_dict(prefix=prefix)

    def load_dense_state_dict(self, state_dict: dict[str, Tensor], prefix: str = "") -> None:
        """Load a dense checkpoint: the layer becomes what ``from_dense`` of the dense layer would be.

        Raises:
            ValueError: a key is missing or has another shape; the layer is as it was.
        """
        dense = self._empty_dense()
        for key, own in dense.state_dict().items():
            if prefix + key not in state_dict:
                raise ValueError(
                    f"{prefix + key!r} is missing in the dense state_dict; it has {sorted(state_dict)}"
                )
            if state_dict[prefix + key].shape != own.shape:
                got = tuple(state_dict[prefix + key].shape)
                raise ValueError(f"{prefix + key!r} must have shape {tuple(own.shape)}; got {got}")
        dense.load_state_dict({key: state_dict[prefix + key] for key in dense.state_dict()})
        self._load_dense(dense)

    def dense_bytes(self) -> int:
        """Bytes of the state of the dense layer, without building it."""
        raise NotImplementedError

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """Dense bytes, own bytes, optimizer bytes.

        Without an optimizer, optimizer bytes are those of Adam: two float32 moments a parameter.
        With one, those of the state it now holds for this layer.
        """
        own = sum(t.numel() * t.element_size() for t in self.state_dict().values())
        parameters = list(self.parameters())
        moments = 8 * sum(p.numel() for p in parameters)
        dense_bytes = self.dense_bytes()
        element = parameters[0].element_size() if parameters else 4
        dense_moments = 8 * (dense_bytes // element)
        if optimizer is not None:
            held = sum(
                t.numel() * t.element_size()
                for p in parameters
                for t in optimizer.state.get(p, {}).values()
                if isinstance(t, Tensor)
            )
            dense_moments = dense_moments * held // moments if moments else 0
            moments = held
        return MemoryReport(dense_bytes, own, moments, dense_moments)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """As torch, but a layer whose tensors do not all fit takes none of them."""
        wrong = [
            f"{prefix + key}: this layer has shape {tuple(own.shape)}, "
            f"the state_dict {tuple(state_dict[prefix + key].shape)}"
            for key, own in self.state_dict(keep_vars=True).items()
            if prefix + key in state_dict and state_dict[prefix + key].shape != own.shape
        ]
        missing = [prefix + key for key in self.state_dict() if prefix + key not in state_dict]
        if wrong or (missing and strict):
            error_msgs.extend(wrong)
            missing_keys.extend(missing)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def copy_requires_grad(target: nn.Module, source: nn.Module) -> None:
    """A frozen dense layer gives a frozen packed layer."""
    if not any(p.requires_grad for p in source.parameters()):
        target.requires_grad_(False)


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data`` of another shape; graphs that still hold the tensor do no harm.

    While one does (a loss that is in scope, an old DDP wrapper), autograd uses the gradient accumulator
    that it made for the old shape. It makes a new one only after a change of dtype or device.
    """
    if data.is_floating_point():
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data
