"""Low-rank embeddings, bags and fields against torch on the dense product, on every backend and level."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from recsparse_kernels.ops import low_rank_embedding, low_rank_embedding_bag, low_rank_fields
from recsparse_kernels.ops._backend import OPS
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.low_rank import FIELD_SHAPES, TABLE_SHAPES, make_bags, make_fields, make_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_backends = pytest.mark.parametrize("backend", backends("low_rank_embedding_bag"), indirect=True)
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def dense(grad):
    return grad.to_dense() if grad.is_sparse else grad


def run(function, tensors, dtype):
    """Outputs of function(*leaves) with a fixed gradient, and the gradient of every tensor given."""
    leaves = [None if t is None else t.to(dtype).clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o is not None]
    g = torch.Generator().manual_seed(5)
    grads = [torch.randn(o.shape, generator=g).bfloat16().to(dtype) for o in outputs]
    torch.autograd.backward(outputs, grads)
    return [*outputs, *(dense(leaf.grad) for leaf in leaves if leaf is not None)]


def check(function, tensors, dtype, backend):
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    actual = run(lambda *t: function(*t, backend=backend), tensors, dtype)
    exact = run(lambda *t: function(*t, backend="reference"), tensors, torch.float64)
    baseline = run(lambda *t: function(*t, backend="reference"), tensors, dtype)
    for i, three in enumerate(zip(actual, exact, baseline, strict=True)):
        assert_close(f"result {i}", *three)


def bag(indices, offsets, weighted=False, **options):
    """(table, up, mean, [weights]) -> output."""

    def call(table, up, mean, weights=None, backend=None):
        extra = {"per_sample_weights": weights} if weighted else {}
        return low_rank_embedding_bag(indices, table, up, mean, offsets, backend=backend, **extra, **options)

    return call


# ---- the definition against torch -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, -2])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("with_mean", [False, True])
def test_bag_definition(mode, padding_idx, last, with_mean):
    table, up, mean = make_table(11, 3, 5, dtype=torch.float64)
    indices, offsets = make_bags(11, last=last)
    weights = torch.rand(60, dtype=torch.float64) if mode == "sum" else None
    options = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": last}

    def expected(table, up, mean, weights):
        weight = table @ up.t() if mean is None else table @ up.t() + mean
        return F.embedding_bag(indices, weight, offsets, per_sample_weights=weights, **options)

    def actual(table, up, mean, weights):
        return low_rank_embedding_bag(
            indices, table, up, mean, offsets, per_sample_weights=weights, backend="reference", **options
        )

    tensors = (table, up, mean if with_mean else None, weights)
    for a, e in zip(run(actual, tensors, torch.float64), run(expected, tensors, torch.float64), strict=True):
        torch.testing.assert_close(a, e)


def test_weighted_mean_divides_by_the_number_of_lookups():
    table, up, mean = make_table(11, 3, 5, dtype=torch.float64)
    indices, offsets = make_bags(11)
    weights = torch.rand(60, dtype=torch.float64)
    summed = low_rank_embedding_bag(indices, table, up, mean, offsets, mode="sum", per_sample_weights=weights)
    counts = torch.cat([offsets, torch.tensor([60])]).diff().clamp_min(1)
    actual = low_rank_embedding_bag(
        indices, table, up, mean, offsets, mode="mean", per_sample_weights=weights
    )
    torch.testing.assert_close(actual, summed / counts[:, None])


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("with_mean", [False, True])
def test_embedding_definition(padding_idx, by_frequency, with_mean):
    table, up, mean = make_table(11, 3, 5, dtype=torch.float64)
    indices = torch.randint(0, 11, (4, 9))
    indices[0, :2] = 3
    times = torch.ones(11, 1, dtype=torch.float64)
    if padding_idx is not None:
        times[padding_idx] = 0

    def expected(table, up, mean):
        weight = table @ up.t() if mean is None else table @ up.t() + times * mean
        return F.embedding(indices, weight, padding_idx, scale_grad_by_freq=by_frequency)

    def actual(table, up, mean):
        options = {"padding_idx": padding_idx, "scale_grad_by_freq": by_frequency}
        return low_rank_embedding(indices, table, up, mean, backend="reference", **options)

    tensors = (table, up, mean if with_mean else None)
    for a, e in zip(run(actual, tensors, torch.float64), run(expected, tensors, torch.float64), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq(mode):
    """Every row's gradient over its number of lookups. (torch 2.13's bag divides by other rows' numbers.)"""
    table, up, mean = make_table(7, 3, 5, dtype=torch.float64)
    indices, offsets = make_bags(7)
    frequency = torch.bincount(indices, minlength=7).double()
    ends = torch.cat([offsets, torch.tensor([60])])
    bags = torch.repeat_interleave(torch.arange(8), ends.diff())
    size = ends.diff()[bags] if mode == "mean" else torch.ones(60)

    def expected(table, up, mean):
        rows = F.embedding(indices, table @ up.t() + mean, scale_grad_by_freq=True)
        return torch.zeros(8, 5, dtype=torch.float64).index_add(0, bags, rows / size[:, None])

    actual = bag(indices, offsets, mode=mode, scale_grad_by_freq=True)
    assert bool((frequency > 1).any())
    pairs = zip(
        run(actual, (table, up, mean), torch.float64),
        run(expected, (table, up, mean), torch.float64),
        strict=True,
    )
    for a, e in pairs:
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("with_bias", [False, True])
def test_fields_definition(with_bias):
    indices, table, starts, projections, bias, _ = make_fields(13, 4, 3, 5, dtype=torch.float64)
    bias = bias if with_bias else None

    def expected(table, projections, bias):
        z = torch.stack([table[starts[k] + indices[:, k]] for k in range(4)], 1)
        x = torch.einsum("ijk,jkl->ijl", z, projections)
        x = x if bias is None else x + bias
        pairs = [(x[:, i] * x[:, j]).sum(1) for i in range(4) for j in range(i)]
        return z, x, torch.stack(pairs, 1).sum(1, keepdim=True)

    def actual(table, projections, bias):
        return low_rank_fields(
            indices, table, starts, projections, bias, interaction=True, backend="reference"
        )

    tensors = (table, projections, bias)
    for a, e in zip(run(actual, tensors, torch.float64), run(expected, tensors, torch.float64), strict=True):
        torch.testing.assert_close(a, e)


