"""GPU kernels, Triton's in its interpreter and CUDA's on the CPU, at sizes that hypothesis draws.

Output and every gradient, by the twice rule. The native kernels have such tests in each family's file.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsparse_kernels import ops
from recsparse_kernels.ops.masked_embedding_table import LAYOUTS
from recsparse_kernels.testing import assert_close, backends, fan_in, low_rank, masked_embedding, sparse24

SLOW = ("triton", "cuda")
ACTIVATIONS = [None, "relu", "gelu", "silu", "sigmoid", "tanh"]
SEEDS = st.integers(0, 99)

several = settings(
    max_examples=10,  # an example takes tenths of a second
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def on_gpu_backends(op):
    return pytest.mark.parametrize("backend", [b for b in backends(op) if b in SLOW], indirect=True)


def check(function, tensors, backend):
    """``function(*tensors, backend=)``: its result and the gradients of its sum of squares."""

    def results(dtype, backend, tensors=tensors):
        leaves = [t.to(dtype).clone().requires_grad_() for t in tensors]
        output = function(*leaves, backend=backend)
        grads = torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True)
        return [output, *grads]

    exact, baseline = (results(dtype, "reference") for dtype in (torch.float64, torch.float32))
    actual = results(torch.float32, backend)
    terms = results(torch.float64, "reference", [t.abs() for t in tensors])
    for i, (*three, size) in enumerate(zip(actual, exact, baseline, terms, strict=True)):
        # a small tensor's rounding in the reference may be nothing by chance: more than twice is allowed
        assert_close(f"result {i}", *three, factor=8.0, terms=size)


@on_gpu_backends("low_rank_linear")
@several
@given(
    B=st.integers(0, 40), I=st.integers(1, 70), R=st.integers(1, 40), O=st.integers(1, 70),
    mid_activation=st.sampled_from(ACTIVATIONS), activation=st.sampled_from(ACTIVATIONS), seed=SEEDS,
)  # fmt: skip
def test_low_rank_linear(B, I, R, O, mid_activation, activation, seed, backend):
    *tensors, _ = low_rank.make_linear(B, I, R, O, seed=seed)

    def function(*leaves, backend):
        return ops.low_rank_linear(
            *leaves, mid_activation=mid_activation, activation=activation, backend=backend
        )

    check(function, tensors, backend)


@on_gpu_backends("low_rank_cross")
@several
@given(B=st.integers(0, 40), I=st.integers(1, 70), R=st.integers(1, 40), seed=SEEDS)
def test_low_rank_cross(B, I, R, seed, backend):
    *tensors, _ = low_rank.make_cross(B, I, R, seed=seed)
    check(ops.low_rank_cross, tensors, backend)


@st.composite
def bags(draw, rows):
    """indices, offsets with the last one, padding_idx or None."""
    lengths = draw(st.lists(st.integers(0, 6), max_size=8))
    index_dtype, offset_dtype = (draw(st.sampled_from([torch.int32, torch.int64])) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    indices = torch.randint(rows, (sum(lengths),), generator=generator, dtype=index_dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(offset_dtype)
    return indices, offsets, draw(st.sampled_from([None, 0, rows - 1]))


MODES = st.sampled_from(["sum", "mean", "max"])


@on_gpu_backends("low_rank_embedding_bag")
@several
@given(data=st.data(), V=st.integers(1, 40), R=st.integers(1, 20), D=st.integers(1, 40), mode=MODES)
def test_low_rank_embedding_bag(data, V, R, D, mode, backend):
    indices, offsets, padding = data.draw(bags(V))

    def function(table, up, mean, *, backend):
        return ops.low_rank_embedding_bag(
            indices, table, up, mean, offsets,
            mode=mode, include_last_offset=True, padding_idx=padding, backend=backend,
        )  # fmt: skip

    check(function, low_rank.make_table(V, R, D, seed=data.draw(SEEDS)), backend)


@on_gpu_backends("masked_embedding_bag")
@several
@given(
    data=st.data(), V=st.integers(1, 40), D=st.integers(1, 80), mode=MODES, layout=st.sampled_from(LAYOUTS)
)
def test_masked_embedding_bag(data, V, D, mode, layout, backend):
    table, _ = masked_embedding.make_table(V, D, layout=layout, seed=data.draw(SEEDS))
    indices, offsets, padding = data.draw(bags(V))

    def function(values, *, backend):
        return ops.masked_embedding_bag(
            indices, table._replace(values=values), offsets,
            mode=mode, include_last_offset=True, padding_idx=padding, backend=backend,
        )  # fmt: skip

    check(function, [table.values], backend)


@on_gpu_backends("fan_in_loss")
@several
@given(
    batch=st.integers(1, 24), in_features=st.integers(1, 40), out_features=st.integers(1, 70),
    fan_in_=st.integers(0, 12), group_size=st.integers(1, 20), index=st.sampled_from([torch.int16, torch.int32]),
    kind=st.sampled_from(["bce", "squared_hinge"]), seed=SEEDS,
)  # fmt: skip
def test_fan_in(batch, in_features, out_features, fan_in_, group_size, index, kind, seed, backend):
    case = fan_in.make_case(
        batch, in_features, out_features, fan_in_, group_size, index_dtype=index, seed=seed
    )
    options = dict(group_size=group_size)

    def layer(input, weight, bias, *, backend):
        return ops.fan_in_linear(input, weight, case.indices, bias, backend=backend, **options)

    def loss(input, weight, bias, *, backend):
        return ops.fan_in_loss(
            input, weight, case.indices, bias, *case.positives, kind=kind, backend=backend, **options
        )

    leaves = [case.input, case.weight, case.bias]
    check(layer, leaves, backend)
    check(loss, leaves, backend)
    k = min(5, out_features)
    best, labels = ops.fan_in_topk(*case.layer, k, backend=backend, **options)
    logits = layer(*(t.double() for t in leaves), backend="reference")
    torch.testing.assert_close(best.double(), logits.topk(k).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits.gather(1, labels.long()), best.double(), rtol=1e-4, atol=1e-4)


@on_gpu_backends("sparse24_linear")
@several
@given(
    B=st.integers(0, 40), I=st.integers(1, 70), O=st.integers(1, 70), activation=st.sampled_from(ACTIVATIONS),
    transposable=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_sparse24(B, I, O, activation, transposable, seed, backend):
    input, _, _, bias, _ = sparse24.make_case(B, I, O, seed=seed)
    weight = sparse24.make_weight(O, I, seed=seed)
    mask = ops.sparse24_mask(weight, transposable=transposable, backend=backend)
    assert torch.equal(mask, ops.sparse24_mask(weight, transposable=transposable, backend="reference"))
    values, metadata = ops.sparse24_compress(weight, mask, backend=backend)
    assert torch.equal(ops.sparse24_decompress(values, metadata, I, backend=backend), weight * mask)

    def function(input, values, bias, *, backend):
        return ops.sparse24_linear(input, values, metadata, bias, activation=activation, backend=backend)

    check(function, [input, values, bias], backend)
