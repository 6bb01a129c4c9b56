"""Cases of the selection ops."""

import torch
from torch import Tensor


def make_scores(kind: str, count: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensor:
    """``[count]``: "normal"; "few" different values, zeros of both signs and infinities among them; "zeros"."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=generator)
    if kind == "few":
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-40, -1e-40, 6e-8, 65504.0])
        scores = values[torch.randint(len(values), (count,), generator=generator)]
    elif kind == "zeros":
        scores.zero_()
    elif kind != "normal":
        raise ValueError(f"kind must be normal, few or zeros; got {kind!r}")
    return scores.to(device, dtype)
