"""What only the Triton launchers of fan_in have: chunks, parts, tiles of top-k, no check of indices."""

import dataclasses

import numpy as np
import pytest
import torch

from recsparse_kernels import ops
from recsparse_kernels import triton as triton_backend
from recsparse_kernels.ops import FanInUpdate
from recsparse_kernels.ops import fan_in as fan_in_ops
from recsparse_kernels.reference import fan_in as reference
from recsparse_kernels.testing import assert_close
from recsparse_kernels.testing.fan_in import make_case

if "triton" not in fan_in_ops.LINEAR.backends():
    pytest.skip(f"Triton: {triton_backend.REASON or 'no interpreter'}", allow_module_level=True)

from recsparse_kernels.triton import (  # noqa: E402
    _launch,
    fan_in,
    fan_in_grad_input,
    fan_in_loss,
    fan_in_rewire,
    fan_in_tiles,
    fan_in_topk,
)

FILES = [fan_in, fan_in_loss, fan_in_topk, fan_in_rewire]


@pytest.fixture
def unchecked(check_indices):
    check_indices("none")


def layer_calls(case):
    """Each op that goes over the labels in chunks: result of the call."""
    group, one = case.group_size, torch.ones((), dtype=torch.float32)
    grad = torch.randn(case.input.shape[0], case.weight.shape[0], generator=torch.Generator().manual_seed(1))
    loss = (*case.layer, *case.positives, reference.BCE, reference.SUM, group)

    def step(backend):
        fresh = dataclasses.replace(case, weight=case.weight.clone(), bias=case.bias.clone())
        update = FanInUpdate("adamw", lr=0.1, weight_decay=0.1)
        out = ops.fan_in_loss_step(*fresh.layer, *fresh.positives, update, group_size=group, backend=backend)
        return *out, fresh.weight, fresh.bias, *update.state

    return {
        "linear": lambda b: (fan_in_ops.LINEAR(*case.layer, group, backend=b),),
        "grad_input": lambda b: (
            fan_in_ops.LINEAR_GRAD_INPUT(
                grad, case.weight, case.indices, case.input.shape[1], group, backend=b
            ),
        ),
        "grad_weight": lambda b: (
            fan_in_ops.LINEAR_GRAD_WEIGHT(grad, case.input, case.indices, group, backend=b),
        ),
        "loss_grad": lambda b: fan_in_ops.LOSS_GRAD(one, *loss, True, True, backend=b),
        "loss_step": step,
    }


@pytest.mark.parametrize("shape", [(3, 9, 600, 3, 1), (3, 9, 140, 3, 3), (5, 20, 60, 5, 16)], ids=str)
def test_many_small_chunks(shape, monkeypatch):
    """Chunks of one tile or one group, the last one short, give what the reference gives, each time."""
    monkeypatch.setattr(fan_in_tiles, "SCRATCH_ENTRIES", 1)
    case = make_case(*shape)
    tiles = fan_in_tiles.Tiles(*case.input.shape, *case.weight.shape, case.group_size)
    assert len(tiles.chunks(2**20)) >= 3 or case.group_size == 3
    for name, call in layer_calls(case).items():
        actual, again, wanted = call("triton"), call("triton"), call("reference")
        for a, b, w in zip(actual, again, wanted, strict=True):
            torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
            assert torch.equal(a, b)


@pytest.mark.parametrize("batch, group_size", [(1, 1), (5, 16), (70, 1), (300, 48)])
def test_chunks_cover_all_labels_within_the_budget(batch, group_size):
    for out_features in (0, 1, 47, 48, 49, 5000, 3_000_001):
        tiles = fan_in_tiles.Tiles(batch, 100, out_features, 32, group_size)
        chunks = tiles.chunks(2**22)
        end = 0
        for chunk in chunks:
            assert chunk.first_label == end and chunk.labels > 0
            assert chunk.rows * 32 <= max(fan_in_tiles.SCRATCH_ENTRIES, 32 * tiles.block)
            assert chunk.labels * batch * 4 <= max(2**22, tiles.block * group_size * batch * 4)
            end = chunk.end_label
        assert end == out_features
        assert sum(chunk.tile_count for chunk in chunks) == tiles.count


