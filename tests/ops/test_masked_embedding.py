"""Masked embedding tables: every backend and instruction level against the definition in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import recsparse_kernels as rk
from recsparse_kernels.ops import masked_embedding_table as tables
from recsparse_kernels.ops._backend import OPS
from recsparse_kernels.ops.masked_embedding import (
    FusedOptimizer,
    masked_embedding,
    masked_embedding_bag,
    masked_embedding_matmul_t,
    masked_embedding_pack,
    masked_embedding_propagate,
    masked_embedding_repack,
    masked_embedding_unpack,
)
from recsparse_kernels.ops.masked_embedding_records import (
    check_records,
    masked_embedding_bag_frozen,
    masked_embedding_freeze,
    masked_embedding_frozen,
    masked_embedding_thaw,
)
from recsparse_kernels.reference.masked_embedding import record_begins
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.masked_embedding import SHAPES, make_bags, make_mask, make_table

LAYOUTS = tables.LAYOUTS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_backends = functools.partial(pytest.mark.parametrize, "backend", indirect=True)
bag_backends = on_backends(backends("masked_embedding_bag"))
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def shapes_for(layout):
    return [shape for shape in SHAPES if layout != "row_remap" or shape[1] <= 256]


def wider(table, dtype=torch.float64):
    return table._replace(values=table.values.detach().to(dtype))


def with_grad(table):
    return table._replace(values=table.values.detach().clone().requires_grad_())


# ---- pack and unpack ----


@layouts
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@on_backends(backends("masked_embedding_unpack"))
def test_unpack_is_the_inverse_of_pack(layout, dtype, backend):
    for shape in SHAPES:
        table, dense = make_table(*shape, layout=layout, dtype=dtype)
        if dtype == torch.float64 and backend != "reference":
            continue
        assert torch.equal(masked_embedding_unpack(table, backend=backend), dense)
        assert torch.equal(tables.unpack_bits(tables.mask_bits(table), shape[1]) & (dense != 0), dense != 0)
        tables.check_table(table)


@given(
    num_embeddings=st.integers(0, 200),
    embedding_dim=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_pack_keeps_exactly_the_mask(num_embeddings, embedding_dim, density, layout, seed):
    torch.manual_seed(seed)
    weight = torch.randn(num_embeddings, embedding_dim)
    if layout == "fixed_k":
        mask = tables.row_magnitude_mask(torch.rand_like(weight), round(density * embedding_dim))
    else:
        mask = torch.rand_like(weight) < density
    table = masked_embedding_pack(weight, mask, layout=layout)
    assert table.nnz == int(mask.sum())
    tables.check_table(table)
    assert torch.equal(masked_embedding_unpack(table), weight * mask)
    assert torch.equal(tables.unpack_bits(tables.mask_bits(table), embedding_dim), mask)


def test_pack_of_no_mask_keeps_what_is_not_zero():
    weight = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])
    table = masked_embedding_pack(weight)
    assert table.nnz == 2 and table.layout == "bitmask"
    assert masked_embedding_pack(weight * 0 + torch.eye(2) * 0, layout="auto").layout in LAYOUTS


def test_pack_is_differentiable():
    weight = torch.randn(9, 12, requires_grad=True)
    mask = torch.rand(9, 12) < 0.5
    table = masked_embedding_pack(weight, mask)
    weights = torch.arange(table.nnz, dtype=torch.float32)
    (table.values * weights).sum().backward()
    assert torch.equal(weight.grad[mask], weights) and not weight.grad[~mask].any()


def test_bases_reach_past_one_block():
    """More than 65536 rows: starts count from the base of their block."""
    mask = torch.zeros(70000, 3, dtype=torch.bool)
    mask[::2, 1] = True
    weight = torch.randn(70000, 3)
    for layout in ("bitmask", "row_remap"):
        table = masked_embedding_pack(weight, mask, layout=layout)
        tables.check_table(table)
        indices = torch.tensor([0, 65535, 65536, 69998, 69999])
        for backend in OPS["masked_embedding"].backends():
            assert torch.equal(masked_embedding(indices, table, backend=backend), (weight * mask)[indices])


def test_starts_are_unsigned_and_64_bit(cpu_level):
    """A table that claims to begin past 2^31 and 2^33 values: shifted back, it reads the same rows."""
    table, dense = make_table(300, 10, layout="bitmask")
    shift = 2**33 + 2**31
    rows = table.rows.clone()
    starts = rows[:, 2:].contiguous().view(torch.int32).squeeze(1).long()
    rows[:, 2:] = (starts + 2**31).to(torch.int32).unsqueeze(1).view(torch.uint8)
    moved = table._replace(rows=rows, bases=table.bases - 2**31)
    indices = torch.arange(300)
    for backend in OPS["masked_embedding"].backends():
        assert torch.equal(masked_embedding(indices, moved, backend=backend), dense)
    for backend in ("native",):
        with pytest.raises(ValueError, match="contradicts"):
            masked_embedding(indices, table._replace(bases=table.bases + shift), backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_backends(backends("masked_embedding_repack"))
def test_repack(layout, backend):
    for shape in SHAPES:
        table, dense = make_table(*shape, layout=layout)
        mask = make_mask(*shape, 0.5, layout)
        new = masked_embedding_repack(table, mask, backend=backend)
        tables.check_table(new)
        assert new.layout == layout and new.nnz == int(mask.sum())
        assert torch.equal(masked_embedding_unpack(new), dense * mask)


def test_repack_to_another_layout():
    table, dense = make_table(300, 64, layout="bitmask")
    other = masked_embedding_repack(table, tables.mask_bits(table), layout="row_remap")
    assert other.layout == "row_remap" and torch.equal(masked_embedding_unpack(other), dense)


# ---- lookups ----


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(backends("masked_embedding"))
def test_embedding_is_bit_exact(layout, dtype, backend):
    for V, D in SHAPES:
        table, dense = make_table(V, D, layout=layout, dtype=dtype)
        for shape in [(0,), (17,), (3, 4, 2), ()]:
            for index_dtype in (torch.int32, torch.int64):
                indices = torch.randint(V, shape, dtype=index_dtype)
                actual = masked_embedding(indices, table, backend=backend)
                assert actual.dtype == dtype and torch.equal(actual, F.embedding(indices, dense))


def check_bag(table, indices, offsets, backend, **options):
    """Forward and every gradient of one case, by the twice rule."""
    weights = options.pop("per_sample_weights", None)
    if weights is not None and weights.dtype == torch.float64:
        weights = weights.float()  # what the ops compute in, whatever they are given
    results = []
    for values, run_on in (
        (table.values, backend),
        (table.values.double(), "reference"),
        (table.values, "reference"),
    ):
        own = with_grad(table._replace(values=values))
        own_weights = weights.detach().clone().requires_grad_() if weights is not None else None
        if weights is not None and values.dtype == torch.float64:
            own_weights = weights.detach().double().requires_grad_()
        output = masked_embedding_bag(
            indices, own, offsets, per_sample_weights=own_weights, backend=run_on, **options
        )
        torch.manual_seed(1)
        grad = torch.randn(output.shape).to(table.values.dtype).to(output.dtype)
        inputs = [own.values] + ([own_weights] if weights is not None else [])
        results.append([output, *torch.autograd.grad(output, inputs, grad)])
    for name, actual, exact, baseline in zip(
        ("output", "grad_values", "grad_weights"), *results, strict=False
    ):
        assert_close(name, actual, exact, baseline)


@layouts
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@bag_backends
def test_bag_shapes(layout, mode, backend):
    for V, D in SHAPES:
        table, _ = make_table(V, D, layout=layout)
        indices, offsets = make_bags(V, 7, 40)
        check_bag(table, indices, offsets, backend, mode=mode)


@layouts
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@bag_backends
def test_bag_dtypes(layout, mode, dtype, backend):
    table, _ = make_table(130, 50, layout=layout, dtype=dtype)
    indices, offsets = make_bags(130, 12, 90)
    check_bag(table, indices, offsets, backend, mode=mode)
    check_bag(table, indices.view(9, 10), None, backend, mode=mode, padding_idx=int(indices[0]))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3, -2])
@bag_backends
def test_bag_arguments(index_dtype, offset_dtype, last, padding_idx, backend):
    table, _ = make_table(20, 18)
    indices, offsets = make_bags(
        20, 9, 60, index_dtype=index_dtype, offset_dtype=offset_dtype, include_last_offset=last
    )
    for mode in ("sum", "mean", "max"):
        check_bag(
            table, indices, offsets, backend, mode=mode, include_last_offset=last, padding_idx=padding_idx
        )


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("weights_dtype", [*DTYPES, torch.float64], ids=str)
@bag_backends
def test_per_sample_weights(mode, weights_dtype, backend):
    for layout in LAYOUTS:
        table, _ = make_table(70, 67, layout=layout)
        indices, offsets = make_bags(70, 9, 60)
        weights = torch.randn(60).to(weights_dtype)
        check_bag(table, indices, offsets, backend, mode=mode, per_sample_weights=weights, padding_idx=1)
        own = weights.clone().requires_grad_()
        masked_embedding_bag(
            indices, table, offsets, mode=mode, per_sample_weights=own, backend=backend
        ).sum().backward()
        assert own.grad.dtype == weights_dtype


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@bag_backends
def test_bag_equals_aten(mode, backend):
    table, dense = make_table(50, 24)
    dense.requires_grad_()
    own = with_grad(table)
    indices, offsets = make_bags(50, 13, 70)
    indices[:3] = 5  # ties for max
    ours = masked_embedding_bag(indices, own, offsets, mode=mode, padding_idx=2, backend=backend)
    aten = F.embedding_bag(indices, dense, offsets, mode=mode, padding_idx=2)
    torch.testing.assert_close(ours, aten)
    grad = torch.randn_like(aten)
    ours.backward(grad)
    aten.backward(grad)
    kept = tables.unpack_bits(tables.mask_bits(table), 24)
    torch.testing.assert_close(
        masked_embedding_unpack(own._replace(values=own.values.grad)), dense.grad * kept
    )


@bag_backends
def test_single_element_bags_are_bit_exact(backend):
    table, dense = make_table(50, 24)
    indices = torch.randint(50, (30, 1))
    for mode in ("sum", "mean", "max"):
        assert torch.equal(
            masked_embedding_bag(indices, table, mode=mode, backend=backend), dense[indices.squeeze(1)]
        )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@bag_backends
def test_long_bags_and_a_popular_row(mode, backend):
    """Bags of very different lengths; a row looked up so often that its gradient is summed in parts."""
    table, _ = make_table(60, 67)
    indices = torch.randint(60, (300,), generator=torch.Generator().manual_seed(0))
    indices[40:260] = 5
    offsets = torch.tensor([0, 0, 1, 90, 93, 293])
    check_bag(table, indices, offsets, backend, mode=mode, padding_idx=7)


@bag_backends
def test_empty_inputs(backend):
    table, _ = make_table(10, 6)
    none = torch.empty(0, dtype=torch.int64)
    for mode in ("sum", "mean", "max"):
        own = with_grad(table)
        bags = masked_embedding_bag(none, own, torch.zeros(3, dtype=torch.int64), mode=mode, backend=backend)
        assert torch.equal(bags, torch.zeros(3, 6))  # empty bags
        bags.sum().backward()
        assert not own.values.grad.any()
        assert masked_embedding_bag(none, own, none, mode=mode, backend=backend).shape == (0, 6)
        assert masked_embedding_bag(none.view(0, 4), own, mode=mode, backend=backend).shape == (0, 6)
        assert torch.equal(
            masked_embedding_bag(none.view(4, 0), own, mode=mode, backend=backend), torch.zeros(4, 6)
        )
        padding = torch.full((2, 3), 4)
        assert not masked_embedding_bag(padding, own, mode=mode, padding_idx=4, backend=backend).any()
    nothing = masked_embedding_pack(torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bool))
    assert not masked_embedding(torch.arange(4), nothing, backend=backend).any()


@bag_backends
def test_nan_and_inf_pass(backend):
    weight = torch.randn(6, 20)
    weight[1, 3], weight[2, 5], weight[3, 5] = float("nan"), float("inf"), float("-inf")
    table = masked_embedding_pack(weight, torch.ones(6, 20, dtype=torch.bool))
    indices, offsets = torch.tensor([0, 1, 2, 3, 1, 0]), torch.tensor([0, 2, 4])
    for mode in ("sum", "mean", "max"):
        torch.testing.assert_close(
            masked_embedding_bag(indices, table, offsets, mode=mode, backend=backend),
            F.embedding_bag(indices, weight, offsets, mode=mode),
            equal_nan=True,
        )


@layouts
@bag_backends
def test_strided_input_and_gradient(layout, backend):
    table, dense = make_table(40, 33, layout=layout)
    own = with_grad(table)
    indices = torch.randint(40, (6, 5)).t()
    output = masked_embedding_bag(indices, own, mode="sum", backend=backend)
    torch.testing.assert_close(output, F.embedding_bag(indices.contiguous(), dense, mode="sum"))
    output.sum().backward()  # an expanded gradient
    assert own.values.grad.isfinite().all()


def test_scale_grad_by_freq():
    table, dense = make_table(10, 12)
    indices = torch.tensor([1, 1, 2, 5, 5, 5])
    kept = tables.unpack_bits(tables.mask_bits(table), 12)
    for backend in OPS["masked_embedding"].backends():
        own, reference = with_grad(table), dense.clone().requires_grad_()
        masked_embedding(
            indices, own, padding_idx=2, scale_grad_by_freq=True, backend=backend
        ).sum().backward()
        F.embedding(indices, reference, padding_idx=2, scale_grad_by_freq=True).sum().backward()
        actual = masked_embedding_unpack(own._replace(values=own.values.grad))
        torch.testing.assert_close(actual, reference.grad * kept)


@layouts
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@on_backends(backends("masked_embedding_renorm"))
def test_max_norm(layout, norm_type, backend):
    table, dense = make_table(40, 70, layout=layout)
    table = table._replace(values=table.values.clone())
    indices = torch.randint(40, (50,))
    expected = F.embedding(indices, dense, max_norm=1.5, norm_type=norm_type)
    actual = masked_embedding(indices, table, max_norm=1.5, norm_type=norm_type, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(masked_embedding_unpack(table), dense)  # both in place


# ---- gradients ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradcheck(layout, mode):
    table, _ = make_table(5, 6, layout=layout, dtype=torch.float64)
    indices, offsets = make_bags(5, 3, 8)
    weights = torch.randn(8, dtype=torch.float64, requires_grad=True) if mode != "max" else None
    values = table.values.clone().requires_grad_()

    def run(values, weights):
        return masked_embedding_bag(
            indices,
            table._replace(values=values),
            offsets,
            mode=mode,
            per_sample_weights=weights,
            padding_idx=2,
        )

    assert torch.autograd.gradcheck(run, (values, weights))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, v: masked_embedding_matmul_t(x, table._replace(values=v)), (x, values)
    )
    assert torch.autograd.gradcheck(lambda v: masked_embedding_unpack(table._replace(values=v)), (values,))


@layouts
@pytest.mark.parametrize("mode", ["sum", "mean"])
@bag_backends
def test_sparse_gradient_equals_dense(layout, mode, backend):
    table, _ = make_table(300, 64, layout=layout)
    indices, offsets = make_bags(300, 20, 100)
    grads = []
    for sparse in (False, True):
        own = with_grad(table)
        masked_embedding_bag(
            indices, own, offsets, mode=mode, sparse=sparse, padding_idx=4, backend=backend
        ).square().sum().backward()
        grads.append(own.values.grad)
    dense, sparse = grads
    assert sparse.layout == torch.sparse_coo
    positions = sparse._indices()[0]
    assert bool((positions.diff() > 0).all())  # coalesced: optimizers need not sort
    sparse = sparse.coalesce()
    torch.sparse_coo_tensor(sparse.indices(), sparse.values(), sparse.shape, check_invariants=True)
    assert torch.equal(sparse.to_dense(), dense)
    assert sparse._nnz() < dense.shape[0]


@pytest.mark.parametrize("layout", ["bitmask", "fixed_k"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SparseAdam(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["SGD", "SparseAdam", "Adagrad"],
)
def test_sparse_gradient_with_optimizers(layout, make):
    """The optimizers that take sparse gradients do to the values what they do to the dense rows."""
    table, dense = make_table(60, 20, layout=layout)
    own = with_grad(table)
    values, weight = torch.nn.Parameter(own.values.detach()), torch.nn.Parameter(dense.clone())
    ours, theirs = make([values]), make([weight])
    for step in range(3):
        indices = torch.randint(60, (8, 5), generator=torch.Generator().manual_seed(step))
        masked_embedding_bag(
            indices, table._replace(values=values), mode="sum", sparse=True
        ).square().sum().backward()
        F.embedding_bag(indices, weight * 1.0, mode="sum").square().sum()
        grad = torch.autograd.grad(
            F.embedding_bag(indices, weight, mode="sum", sparse=True).square().sum(), weight
        )[0]
        kept = tables.unpack_bits(tables.mask_bits(table), 20)
        grad = grad.coalesce()
        rows = grad.indices()[0]
        weight.grad = torch.sparse_coo_tensor(
            grad.indices(), grad.values() * kept[rows], grad.shape, is_coalesced=True
        )
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    torch.testing.assert_close(
        masked_embedding_unpack(table._replace(values=values.detach())), weight.detach()
    )


@layouts
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@bag_backends
def test_fused_optimizer(layout, kind, mode, backend):
    results = []
    for run_on, dtype in (
        (backend, torch.float32),
        ("reference", torch.float64),
        ("reference", torch.float32),
    ):
        table, _ = make_table(50, 30, layout=layout)
        values = table.values.detach().to(dtype).requires_grad_()
        table = table._replace(values=values)
        fused = FusedOptimizer.create(kind, table, 0.1)
        weights = torch.linspace(0.5, 1.5, 60, requires_grad=True) if mode != "max" else None
        for seed in range(2):
            indices, offsets = make_bags(50, 9, 60, seed=seed)
            output = masked_embedding_bag(
                indices, table, offsets, mode=mode, padding_idx=3, fused=fused, per_sample_weights=weights,
                backend=run_on,
            )  # fmt: skip
            output.backward(torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape))
        assert values.grad is None and fused.step == 2
        results.append([values.detach(), fused.state, fused.second_state])
    for name, actual, exact, baseline in zip(("values", "state", "second_state"), *results, strict=True):
        assert_close(name, actual, exact, baseline, factor=4.0)  # two steps, the second from rounded values


def test_fused_sgd_is_sgd():
    table, _ = make_table(40, 16)
    indices = torch.randint(40, (10, 4))
    own, values = with_grad(table), torch.nn.Parameter(table.values.clone())
    masked_embedding_bag(
        indices, own, mode="sum", fused=FusedOptimizer.create("sgd", own, 0.5)
    ).square().sum().backward()
    optimizer = torch.optim.SGD([values], lr=0.5)
    masked_embedding_bag(indices, table._replace(values=values), mode="sum").square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(own.values.detach(), values.detach())
    before = own.values.detach().clone()
    out = masked_embedding(indices, own, padding_idx=1, fused=FusedOptimizer.create("sgd", own, 0.5))
    out.sum().backward()
    assert not torch.equal(before, own.values.detach())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_same_for_any_number_of_threads(mode, cpu_level):
    table, _ = make_table(2000, 64)
    indices = (torch.rand(30_000) ** 6 * 2000).long()  # a few hot rows
    offsets = torch.arange(0, 30_000, 7)
    weights = torch.rand(30_000) if mode != "max" else None
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        own = with_grad(table)
        output = masked_embedding_bag(indices, own, offsets, mode=mode, per_sample_weights=weights)
        output.backward(torch.sin(torch.arange(output.numel(), dtype=torch.float32)).view(output.shape))
        results.append((output.detach(), own.values.grad))
    torch.set_num_threads(threads)
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(grad, results[0][1])


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_random_bags(data):
    V, D = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 80))
    layout = data.draw(st.sampled_from(LAYOUTS))
    mode = data.draw(st.sampled_from(["sum", "mean", "max"]))
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=8))
    padding = data.draw(st.one_of(st.none(), st.integers(-V, V - 1)))
    table, dense = make_table(V, D, layout=layout, seed=data.draw(st.integers(0, 999)))
    indices = torch.randint(V, (sum(lengths),))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    dense.requires_grad_()
    own = with_grad(table)
    ours = masked_embedding_bag(
        indices, own, offsets, mode=mode, padding_idx=padding, include_last_offset=True
    )
    aten = F.embedding_bag(indices, dense, offsets, mode=mode, padding_idx=padding, include_last_offset=True)
    torch.testing.assert_close(ours, aten)
    ours.sum().backward()
    if aten.requires_grad:
        aten.sum().backward()
    kept = tables.unpack_bits(tables.mask_bits(table), D)
    torch.testing.assert_close(
        masked_embedding_unpack(own._replace(values=own.values.grad)), dense.grad * kept
    )


# ---- records ----


@pytest.mark.parametrize("layout", ["bitmask", "fixed_k"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(backends("masked_embedding_records"))
def test_records(layout, dtype, backend):
    for V, D in SHAPES:
        table, dense = make_table(V, D, layout=layout, dtype=dtype)
        records = masked_embedding_freeze(table)
        thawed = masked_embedding_thaw(records)
        assert thawed.layout == layout and torch.equal(thawed.values, table.values)
        assert torch.equal(thawed.rows, table.rows)
        every = torch.arange(V)
        assert torch.equal(masked_embedding_frozen(every, records, backend=backend), dense)
        indices, offsets = make_bags(V, 7, 40)
        for mode in ("sum", "mean", "max"):
            weights = torch.rand(40) if mode != "max" else None
            torch.testing.assert_close(
                masked_embedding_bag_frozen(
                    indices, records, offsets, mode, weights, padding_idx=0, backend=backend
                ),
                masked_embedding_bag(
                    indices,
                    table,
                    offsets,
                    mode=mode,
                    per_sample_weights=weights,
                    padding_idx=0,
                    backend=backend,
                ),
            )
        check = functools.partial(torch.library.opcheck, raise_exception=True)
        if (V, D) == (70, 10):
            check(
                OPS["masked_embedding_records"].overload(backend),
                (*records[:4], indices, offsets, None, *records[4:], 0, -1, False),
            )


@pytest.mark.parametrize(
    "num_rows, dim, density, dtype, by_lines",
    [
        (65536 + 3, 8, 0.3, torch.float32, True),  # two blocks, several records in a line
        (3000, 64, 0.2, torch.float32, True),
        (3000, 64, 0.15, torch.float32, False),  # nothing fits beside most records: one after the other
        (3000, 300, 0.3, torch.bfloat16, False),  # several lines each
    ],
    ids=str,
)
def test_record_placement(num_rows, dim, density, dtype, by_lines):
    torch.manual_seed(0)
    mask = torch.rand(num_rows, dim) < density
    table = masked_embedding_pack(torch.randn(num_rows, dim).to(dtype), mask)
    records = masked_embedding_freeze(table)
    assert check_records(records) == int(mask.sum())
    line = 64 // dtype.itemsize
    begins, mask_elements = record_begins(*records)
    lengths = mask.sum(1) + mask_elements
    size = int(lengths.sum())
    assert size <= records.records.numel() <= size * (9 / 8 if by_lines else 1) + 2 * line
    lines = (begins + lengths - 1) // line - begins // line + 1
    assert torch.equal(records.starts < 0, lines > 1)
    if by_lines:
        assert torch.equal(lines, (lengths + line - 1) // line)  # as few as can be
    moved = records._replace(starts=records.starts + 1)
    with pytest.raises(ValueError, match="starts do not fit"):
        check_records(moved)


def test_records_errors():
    with pytest.raises(ValueError, match="row_remap"):
        masked_embedding_freeze(make_table(10, 8, layout="row_remap")[0])
    records = masked_embedding_freeze(make_table(10, 8)[0])
    with pytest.raises(IndexError, match="got 10"):
        masked_embedding_frozen(torch.tensor([10]), records)


# ---- the whole table ----


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(backends("masked_embedding_matmul_t"))
def test_matmul_t(layout, dtype, backend):
    for (V, D), batch in zip(SHAPES, (1, 0, 5, 17, 40, 70, 130), strict=True):
        base, _ = make_table(V, D, layout=layout, dtype=dtype)
        x = torch.randn(batch, D).to(dtype)
        grad = torch.randn(batch, V).to(dtype)
        results = []
        for cast, run_on in ((dtype, backend), (torch.float64, "reference"), (torch.float32, "reference")):
            own, input = with_grad(wider(base, cast)), x.to(cast, copy=True).requires_grad_()
            output = masked_embedding_matmul_t(input, own, backend=run_on)
            output.backward(grad.to(cast))
            results.append(
                [t.to(dtype) if cast == torch.float32 else t for t in (output, input.grad, own.values.grad)]
            )
        for name, actual, exact, baseline in zip(
            ("output", "grad_input", "grad_values"), *results, strict=True
        ):
            assert_close(name, actual.detach(), exact.detach(), baseline.detach())


def test_propagate():
    table, dense = make_table(40, 12)
    adjacency = ((torch.rand(25, 40) < 0.2) * torch.rand(25, 40)).to_sparse_csr()
    torch.testing.assert_close(masked_embedding_propagate(adjacency, table), adjacency.to_dense() @ dense)
    with pytest.raises(TypeError, match="CSR"):
        masked_embedding_propagate(adjacency.to_dense(), table)


def test_whole_table_gradient_is_the_same_for_any_number_of_threads():
    table, _ = make_table(20_000, 16)
    x, threads, results = torch.randn(20, 16), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        input = x.clone().requires_grad_()
        masked_embedding_matmul_t(input, table).square().sum().backward()
        results.append(input.grad)
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- torch.library ----


@pytest.mark.parametrize("backend", ["native", "reference", "triton", "cuda"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(backend, layout):
    if backend not in OPS["masked_embedding_bag"].backends():
        pytest.skip(f"the {backend} backend is not here")
    if backend == "triton" and layout != "bitmask":
        pytest.skip("one layout is enough for Triton: its interpreter is slow")
    table, _ = make_table(20, 18, layout=layout)
    indices, offsets = make_bags(20, 5, 30)
    own = with_grad(table)
    check = functools.partial(torch.library.opcheck, raise_exception=True)
    index, sizes = table.index, table.sizes
    check(OPS["masked_embedding"].overload(backend), (own.values, *index, indices, *sizes, -1, False, False))
    weights = torch.rand(30, requires_grad=True)
    for mode, psw in ((0, weights), (1, None), (2, None)):
        check(
            OPS["masked_embedding_bag"].overload(backend),
            (own.values, *index, indices, offsets, psw, *sizes, mode, 2, False, False, False),
        )
    grad = torch.randn(5, 18)
    check(
        OPS["masked_embedding_bag_grad_values"].overload(backend),
        (grad, table.values, *index, indices, offsets, None, None, *sizes, 0, -1, False, False),
    )
    check(
        OPS["masked_embedding_bag_grad_touched"].overload(backend),
        (grad, table.values, *index, indices, offsets, None, *sizes, 0, -1, False, False),
    )
    check(
        OPS["masked_embedding_bag_grad_per_sample_weights"].overload(backend),
        (grad, table.values, *index, indices, offsets, *sizes, 0, -1, False),
    )
    state = torch.zeros(20)
    check(
        OPS["masked_embedding_bag_update"].overload(backend),
        (table.values, state, torch.zeros(0), grad, *index, indices, offsets, None, None, *sizes, 0, -1,
         False, False, 1, 0.1, 0.9, 0.99, 1e-8, 1),
    )  # fmt: skip
    check(OPS["masked_embedding_renorm"].overload(backend), (table.values, *index, indices, *sizes, 1.0, 2.0))
    check(OPS["masked_embedding_unpack"].overload(backend), (own.values, *index, *sizes))
    dense = torch.randn(20, 18, requires_grad=True)
    check(OPS["masked_embedding_unpack_grad_values"].overload(backend), (dense, table.values, *index, *sizes))
    check(
        OPS["masked_embedding_repack"].overload(backend), (table.values, *index, table.values, *index, *sizes)
    )
    x = torch.randn(4, 18, requires_grad=True)
    check(OPS["masked_embedding_matmul_t"].overload(backend), (x, own.values, *index, *sizes))
    scores = torch.randn(4, 20)
    check(
        OPS["masked_embedding_matmul_t_grad_input"].overload(backend), (scores, table.values, *index, *sizes)
    )
    check(
        OPS["masked_embedding_matmul_t_grad_values"].overload(backend),
        (scores, x.detach(), table.values, *index, *sizes),
    )


@pytest.mark.parametrize(
    "compiler, sparse, backend",
    [
        ("inductor", False, None),  # one is enough: it is slow
        ("aot_eager", False, None),
        ("aot_eager", True, None),
        ("aot_eager", False, "triton"),
        ("aot_eager", True, "triton"),
    ],
)
def test_compile(compiler, sparse, backend):
    if backend and backend not in OPS["masked_embedding_bag"].backends():
        pytest.skip("there is no Triton")
    table, _ = make_table(30, 20)
    indices, offsets = make_bags(30, 6, 40)

    def run(values, weights, indices, offsets):
        own = table._replace(values=values)
        pooled = masked_embedding_bag(
            indices, own, offsets,
            mode="sum", per_sample_weights=weights, padding_idx=2, sparse=sparse, backend=backend,
        )  # fmt: skip
        return (
            pooled.square().sum()
            + masked_embedding(indices, own, backend=backend).sum()
            + masked_embedding_matmul_t(pooled, own, backend=backend).sum()
        )

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=compiler)):
        values, weights = table.values.clone().requires_grad_(), torch.ones(40, requires_grad=True)
        loss = function(values, weights, indices, offsets)
        loss.backward()
        grad = values.grad.to_dense() if values.grad.layout == torch.sparse_coo else values.grad
        results.append((loss.detach(), grad, weights.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# ---- bad input ----


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors(backend):
    if backend not in OPS["masked_embedding_bag"].backends():
        pytest.skip("the native library is not built")
    table, dense = make_table(10, 6)
    bag = functools.partial(masked_embedding_bag, backend=backend)
    good, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 2])
    for bad in (10, -1, 2**31 - 1):
        indices = torch.tensor([1, bad, 2])
        with pytest.raises(IndexError, match=rf"\[0, 10\).*got {bad}"):
            bag(indices, table, offsets)
        with pytest.raises(IndexError, match="indices must be in"):
            masked_embedding(indices, table, backend=backend)
    with pytest.raises(ValueError, match="start at 0"):
        bag(good, table, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="descend"):
        bag(good, table, torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="pass the number of indices"):
        bag(good, table, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="at least one element"):
        bag(good, table, torch.empty(0, dtype=torch.int64), include_last_offset=True)
    with pytest.raises(ValueError, match="offsets must be None with a 2-D input"):
        bag(good.view(1, 3), table, offsets)
    with pytest.raises(ValueError, match="offsets must be given"):
        bag(good, table)
    with pytest.raises(TypeError, match="input must be one of int32, int64"):
        bag(good.float(), table, offsets)
    with pytest.raises(ValueError, match="mode must be one of"):
        bag(good, table, offsets, mode="median")
    with pytest.raises(ValueError, match="sparse needs mode"):
        bag(good, table, offsets, mode="max", sparse=True)
    with pytest.raises(ValueError, match="per_sample_weights needs mode"):
        bag(good, table, offsets, mode="max", per_sample_weights=torch.ones(3))
    with pytest.raises(ValueError, match="shape of input"):
        bag(good, table, offsets, per_sample_weights=torch.ones(2))
    with pytest.raises(TypeError, match="floating"):
        bag(good, table, offsets, per_sample_weights=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="padding_idx"):
        bag(good, table, offsets, padding_idx=10)
    with pytest.raises(TypeError, match="MaskedTable"):
        bag(good, dense, offsets)
    with pytest.raises(TypeError, match="dtype of table.values"):
        masked_embedding_matmul_t(torch.ones(2, 6, dtype=torch.float64), table)
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\]"):
        masked_embedding_matmul_t(torch.ones(2, 5), table)


def test_errors_of_pack():
    with pytest.raises(ValueError, match="layout must be one of"):
        masked_embedding_pack(torch.zeros(2, 3), layout="csr")
    with pytest.raises(ValueError, match="equally many"):
        masked_embedding_pack(torch.eye(3)[:, :2], layout="fixed_k")
    with pytest.raises(ValueError, match="at most 256"):
        masked_embedding_pack(torch.zeros(2, 300), layout="row_remap")
    with pytest.raises(ValueError, match="shape of weight"):
        masked_embedding_pack(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be one of bool"):
        masked_embedding_pack(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="kind must be one of"):
        FusedOptimizer.create("lion", make_table(3, 8)[0], 0.1)


def test_a_table_that_contradicts_itself(cpu_level):
    """Cut short or scrambled: an error, and no access outside the arrays."""
    for layout in ("bitmask", "row_remap"):
        table, _ = make_table(70, 40, layout=layout)
        cut = table._replace(values=table.values[:-1].contiguous())
        if table.columns is not None:
            cut = cut._replace(columns=table.columns[:-1].contiguous())
        with pytest.raises(ValueError):
            tables.check_table(cut)
        own = with_grad(cut)
        with pytest.raises(ValueError, match="contradicts itself"):
            masked_embedding(torch.arange(70), own)
        with pytest.raises(ValueError, match="contradicts itself"):
            masked_embedding_bag(torch.arange(70).view(7, 10), own, mode="max")
        scrambled = table._replace(rows=torch.full_like(table.rows, 255))
        with pytest.raises(ValueError, match="contradicts itself"):
            masked_embedding(torch.arange(70), scrambled)


def test_magnitude_mask_is_exact():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.randn(301, 17).to(dtype)
        weight[5] = weight[6]  # ties
        for density in (0.0, 1e-4, 0.1, 0.5, 1.0):
            mask = tables.magnitude_mask(weight, density)
            count = round(density * weight.numel())
            assert int(mask.sum()) == count
            if 0 < count < weight.numel():
                assert weight[mask].abs().min() >= weight[~mask].abs().max()
    ties = torch.ones(3, 4)
    assert torch.equal(
        tables.magnitude_mask(ties, 0.25).flatten().nonzero().flatten(), torch.tensor([0, 1, 2])
    )


def test_random_mask_is_exact_seeded_and_even():
    for V, D, density in ((1000, 64, 0.2), (33, 10, 0.5), (50, 7, 0.013), (10, 10, 0.0), (10, 10, 1.0)):
        generator = torch.Generator().manual_seed(7)
        bits = tables.random_mask_bits(V, D, density, "bitmask", generator)
        assert int(tables.row_counts(bits).sum()) == round(density * V * D)
        again = tables.random_mask_bits(V, D, density, "bitmask", generator.manual_seed(7))
        assert torch.equal(bits, again)
        assert D % 8 == 0 or not (bits[:, -1] >> (D % 8)).any()
    columns = tables.unpack_bits(tables.random_mask_bits(4000, 16, 0.3, "bitmask"), 16).float().mean(0)
    assert (columns - 0.3).abs().max() < 0.04  # 5 standard deviations of a column's mean
    fixed = tables.random_mask_bits(50, 20, 0.25, "fixed_k")
    assert (tables.row_counts(fixed) == 5).all()


def test_float64_runs_on_the_reference():
    table, dense = make_table(10, 6, dtype=torch.float64)
    assert torch.equal(masked_embedding(torch.arange(10), table), dense)
    with pytest.raises(ValueError, match="backend must be one of"):
        masked_embedding(torch.arange(10), table, backend="native")
    assert rk.ops is not None
