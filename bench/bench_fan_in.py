"""Fixed fan-in output layers against the dense layer, torch.sparse CSR, and the memory bar."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Case, compare, relative_error
from recsparse_kernels import ops
from recsparse_kernels.ops.fan_in import column_dtype

POSITIVES = 5  # a row


def layer_of(batch, in_features, labels, fan_in, group_size, dtype=torch.float32):
    """The layer's own tensors, larger than the cache at these sizes; torch.randint: columns may repeat."""
    rows = -(-labels // group_size)
    x = torch.randn(batch, in_features).to(dtype)
    w = (torch.randn(labels, fan_in) / fan_in**0.5).to(dtype)
    indices = torch.randint(0, in_features, (rows, fan_in), dtype=column_dtype(in_features))
    offsets = POSITIVES * torch.arange(batch + 1)
    return (
        x,
        w,
        indices,
        torch.zeros(labels, dtype=dtype),
        (offsets, torch.randint(0, labels, (POSITIVES * batch,))),
    )


def csr_of(w, indices, group_size, in_features, index_dtype=torch.int64):
    """The same layer as torch.sparse takes it: columns in order within a row, repeats summed.

    int64 is what ``to_sparse_csr`` gives; MKL takes int32 as well, which is less to read.
    """
    columns = indices.long().repeat_interleave(group_size, 0)[: w.shape[0]].sort(1)
    values = w.gather(1, columns.indices)
    crow = w.shape[1] * torch.arange(w.shape[0] + 1)
    places = (crow.to(index_dtype), columns.values.flatten().to(index_dtype))
    return torch.sparse_csr_tensor(*places, values.flatten(), (w.shape[0], in_features))


SHAPES = [  # (B, I, O, F, G): the bar, then its neighbours
    (32, 768, 131_073, 32, 1),
    (32, 768, 131_073, 128, 1),
    (32, 768, 131_073, 32, 16),
    (32, 768, 131_073, 128, 32),
    (32, 768, 131_073, 16, 1),
    (32, 768, 131_073, 64, 1),
    (32, 768, 131_073, 32, 64),
    (1, 768, 131_073, 32, 1),
    (8, 768, 131_073, 32, 1),
    (16, 768, 131_073, 32, 1),
    (64, 768, 131_073, 32, 1),
    (128, 768, 131_073, 32, 1),
    (128, 768, 131_073, 128, 64),
    (32, 512, 983, 64, 1),
    (512, 512, 983, 256, 1),
]


def text(shape):
    return "B={} I={} O={} F={} G={}".format(*shape)


@pytest.mark.parametrize("shape", SHAPES, ids=text)
def test_forward(shape, benchmark):
    batch, in_features, labels, fan_in, group_size = shape
    x, w, indices, bias, _ = layer_of(*shape)
    dense = torch.randn(labels, in_features) * 0.03
    csr = csr_of(w, indices, group_size, in_features)
    csr_int32 = csr_of(w, indices, group_size, in_features, torch.int32)
    exact = csr.double() @ x.double().t()

    def ours():
        return ops.fan_in_linear(x, w, indices, bias, group_size=group_size)

    def check():
        assert relative_error(ours(), exact.t()) < 1e-6

    compare(
        Case("fan_in_linear", "forward", text(shape), density=fan_in / in_features),
        {
            "F.linear": lambda: F.linear(x, dense, bias),
            "torch.sparse CSR": lambda: csr @ x.t(),
            "torch.sparse CSR int32": lambda: csr_int32 @ x.t(),
            "ours": ours,
        },
        dense="F.linear", check=check, rounds=15, benchmark=benchmark,
        work_bytes=4 * batch * labels + w.nbytes + indices.nbytes,
        work_flops=2 * batch * labels * fan_in, dense_flops=2 * batch * labels * in_features,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=text)
def test_gradients(shape, benchmark):
    """Gradients to input and weight, each an op of its own, against dense products of the same sizes."""
    batch, in_features, labels, fan_in, group_size = shape
    x, w, indices, _, _ = layer_of(*shape)
    dense, grad = torch.randn(labels, in_features) * 0.03, torch.randn(batch, labels)
    linear = torch.ops.recsparse

    def grad_input():
        return linear.fan_in_linear_grad_input(grad, w, indices, in_features, group_size)

    def grad_weight():
        return linear.fan_in_linear_grad_weight(grad, x, indices, group_size)

    def check():
        csr = csr_of(w, indices, group_size, in_features).double()
        assert relative_error(grad_input(), (csr.t() @ grad.double().t()).t()) < 1e-6
        columns, rows = indices[0].long(), min(group_size, labels)
        assert (
            relative_error(grad_weight()[:rows], grad[:, :rows].double().t() @ x[:, columns].double()) < 1e-6
        )

    for name, torch_call, ours in (
        ("fan_in_linear_grad_input", lambda: grad @ dense, grad_input),
        ("fan_in_linear_grad_weight", lambda: grad.t() @ x, grad_weight),
    ):
        compare(
            Case(name, "forward", text(shape), density=fan_in / in_features),
            {"torch": torch_call, "ours": ours},
            dense="torch", check=check, rounds=9,
            work_flops=2 * batch * labels * fan_in, dense_flops=2 * batch * labels * in_features,
        )  # fmt: skip
    benchmark.pedantic(grad_weight, rounds=5)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=text)