def test_long_sums_are_cut_into_parts(monkeypatch):
    monkeypatch.setattr(fan_in_grad_input, "MIN_PART", 4)
    case = make_case(4, 5, 60, 3)
    total = fan_in_grad_input.InputGradient(fan_in_tiles.Tiles(4, 5, 60, 3, 1), case.weight)
    assert total.parts == 8
    grad = torch.randn(4, 60)
    arguments = (grad, case.weight, case.indices, 5, 1)
    exact = reference.fan_in_linear_grad_input(grad.double(), case.weight.double(), *arguments[2:])
    actual = fan_in_ops.LINEAR_GRAD_INPUT(*arguments, backend="triton")
    assert_close("grad_input", actual, exact, reference.fan_in_linear_grad_input(*arguments))


@pytest.mark.parametrize("group_size", [1, 16])
@pytest.mark.parametrize("k", [1, 3, 200])
def test_topk_over_several_steps(k, group_size, monkeypatch):
    """Few keys at once: tiles in several steps, and rows."""
    monkeypatch.setattr(fan_in_topk, "MAX_KEYS", 12)
    case = make_case(4, 20, 1000 if group_size == 1 else 200, 3, group_size)
    values, labels = ops.fan_in_topk(*case.layer, k, group_size=group_size, backend="triton")
    wanted, order = ops.fan_in_topk(*case.layer, k, group_size=group_size, backend="reference")
    torch.testing.assert_close(values, wanted)
    assert torch.equal(labels, order)


@pytest.mark.parametrize("group_size", [1, 16])
def test_topk_of_many_rows(group_size):
    """More rows than one tile has."""
    case = make_case(70, 9, 70, 2, group_size)
    values, labels = ops.fan_in_topk(*case.layer, 1, group_size=group_size, backend="triton")
    wanted, order = ops.fan_in_topk(*case.layer, 1, group_size=group_size, backend="reference")
    torch.testing.assert_close(values, wanted)
    assert torch.equal(labels, order)


