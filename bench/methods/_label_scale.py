"""One output layer on generated labels, in a process of its own: peak memory and step time, as JSON.

`python -m bench.methods._label_scale '{"labels": 131073, "head": "fan_in", ...}'`. Hidden features are
random; each row has POSITIVES labels drawn from a Zipf law. Peak is the resident set's high-water mark over
what the process held before the layer was made.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn

from recsparse_kernels.nn import FixedFanInLinear
from recsparse_kernels.training import TopologyUpdate

POSITIVES = 5
IN_FEATURES = 768


def resident(key: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def zipf_labels(labels: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Rank r with probability about 1 / r."""
    draw = torch.rand(count, generator=generator, dtype=torch.float64)
    return ((labels + 1.0) ** draw - 1).long().clamp_(0, labels - 1)


def layer_of(labels: int, head: str, fan_in: int, group_size: int, dtype: torch.dtype) -> nn.Module:
    if head == "dense":
        return nn.Linear(IN_FEATURES, labels, dtype=dtype)
    return FixedFanInLinear(IN_FEATURES, labels, fan_in, group_size=group_size, dtype=dtype)


def stepper(layer: nn.Module, optimizer: str, batch: int):
    """A function that does one training step, and the bytes that must be held: weights, moments, index."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(layer.parameters()).dtype
    offsets = torch.arange(batch + 1) * POSITIVES
    if isinstance(layer, FixedFanInLinear):
        rounding = dtype == torch.bfloat16
        options = {"momentum": 0.9} if optimizer == "momentum" else {}
        kind = "adam" if optimizer == "adam" else "sgd"
        layer.fuse_optimizer(kind, lr=0.05, stochastic_rounding=rounding, **options)

        def step() -> None:
            x = torch.randn(batch, IN_FEATURES, generator=generator).to(dtype).requires_grad_()
            labels = zipf_labels(layer.out_features, POSITIVES * batch, generator)
            layer.loss(x, (offsets, labels), reduction="batchmean").backward()

        report = layer.memory_report()
        return step, report.own_bytes + report.optimizer_bytes
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    }
    own = kinds[optimizer](layer.parameters())

    def step() -> None:
        x = torch.randn(batch, IN_FEATURES, generator=generator).to(dtype).requires_grad_()
        labels = zipf_labels(layer.out_features, POSITIVES * batch, generator)
        logits = layer(x).float()
        row = torch.arange(batch).repeat_interleave(POSITIVES)
        loss = (nn.functional.softplus(logits).sum() - logits[row, labels].sum()) / batch
        own.zero_grad(set_to_none=True)
        loss.backward()
        own.step()

    weights = sum(p.numel() * p.element_size() for p in layer.parameters())
    return step, weights * {"sgd": 1, "momentum": 2, "adam": 3}[optimizer]


def main(text: str) -> None:
    given = json.loads(text)
    labels, head, batch = given["labels"], given["head"], given["batch"]
    torch.set_num_threads(given["threads"])
    dtype = getattr(torch, given["dtype"])
    small = layer_of(1000, head, given["fan_in"], given["group_size"], dtype)
    stepper(small, given["optimizer"], batch)[0]()  # what the first call loads is not the layer's
    before = resident("VmRSS")
    layer = layer_of(labels, head, given["fan_in"], given["group_size"], dtype)
    step, held = stepper(layer, given["optimizer"], batch)
    times = []
    for _ in range(given["steps"] + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    result = {
        "formula_bytes": held,
        "peak_bytes": resident("VmHWM") - before,
        "step_seconds": statistics.median(times[1:] or times),
    }
    if head == "fan_in":
        start = time.perf_counter()
        TopologyUpdate(layer, update_every=1, end_step=1, drop_fraction=0.2).step()
        result["rewire_seconds"] = time.perf_counter() - start
        result["peak_bytes_with_rewiring"] = resident("VmHWM") - before
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