def test_training_step(shape, benchmark):
    """Loss, gradients to input, weight and bias, SGD on weight and bias."""
    batch, in_features, labels, fan_in, group_size = shape
    x, w, indices, bias, positives = layer_of(*shape)
    offsets, chosen = positives
    x.requires_grad_()
    dense = torch.nn.Linear(in_features, labels)
    torch.nn.init.normal_(dense.weight, std=0.03)
    dense_optimizer = torch.optim.SGD(dense.parameters(), lr=1e-3)
    targets = torch.zeros(batch, labels)
    targets[torch.arange(batch).repeat_interleave(POSITIVES), chosen] = 1

    def dense_step():
        dense_optimizer.zero_grad()
        x.grad = None
        F.binary_cross_entropy_with_logits(dense(x), targets).backward()
        dense_optimizer.step()

    own = [w.clone().requires_grad_(), bias.clone().requires_grad_()]
    optimizer = torch.optim.SGD(own, lr=1e-3)

    def autograd_step():
        optimizer.zero_grad()
        x.grad = None
        ops.fan_in_loss(x, own[0], indices, own[1], *positives, group_size=group_size).backward()
        optimizer.step()

    update = ops.FanInUpdate("sgd", lr=1e-3)
    fused_weight, fused_bias = w.clone(), bias.clone()
    detached = x.detach()

    def fused_step():
        return ops.fan_in_loss_step(
            detached, fused_weight, indices, fused_bias, *positives, update, group_size=group_size
        )

    def check():
        autograd_step()
        _, grad = fused_step()
        assert relative_error(grad, x.grad) < 1e-5 and relative_error(fused_weight, own[0].detach()) < 1e-6

    compare(
        Case("fan_in_loss", "step", text(shape), density=fan_in / in_features),
        {"F.linear + BCE + SGD": dense_step, "ours-fused": fused_step, "ours-autograd": autograd_step},
        dense="F.linear + BCE + SGD", check=check, rounds=7, benchmark=benchmark,
        work_flops=6 * batch * labels * fan_in, dense_flops=6 * batch * labels * in_features,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPES[0], (1, 768, 131_073, 32, 1)], ids=text)
def test_topk(shape, benchmark):
    batch, in_features, labels, fan_in, group_size = shape
    x, w, indices, bias, _ = layer_of(*shape)
    dense = torch.randn(labels, in_features) * 0.03

    def ours():
        return ops.fan_in_topk(x, w, indices, bias, 5, group_size=group_size)

    def check():
        logits = ops.fan_in_linear(x, w, indices, bias, group_size=group_size)
        assert torch.equal(ours()[0], logits.topk(5).values)

    compare(
        Case("fan_in_topk", "forward", text(shape) + " k=5", density=fan_in / in_features),
        {"F.linear + topk": lambda: F.linear(x, dense, bias).topk(5), "ours": ours},
        dense="F.linear + topk", check=check, rounds=15, benchmark=benchmark,
    )  # fmt: skip


MEMORY_PROGRAM = """
import json, re, sys, time
from pathlib import Path
import torch
from recsparse_kernels.nn import FixedFanInLinear
torch.set_num_threads(2)
fused = sys.argv[1] == "fused"

def peak_kib():  # not ru_maxrss: a child process starts from its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak_kib()
head = FixedFanInLinear(768, 2_812_281, 32)
x = torch.randn(128, 768, requires_grad=True)
positives = (5 * torch.arange(129), torch.randint(0, 2_812_281, (640,)))
if fused:
    head.fuse_optimizer("sgd", lr=1e-3, momentum=0.9)
else:
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3, momentum=0.9)
times = []
for step in range(3):
    start = time.perf_counter()
    loss = head.loss(x, positives)
    loss.backward()
    if not fused:
        optimizer.step()
        optimizer.zero_grad()
    times.append(time.perf_counter() - start)
assert loss.isfinite() and x.grad.abs().sum() > 0
print(json.dumps({"before_kib": before, "peak_kib": peak_kib(), "step_s": min(times)}))
"""


@pytest.mark.parametrize("form", ["fused", "autograd"])
def test_three_million_labels_within_4_gb(form):
    """Peak resident memory of a process that trains a whole step: L = 2,812,281, H = 768, F = 32, B = 128."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, form], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout)
    gib = {name: result[f"{name}_kib"] / 2**20 for name in ("before", "peak")}
    print(f"\nfan_in step L=2812281 H=768 F=32 B=128, {form}: {result['step_s']:.2f} s")
    print(f"  peak {gib['peak']:.2f} GiB resident, {gib['before']:.2f} before the layer")
    assert result["peak_kib"] * 1024 < 4e9