def test_keys_order_like_torch_sort():
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3.0, -3.0, float("inf"), float("-inf"), float("nan")])
    bias = values.repeat(30)
    x, w = torch.zeros(1, 3), torch.zeros(270, 1)
    indices = torch.zeros(270, 1, dtype=torch.int16)
    actual, labels = ops.fan_in_topk(x, w, indices, bias, 270, backend="triton")
    order = bias.sort(descending=True, stable=True)
    assert torch.equal(labels[0], order.indices)
    torch.testing.assert_close(actual[0], order.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group_size", [1, 16])
def test_unchecked_indices_read_zero(group_size, unchecked):
    """Out of range, "none": as if the weight there were zero; nothing is read or written outside."""
    case = make_case(3, 10, 40, 4, group_size)
    case.labels, case.offsets = torch.tensor([0, 1, 2]), torch.arange(4)
    bad = dataclasses.replace(case, indices=case.indices.clone())
    bad.indices[0, 1], bad.indices[-1, 2] = -1, 10
    zero = dataclasses.replace(case, weight=case.weight.clone())
    zero.weight[:group_size, 1] = 0
    zero.weight[(bad.indices.shape[0] - 1) * group_size :, 2] = 0
    for name in ("linear", "grad_input"):
        actual, wanted = layer_calls(bad)[name]("triton"), layer_calls(zero)[name]("triton")
        torch.testing.assert_close(actual, wanted)
    (grad_weight,) = layer_calls(bad)["grad_weight"]("triton")
    assert (grad_weight[:group_size, 1] == 0).all() and (grad_weight[-1:, 2] == 0).all()
    candidates = torch.tensor([[0, 39], [-1, 5], [40, 7]])
    score = ops.fan_in_score(*bad.layer, candidates, group_size=group_size, backend="triton")
    wanted = ops.fan_in_score(*zero.layer, candidates.clamp(0, 39), group_size=group_size, backend="triton")
    inside = (candidates >= 0) & (candidates < 40)
    torch.testing.assert_close(score[inside], wanted[inside])
    assert (score[~inside] == 0).all()
    wild = torch.tensor([0, -5, 40])  # labels that no tile holds
    loss = ops.fan_in_loss(*case.layer, case.offsets, wild, group_size=group_size, backend="triton")
    one = ops.fan_in_loss(
        *case.layer, torch.tensor([0, 1, 1, 1]), wild[:1], group_size=group_size, backend="triton"
    )
    torch.testing.assert_close(loss, one)


def test_offsets_past_two_to_the_31(unchecked):
    """O * F = 2.7e9: scores of labels at both ends. Only the pages touched take memory."""
    out_features, fan_in = 2**26, 40
    try:
        weight = torch.from_numpy(np.zeros((out_features, fan_in), dtype=np.float16))
        indices = torch.from_numpy(np.zeros((out_features, fan_in), dtype=np.int16))
    except MemoryError:
        pytest.skip("11 GB of address space are not to be had")
    x = torch.arange(8, dtype=torch.float16).view(1, 8)
    labels = torch.tensor([[0, 1, out_features - 2, out_features - 1]])
    for i, label in enumerate(labels[0].tolist()):
        weight[label, :] = i + 1
        indices[label, :] = i
    output = ops.fan_in_score(x, weight, indices, None, labels, backend="triton")
    assert output.tolist() == [[0.0, 2 * 40.0, 2 * 3 * 40.0, 3 * 4 * 40.0]]
    arguments = (torch.ones(1, 4).half(), weight, indices, labels, 8, 1)
    grad = fan_in_ops.SCORE_GRAD_INPUT(*arguments, backend="triton")
    assert grad[0, :5].tolist() == [40.0, 80.0, 120.0, 160.0, 0.0]


def test_rewire_where_all_keys_are_equal(monkeypatch):
    """Score and random tie alike: the lowest positions go, as in a stable sort."""
    case = make_case(1, 50, 100, 12, duplicates=False)
    case.weight[:] = 1.0
    monkeypatch.setattr(fan_in_rewire, "_keys", _keys_without_position)
    dropped = fan_in_rewire._dropped(case.weight, 100, 1, reference.FRACTION, reference.LAYER, 0.3, (3, 4))
    assert dropped.flatten().tolist() == [1] * 360 + [0] * 840


def _keys_without_position(weight_ptr, position, live, key, O, F, G, ONE):
    return (
        fan_in_rewire._score_bits(weight_ptr, position, live, O, F, G, ONE).to(fan_in_rewire.tl.int64) << 32
    )


def test_compile_with_the_triton_backend():
    case = make_case(4, 12, 20, 3, 2)
    leaves = [t.requires_grad_() for t in (case.input, case.weight, case.bias)]

    def run(x, w, b):
        options = dict(group_size=2, backend="triton")
        loss = ops.fan_in_loss(x, w, case.indices, b, *case.positives, **options)
        return loss + ops.fan_in_linear(x, w, case.indices, b, **options).square().mean()

    torch._dynamo.reset()
    actual, wanted = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(wanted, leaves))


def test_every_op_has_a_launcher():
    names = {name for name in vars(reference) if name.startswith("fan_in_")}
    assert len(names) == 12 and names <= set(triton_backend.LAUNCHERS)


def test_compile_cases_record_every_kernel_and_configuration():
    seen, blocks = set(), set()
    for file in FILES:
        for _, call in file.compile_cases():
            with _launch.recording() as launches:
                call()
            seen |= {kernel.__name__ for kernel, _, _ in launches}
            blocks |= {(o.get("BLOCK_O"), o.get("BLOCK_B")) for k, _, o in launches if "linear" in k.__name__}
    kernels = {name for file in (*FILES, fan_in_grad_input, fan_in.end_gradients) for name in _kernels(file)}
    assert seen == kernels
    assert blocks == {(c["BLOCK_O"], c["BLOCK_B"]) for c in fan_in_tiles.CONFIGS.plain.values()}


def _kernels(file):
    names = vars(file) if not callable(file) else file.__globals__
    return [name for name in names if name.endswith("_kernel")]
