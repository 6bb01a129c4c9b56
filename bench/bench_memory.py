"""The memory bar: no op makes temporaries larger than its inputs plus its outputs, at full size.

Each scenario runs in a process of its own. Every op it calls, gradients too, is measured by itself, and so
is what it calls through `whole`: the peak of resident memory is reset before the call
(/proc/self/clear_refs, Linux), and what it rises by, less the outputs, is what the call took for itself.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recsparse_kernels import ops
from recsparse_kernels.ops._backend import Op
from recsparse_kernels.ops.masked_embedding_table import random_mask_bits
from recsparse_kernels.testing import fan_in, low_rank, masked_embedding, sparse24

SLACK = 4 * 2**20  # bytes: stacks of threads, pages of code, the allocator's own

# A freed block goes back to the system at once, so that the next op cannot take it unseen.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def whole(function, *args):
    """``function(*args)``; while a scenario is measured, measured as an op is."""
    return function(*args)


def fan_in_layer(group_size=1, batch=32, dtype=torch.float32):
    case = fan_in.make_case(batch, 768, 131_073, 32, group_size, dtype=dtype)
    for tensor in (case.input, case.weight, case.bias):
        tensor.requires_grad_()
    return case, {"group_size": group_size}


def run_fan_in(group_size=1, batch=32, dtype=torch.float32):
    case, options = fan_in_layer(group_size, batch, dtype)
    output = ops.fan_in_linear(*case.layer, **options)
    output.backward(torch.ones_like(output))
    ops.fan_in_loss(*case.layer, *case.positives, **options).backward()
    with torch.no_grad():
        ops.fan_in_loss(*case.layer, *case.positives, **options)
        ops.fan_in_topk(*case.layer, 5, **options)
        update = ops.FanInUpdate("sgd", lr=0.1)
        ops.fan_in_loss_step(*case.layer, *case.positives, update, **options)
        ops.fan_in_linear_update(output.detach(), *case.layer, update, **options)
    scores = ops.fan_in_score(*case.layer, torch.randint(0, 131_073, (batch, 100)), **options)
    scores.backward(torch.ones_like(scores))
    with torch.no_grad():
        ops.fan_in_rewire(case.weight, case.indices, 768, fraction=0.1, **options)


def run_fan_in_shared():
    run_fan_in(16)


def run_fan_in_row():
    run_fan_in(batch=1)


def run_fan_in_bfloat16():
    run_fan_in(dtype=torch.bfloat16)


def run_low_rank_bag(dtype=torch.float32):
    table, up, mean = (t.to(dtype).requires_grad_() for t in low_rank.make_table(1_000_000, 16, 128))
    indices, offsets = torch.randint(0, 1_000_000, (40_960,)), torch.arange(0, 40_960, 20)
    weights = torch.rand(40_960).to(dtype).requires_grad_()
    for options in (
        {"mode": "sum"},
        {"mode": "sum", "sparse": True},
        {"mode": "mean", "per_sample_weights": weights},
        {"mode": "max"},
    ):
        output = ops.low_rank_embedding_bag(indices, table, up, mean, offsets, **options)
        output.backward(torch.ones_like(output))
    output = ops.low_rank_embedding(indices, table, up, mean)
    output.backward(torch.ones_like(output))


def run_low_rank_bag_bfloat16():
    run_low_rank_bag(torch.bfloat16)


def run_low_rank_fields():
    batch, fields, rows = 4096, 26, 50_000
    parts = [torch.randn(s) for s in ((fields * rows, 8), (fields, 8, 16), (fields, 16))]
    table, projections, bias = (p.requires_grad_() for p in parts)
    indices, starts = torch.randint(0, rows, (batch, fields)), torch.arange(fields + 1) * rows
    for options in ({"interaction": True}, {"output": False, "interaction": True}):
        result = ops.low_rank_fields(indices, table, starts, projections, bias, **options)
        given = [t for t in result if t is not None]
        torch.autograd.backward(given, [torch.ones_like(t) for t in given])


def run_low_rank_dense(dtype=torch.float32):
    x0, *rest, grad = (t.to(dtype) for t in low_rank.make_cross(1024, 3456, 64))
    ops.low_rank_cross(x0.requires_grad_(), *(t.requires_grad_() for t in rest)).backward(grad)
    *inputs, grad = (t.to(dtype) for t in low_rank.make_linear(2048, 2000, 320, 2000))
    inputs = [t.requires_grad_() for t in inputs]
    ops.low_rank_linear(*inputs, mid_activation="relu", activation="gelu").backward(grad)


def run_low_rank_dense_bfloat16():
    run_low_rank_dense(torch.bfloat16)


def run_masked(layout="bitmask", dtype=torch.float32):
    table, _ = masked_embedding.make_large_table(1_000_000, 64, 0.2, layout, dtype)
    indices, offsets = torch.randint(0, 1_000_000, (40_960,)), torch.arange(0, 40_960, 20)
    weights = torch.rand(40_960).to(dtype).requires_grad_()
    table = table._replace(values=table.values.requires_grad_())
    for options in (
        {"mode": "sum"},
        {"mode": "sum", "sparse": True},
        {"mode": "mean", "per_sample_weights": weights},
        {"mode": "max"},
    ):
        output = ops.masked_embedding_bag(indices, table, offsets, **options)
        output.backward(torch.ones_like(output))
    output = ops.masked_embedding(indices, table)
    output.backward(torch.ones_like(output))
    scores = ops.masked_embedding_matmul_t(torch.randn(32, 64).to(dtype).requires_grad_(), table)
    scores.backward(torch.ones_like(scores))
    dense = ops.masked_embedding_unpack(table)
    dense.backward(torch.ones_like(dense))


def run_masked_fixed_k():
    run_masked("fixed_k")


def run_masked_bfloat16():
    run_masked(dtype=torch.bfloat16)


def run_masked_fused(dtype=torch.float32):
    table, _ = masked_embedding.make_large_table(1_000_000, 64, 0.2, "bitmask", dtype)
    indices, offsets = torch.randint(0, 1_000_000, (40_960,)), torch.arange(0, 40_960, 20)
    table = table._replace(values=table.values.requires_grad_())
    for kind in ("sgd", "rowwise_adagrad", "adam"):
        optimizer = ops.FusedOptimizer.create(kind, table, lr=0.1)
        output = ops.masked_embedding_bag(indices, table, offsets, fused=optimizer)
        output.backward(torch.ones_like(output))


def run_masked_fused_bfloat16():
    run_masked_fused(torch.bfloat16)


def run_masked_storage(layout="bitmask", dtype=torch.float32):
    bits = random_mask_bits(1_000_000, 64, 0.2, layout)
    table, weight = masked_embedding.make_large_table(1_000_000, 64, 0.2, layout, dtype)
    whole(ops.masked_embedding_pack, weight, bits)
    whole(ops.masked_embedding_repack, table, bits)
    records = whole(ops.masked_embedding_freeze, table)
    whole(ops.masked_embedding_thaw, records)
    ops.masked_embedding_bag_frozen(torch.randint(0, 1_000_000, (2048, 20)), records)


def run_masked_storage_fixed_k():
    run_masked_storage("fixed_k")


def run_masked_storage_bfloat16():
    run_masked_storage(dtype=torch.bfloat16)


def run_sparse24(batch=2048, size=1024, dtype=torch.float32):
    x, values, metadata, bias, grad = sparse24.make_case(batch, size, size, dtype=dtype)
    inputs = [t.requires_grad_() for t in (x, values)]
    ops.sparse24_linear(*inputs, metadata, bias.requires_grad_(), activation="gelu").backward(grad)
    weight = sparse24.make_weight(size, size).to(dtype)
    with torch.no_grad():
        for transposable in (False, True):
            mask = ops.sparse24_mask(weight, transposable=transposable)
        values, metadata = ops.sparse24_compress(weight, mask)
        ops.sparse24_gather(weight, metadata)
        ops.sparse24_decompress(values, metadata, size)
    ops.sparse24_linear_ste(x, weight.requires_grad_(), mask, bias).backward(grad)


def run_sparse24_row():
    run_sparse24(1, 4096)


def run_sparse24_bfloat16():
    run_sparse24(dtype=torch.bfloat16)


def run_sparse24_large():
    run_sparse24(512, 4096)


SCENARIOS = {name.removeprefix("run_"): value for name, value in globals().items() if name.startswith("run_")}


def tensors_of(values):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def bytes_of(values) -> int:
    """Bytes of the memory that tensors stand on, each piece once (a broadcast gradient is one element)."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(values)}
    return sum(storages.values())


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(scenario: str) -> list[dict]:
    """What each op of the scenario took; of several calls of an op the one that took most."""
    global whole
    worst: dict[str, dict] = {}
    call = Op.__call__

    def watched(name, function, *args, **options):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        result = function(*args, **options)
        peak = resident("VmHWM") - before
        outputs = bytes_of([result])
        row = {
            "op": name, "inputs": bytes_of(args), "outputs": outputs, "temporary": max(peak - outputs, 0),
        }  # fmt: skip
        if name not in worst or row["temporary"] > worst[name]["temporary"]:
            worst[name] = row
        return result

    def watched_op(self, *args, backend=None):
        if inside_whole:
            return call(self, *args, backend=backend)
        return watched(self.name, functools.partial(call, self, backend=backend), *args)

    def watched_whole(function, *args):
        inside_whole.append(function)
        result = watched(function.__name__, function, *args)
        inside_whole.pop()
        return result

    inside_whole: list = []
    torch.set_num_threads(2)
    SCENARIOS[scenario]()  # libraries and threads are there before anything is measured
    Op.__call__, whole = watched_op, watched_whole
    SCENARIOS[scenario]()
    return list(worst.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux: /proc/self/clear_refs")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_temporaries(scenario):
    """Printed in MiB: inputs, outputs, and what the op took beyond them."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.bench_memory", scenario],
        capture_output=True, text=True, env=os.environ | ALLOCATOR, check=False,
        cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert rows
    print(f"\n{scenario:<40} {'inputs':>9} {'outputs':>9} {'temporary':>9}  of inputs + outputs")
    for row in rows:
        sizes = (row["inputs"], row["outputs"], row["temporary"])
        share = row["temporary"] / max(row["inputs"] + row["outputs"], 1)
        print(f"  {row['op']:<38}", *(f"{size / 2**20:9.2f}" for size in sizes), f"  {share:.2f}")
    over = [r["op"] for r in rows if r["temporary"] > r["inputs"] + r["outputs"] + SLACK]
    assert not over, f"temporaries above inputs + outputs: {over}"


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