# ---- backends against the definition --------------------------------------------------------------


@on_backends
@on_dtypes
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("shape", TABLE_SHAPES, ids=str)
def test_bag(shape, mode, dtype, backend):
    indices, offsets = make_bags(shape[0], index_dtype=torch.int32)
    check(bag(indices, offsets, mode=mode), make_table(*shape), dtype, backend)


@on_backends
@on_dtypes
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_weighted_bag(mode, dtype, backend):
    indices, offsets = make_bags(97, offset_dtype=torch.int32)
    tensors = (*make_table(97, 24, 50), torch.rand(60))
    call = bag(indices, offsets, weighted=True, mode=mode, padding_idx=int(indices[5]), sparse=True)
    check(call, tensors, dtype, backend)


@on_backends
@pytest.mark.parametrize(
    "index_dtype, offset_dtype", list(itertools.product((torch.int32, torch.int64), repeat=2))
)
def test_bag_options(index_dtype, offset_dtype, backend):
    """Every combination of the options, in mixed index types."""
    table, up, mean = make_table(29, 5, 21)
    on_off = (False, True)
    every = list(itertools.product(("sum", "mean", "max"), *[on_off] * 5))
    if backend in ("triton", "cuda"):  # slow on the CPU: a quarter for each pair of index types
        every = every[2 * (index_dtype == torch.int64) + (offset_dtype == torch.int64) :: 4]
    for mode, last, padded, sparse, by_frequency, with_mean in every:
        if mode == "max" and (sparse or by_frequency):
            continue
        indices, offsets = make_bags(29, index_dtype=index_dtype, offset_dtype=offset_dtype, last=last)
        options = {
            "mode": mode,
            "include_last_offset": last,
            "padding_idx": int(indices[7]) if padded else None,
        }
        call = bag(indices, offsets, sparse=sparse, scale_grad_by_freq=by_frequency, **options)
        check(call, (table, up, mean if with_mean else None), torch.float32, backend)


@on_backends
@on_dtypes
@pytest.mark.parametrize("shape", TABLE_SHAPES, ids=str)
def test_embedding(shape, dtype, backend):
    indices = torch.randint(0, shape[0], (3, 20), dtype=torch.int32)
    indices[0, :3] = 1
    tensors = make_table(*shape)

    def call(*t, backend):
        return low_rank_embedding(indices, *t, padding_idx=1, backend=backend)

    check(call, tensors, dtype, backend)
    check(call, (*tensors[:2], None), dtype, backend)


@on_backends
@on_dtypes
@pytest.mark.parametrize("shape", FIELD_SHAPES, ids=str)
def test_fields(shape, dtype, backend):
    indices, table, starts, projections, bias, _ = make_fields(*shape, index_dtype=torch.int32)

    def call(table, projections, bias, backend):
        return low_rank_fields(indices, table, starts, projections, bias, interaction=True, backend=backend)

    check(call, (table, projections, bias), dtype, backend)


@on_backends
def test_fields_options(backend):
    indices, table, starts, projections, bias, _ = make_fields(40, 5, 3, 18)
    for output, interaction, sparse, with_bias in itertools.product((False, True), repeat=4):
        options = {"output": output, "interaction": interaction, "sparse": sparse}

        def call(table, projections, bias, backend, options=options):
            result = low_rank_fields(indices, table, starts, projections, bias, backend=backend, **options)
            assert (result.x is None) == (not options["output"])
            assert (result.interaction is None) == (not options["interaction"])
            return result

        check(call, (table, projections, bias if with_bias else None), torch.float32, backend)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.skipif("triton" not in backends("low_rank_fields"), reason="triton is not installed")
def test_fields_out_of_range_where_nothing_is_raised(sparse, check_indices):
    """Clamped to the field's own rows, or read as zeros; the gradient goes where the lookup went."""
    indices, table, starts, projections, bias, _ = make_fields(6, 3, 2, 5)
    sizes = starts.diff()
    nearest, inside = indices.clone(), torch.ones_like(indices, dtype=torch.bool)
    for b, k, bad, good in (
        (0, 1, int(sizes[1]), int(sizes[1]) - 1),
        (2, 0, -1, 0),
        (4, 2, 2**31 - 1, int(sizes[2]) - 1),
    ):
        indices[b, k], nearest[b, k], inside[b, k] = bad, good, False
    options = {"interaction": True, "sparse": sparse, "backend": "triton"}

    def call(indices):
        tensors = [t.clone().requires_grad_() for t in (table, projections, bias)]
        result = low_rank_fields(indices, tensors[0], starts, *tensors[1:], **options)
        (result.x.sum() + result.interaction.sum() + (result.z * inside[:, :, None]).sum()).backward()
        return result, [t.grad.to_dense() for t in tensors]

    wanted, wanted_grads = call(nearest)
    check_indices("clamp")
    result, grads = call(indices)
    for a, e in zip([*result, *grads], [*wanted, *wanted_grads], strict=True):
        assert torch.equal(a, e)
    check_indices("none")
    result, grads = call(indices)
    assert torch.equal(result.z, torch.where(inside[:, :, None], wanted.z, 0.0))
    read = torch.isin(torch.arange(len(table)), (nearest + starts[:-1])[inside])
    assert grads[0][read].any() and not grads[0][~read].any()


@on_backends
def test_fields_gradient_from_one_output(backend):
    indices, table, starts, projections, bias, _ = make_fields(40, 5, 3, 18)
    for which in range(3):

        def call(table, projections, bias, backend, which=which):
            result = low_rank_fields(
                indices, table, starts, projections, bias, interaction=True, backend=backend
            )
            return result[which] + 0 * projections.sum() + 0 * bias.sum()

        check(call, (table, projections, bias), torch.float32, backend)


@on_backends
def test_two_dimensional_input(backend):
    table, up, mean = make_table(50, 4, 9)
    indices = torch.randint(0, 50, (6, 5))
    for mode in ("sum", "mean", "max"):
        flat = low_rank_embedding_bag(
            indices.reshape(-1), table, up, mean, torch.arange(0, 30, 5), mode=mode, backend=backend
        )
        assert torch.equal(low_rank_embedding_bag(indices, table, up, mean, mode=mode, backend=backend), flat)
        strided = indices.t().contiguous().t()
        assert torch.equal(low_rank_embedding_bag(strided, table, up, mean, mode=mode, backend=backend), flat)
        none = low_rank_embedding_bag(indices[:, :0], table, up, mean, mode=mode, backend=backend)
        assert torch.equal(none, torch.zeros(6, 9))
        nobody = low_rank_embedding_bag(indices[:0], table, up, mean, mode=mode, backend=backend)
        assert nobody.shape == (0, 9)


@on_backends
def test_empty(backend):
    table, up, mean = (t.requires_grad_() for t in make_table(50, 4, 9))
    none = torch.empty(0, dtype=torch.int64)
    for mode in ("sum", "mean", "max"):
        for offsets, bags in ((none, 0), (torch.zeros(3, dtype=torch.int64), 3)):
            output = low_rank_embedding_bag(none, table, up, mean, offsets, mode=mode, backend=backend)
            assert torch.equal(output, torch.zeros(bags, 9))
            output.sum().backward()
            assert not any(t.grad.any() for t in (table, up, mean))
    assert low_rank_embedding(torch.empty(2, 0, dtype=torch.int64), table, up, backend=backend).shape == (
        2,
        0,
        9,
    )


@on_backends
def test_nan_and_infinity_stay_in_their_bag(backend):
    table, up, _ = make_table(50, 4, 9)
    table[7], table[8] = torch.nan, torch.inf
    indices, offsets = torch.tensor([1, 7, 2, 3, 8, 9]), torch.tensor([0, 2, 4])
    output = low_rank_embedding_bag(indices, table, up.abs(), None, offsets, mode="sum", backend=backend)
    assert output[0].isnan().all() and output[1].isfinite().all() and output[2].isinf().all()
    padded = low_rank_embedding_bag(
        indices, table, up, None, offsets, mode="sum", padding_idx=7, backend=backend
    )
    assert padded[0].isfinite().all()


@on_backends
@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_of_a_popular_row(sparse, backend):
    """One row is most of the lookups: its sum is the work of many, in an order of its own."""
    indices = torch.full((700,), 5, dtype=torch.int64)
    indices[::9] = torch.randint(0, 20, (78,), generator=torch.Generator().manual_seed(1))
    call = bag(indices, torch.arange(0, 700, 50), mode="mean", sparse=sparse)
    check(call, make_table(20, 5, 7), torch.float32, backend)


@on_backends
def test_sparse_gradient_has_each_row_once(backend):
    table, up, mean = make_table(1000, 4, 9)
    indices, offsets = make_bags(1000, 60)
    indices[10:20] = 77
    padding = int(indices[0])
    grads = []
    for sparse in (True, False):
        leaf = table.clone().requires_grad_()
        options = {"mode": "sum", "sparse": sparse, "padding_idx": padding, "backend": backend}
        low_rank_embedding_bag(indices, leaf, up, mean, offsets, **options).square().sum().backward()
        grads.append(leaf.grad)
    sparse, full = grads
    assert sparse.is_sparse and sparse.shape == table.shape
    touched = torch.unique(indices[indices != padding])
    assert torch.equal(sparse._indices()[0], touched)
    assert torch.equal(sparse.to_dense(), full)
    optimizer_step = torch.optim.SparseAdam([leaf := table.clone().requires_grad_()])
    leaf.grad = sparse
    optimizer_step.step()
    assert not torch.equal(leaf[touched], table[touched])


@pytest.mark.parametrize("backend", backends("low_rank_embedding_bag", interpreter=False)[-1:], indirect=True)
def test_same_result_for_any_number_of_threads(backend):
    before = torch.get_num_threads()
    results = []
    table, up, mean = make_table(300, 6, 20)
    indices = torch.randint(0, 300, (2100, 11))
    ids, rows, starts, projections, bias, _ = make_fields(2100, 5, 3, 18)

    def lookup(*t):
        return low_rank_embedding(indices, *t, backend=backend)

    def all_fields(t, p, b):
        return low_rank_fields(ids, t, starts, p, b, interaction=True, backend=backend)

    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            result = []
            for mode, sparse in (("sum", False), ("mean", True), ("max", False)):
                call = bag(indices, None, mode=mode, sparse=sparse)
                result += run(
                    lambda *t, call=call: call(*t, backend=backend), (table, up, mean), torch.float32
                )
            result += run(lookup, (table, up, mean), torch.float32)
            results.append(result + run(all_fields, (rows, projections, bias), torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=0, max_size=12),
    V=st.integers(1, 40),
    R=st.integers(1, 20),
    D=st.integers(1, 40),
    mode=st.sampled_from(["sum", "mean", "max"]),
    wide=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_any_bags(lengths, V, R, D, mode, wide, data):
    types = [torch.int64 if w else torch.int32 for w in wide]
    indices = data.draw(st.lists(st.integers(0, V - 1), min_size=sum(lengths), max_size=sum(lengths)))
    indices = torch.tensor(indices, dtype=types[0])
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=types[1])
    padding = data.draw(st.sampled_from([None, 0, V - 1]))
    table, up, mean = make_table(V, R, D, dtype=torch.float64)
    options = {"mode": mode, "include_last_offset": True, "padding_idx": padding}
    weight = table @ up.t() + mean
    expected = F.embedding_bag(indices.long(), weight, offsets.long(), **options)
    narrow = [t.float() for t in (table, up, mean)]
    actual = low_rank_embedding_bag(indices, *narrow, offsets, **options)
    torch.testing.assert_close(
        actual.double(), expected, atol=2e-5, rtol=2e-5
    )  # float32 sums of at most 7 x 20


# ---- torch.library, compile, errors ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "triton", "reference"])
def test_opcheck(name):
    if name not in OPS["low_rank_embedding_bag"].backends():
        pytest.skip("the native library is not built, or there is no Triton")

    def opcheck(op, *args):
        torch.library.opcheck(OPS[op].overload(name), args)

    table, up, mean = make_table(29, 5, 21)
    leaves = [t.clone().requires_grad_() for t in (table, up, mean)]
    indices, offsets = make_bags(29)
    weights = torch.rand(60)
    opcheck("low_rank_embedding_bag", *leaves, indices, offsets, weights, 1, 4, False, False, False, True)
    opcheck("low_rank_embedding_bag", *leaves, indices, None, None, 0, -1, False, False, False, True)
    opcheck("low_rank_embedding_bag_max", *leaves, indices, offsets, 4, False)
    grad, pooled = torch.randn(8, 21), torch.randn(8, 5)
    lookups = (indices, offsets, weights)
    opcheck("low_rank_embedding_bag_grad", grad, table, up, mean, *lookups, pooled, 1, 4, False, True)
    positions = torch.randint(-1, 60, (8, 21))
    opcheck("low_rank_embedding_bag_max_grad", grad, table, up, indices, positions, True)
    opcheck("low_rank_rows_grad", pooled, *lookups, 29, 1, 4, False)
    opcheck("low_rank_rows_grad_sparse", pooled, *lookups, 29, 1, 4, False)
    indices, table, starts, projections, bias, grads = make_fields(13, 4, 3, 5)
    leaves = [t.clone().requires_grad_() for t in (table, projections, bias)]
    opcheck("low_rank_fields", leaves[0], starts, *leaves[1:], indices, True, True, False)
    opcheck("low_rank_fields_grad", *grads, torch.randn(13, 4, 3), projections, bias)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_compile(sparse, backend):
    if backend and backend not in OPS["low_rank_embedding_bag"].backends():
        pytest.skip("there is no Triton")
    options = dict(sparse=sparse, backend=backend)
    table, up, mean = make_table(29, 5, 21)
    indices, offsets = make_bags(29)
    ids, rows, starts, projections, bias, _ = make_fields(13, 4, 3, 5)

    def function(table, up, mean, rows, projections, bias):
        pooled = low_rank_embedding_bag(indices, table, up, mean, offsets, padding_idx=4, **options)
        single = low_rank_embedding(indices, table, up, mean, **options)
        return (
            pooled,
            single,
            *low_rank_fields(ids, rows, starts, projections, bias, interaction=True, **options),
        )

    tensors = (table, up, mean, rows, projections, bias)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, e in zip(
        run(compiled, tensors, torch.float32), run(function, tensors, torch.float32), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_autocast_keeps_the_dtype_of_the_table():
    table, up, mean = make_table(29, 5, 21)
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank_embedding(torch.tensor([1, 2]), table, up, mean).dtype == torch.float32


BAD = [
    ({"input": torch.tensor([1, 29])}, IndexError, r"indices must be in \[0, 29\); got 29"),
    ({"input": torch.tensor([1, -1])}, IndexError, r"got -1"),
    ({"input": torch.tensor([1.0, 2.0])}, TypeError, "input must be one of int32, int64"),
    ({"input": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "offsets must be None with a 2-D input"),
    ({"input": torch.zeros(2, 2, 2, dtype=torch.int64)}, ValueError, r"input must have shape \[N\]"),
    ({"offsets": None}, ValueError, "offsets must be given"),
    ({"offsets": torch.tensor([0, 3])}, ValueError, "offsets must not decrease or pass the end of 2 indices"),
    ({"offsets": torch.tensor([0, 2, 1])}, ValueError, "offsets must not decrease"),
    ({"offsets": torch.tensor([1, 2])}, ValueError, "offsets must begin with 0"),
    ({"offsets": torch.tensor([[0]])}, ValueError, "offsets must have shape"),
    ({"offsets": torch.tensor([0.0])}, TypeError, "offsets must be one of"),
    (
        {"offsets": torch.tensor([], dtype=torch.int64), "include_last_offset": True},
        ValueError,
        "at least one",
    ),
    ({"mode": "min"}, ValueError, r"mode must be one of \('sum', 'mean', 'max'\); got 'min'"),
    ({"mode": "max", "sparse": True}, ValueError, "sparse needs mode"),
    ({"mode": "max", "scale_grad_by_freq": True}, ValueError, "scale_grad_by_freq needs mode"),
    ({"mode": "max", "per_sample_weights": torch.ones(2)}, ValueError, "per_sample_weights needs mode"),
    ({"per_sample_weights": torch.ones(3)}, ValueError, "per_sample_weights must have shape"),
    ({"per_sample_weights": torch.ones(2).long()}, TypeError, "per_sample_weights must be floating"),
    ({"padding_idx": 29}, ValueError, r"padding_idx must be in \[-29, 29\); got 29"),
    ({"up": torch.ones(21, 4)}, ValueError, r"up must have shape \[D, R\]"),
    ({"up": torch.ones(21, 5).half()}, TypeError, "up must have the dtype of table"),
    ({"mean": torch.ones(20)}, ValueError, "mean must have shape"),
]


@pytest.mark.parametrize("backend", backends("low_rank_embedding_bag")[::3], indirect=True)
@pytest.mark.parametrize("change, error, message", BAD, ids=[b[2][:24] for b in BAD])
def test_bad_bag(change, error, message, backend):
    table, up, mean = make_table(29, 5, 21)
    arguments = {
        "input": torch.tensor([1, 2]),
        "table": table,
        "up": up,
        "mean": mean,
        "offsets": torch.tensor([0]),
    }
    with pytest.raises(error, match=message):
        low_rank_embedding_bag(**{**arguments, **change}, backend=backend)


@pytest.mark.parametrize("backend", backends("low_rank_fields")[::3], indirect=True)
def test_bad_fields(backend):
    indices, table, starts, projections, bias, _ = make_fields(13, 4, 3, 5)
    good = {"input": indices, "table": table, "starts": starts, "projections": projections, "bias": bias}
    outside = indices.clone()
    outside[2, 1] = int(starts[2] - starts[1])
    for change, error, message in (
        ({"input": outside}, IndexError, "indices of field 1 must be in"),
        ({"input": indices[:, :3]}, ValueError, r"input must have shape \[B, F\]"),
        ({"starts": starts[:-1]}, ValueError, r"starts must have shape \[F \+ 1\]"),
        ({"starts": starts.int()}, TypeError, "starts must be one of int64"),
        ({"projections": projections[:, :2]}, ValueError, "projections must have shape"),
        ({"bias": bias[:, :2]}, ValueError, "bias must have shape"),
        ({"table": table.double()}, TypeError, "projections must have the dtype of table"),
    ):
        with pytest.raises(error, match=message):
            low_rank_fields(**{**good, **change}, backend=backend)
