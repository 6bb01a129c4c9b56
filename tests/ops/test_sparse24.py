import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recsparse_kernels import ops
from recsparse_kernels.ops._backend import OBSERVERS, OPS
from recsparse_kernels.reference import sparse24 as reference
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.sparse24 import SHAPES, as_torch_packs, make_case, make_weight

BACKENDS = backends("sparse24_linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "gelu", "silu", "sigmoid", "tanh"]
MASK_SHAPES = [(0, 8), (3, 0), (1, 1), (4, 4), (5, 13), (8, 64), (33, 367), (64, 130)]

# the fixture sets the instruction level once for all examples of a test, as wanted
settings.register_profile(
    "sparse24", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
several = settings(settings.get_profile("sparse24"), max_examples=100)

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
without_interpreter = pytest.mark.parametrize(  # large cases, or a hundred small ones
    "backend", backends("sparse24_linear", interpreter=False), indirect=True
)


def doubled(*tensors):
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in tensors)


def run_backward(input, values, metadata, bias, grad, activation, backend):
    input, values, bias = (t.clone().requires_grad_() for t in (input, values, bias))
    output = ops.sparse24_linear(input, values, metadata, bias, activation=activation, backend=backend)
    output.backward(grad)
    return output, input.grad, values.grad, bias.grad


def check_backward(case, activation, backend):
    """Output and every gradient."""
    actual = run_backward(*case, activation, backend)
    exact = run_backward(*doubled(*case), activation, "reference")
    baseline = run_backward(*case, activation, "reference")
    names = ("output", "grad_input", "grad_values", "grad_bias")
    for name, *three in zip(names, actual, exact, baseline, strict=True):
        assert_close(name, *three)


# ---- masks ----


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("transposable", [False, True])
def test_mask_equals_reference(shape, dtype, transposable, backend):
    weight = make_weight(*shape, dtype=dtype)
    mask = ops.sparse24_mask(weight, transposable=transposable, backend=backend)
    assert torch.equal(mask, reference.sparse24_mask(weight.double(), transposable))
    groups = F.pad(mask, (0, -shape[1] % 4)).view(shape[0], (shape[1] + 3) // 4, 4).sum(2)
    assert bool((groups <= 2).all())


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("transposable", [False, True])
def test_prune_is_mask_and_compress(shape, dtype, transposable, backend):
    if backend not in OPS["sparse24_prune"].backends():
        pytest.skip("the native library has no sparse24_prune")
    weight = make_weight(*shape, dtype=dtype).requires_grad_()
    values, metadata = ops.sparse24_prune(weight, transposable=transposable, backend=backend)
    mask = ops.sparse24_mask(weight, transposable=transposable, backend="reference")
    expected = ops.sparse24_compress(weight, mask, backend="reference")
    assert torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
    grads = [torch.autograd.grad(v.sum(), weight)[0] for v in (values, expected[0])]
    assert torch.equal(*grads)


def as_float64(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MASK_SHAPES, (130, 65)], ids=str)
def test_both_packs_equal_reference(shape, dtype, backend):
    """Pruned or of a given mask: the packs of the weight and of its transpose."""
    weight = make_weight(*shape, dtype=dtype)
    mask = reference.sparse24_mask(weight.double(), True)
    exact = reference.sparse24_compress(weight.double(), mask)
    exact += reference.sparse24_compress(weight.double().t(), mask.t())
    fewer = mask & (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7)
    exact_fewer = reference.sparse24_compress(weight.double(), fewer)
    exact_fewer += reference.sparse24_compress(weight.double().t(), fewer.t())
    for actual, expected in (
        (ops.sparse24_prune_both(weight, backend=backend), exact),
        (ops.sparse24_compress_both(weight, mask, backend=backend), exact),
        (ops.sparse24_compress_both(weight, fewer, backend=backend), exact_fewer),
    ):
        assert all(a.dtype in (dtype, torch.uint8) and a.is_contiguous() for a in actual)
        assert all(map(torch.equal, as_float64(actual), expected))


@each_backend
def test_both_packs_of_strided_and_not_finite(backend):
    weight = make_weight(40, 24).t()[:, 3:33]
    weight[2, 5], weight[7, 9], weight[8, 9] = float("inf"), float("-inf"), float("nan")
    expected = reference.sparse24_prune_both(weight)
    mask = ops.sparse24_mask(weight, transposable=True, backend=backend)
    for packs in (
        ops.sparse24_prune_both(weight, backend=backend),
        ops.sparse24_compress_both(weight, mask.t().contiguous().t(), backend=backend),
    ):
        for actual, exact in zip(packs, expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=0, atol=0, equal_nan=True)


@each_backend
def test_both_packs_refuse_either_direction(backend):
    weight, mask = torch.ones(50, 20), torch.zeros(50, 20, dtype=torch.bool)
    mask[8:11, 3] = True
    ops.sparse24_compress(weight, mask, backend=backend)
    with pytest.raises(ValueError, match="column 3 keeps 3 in rows 8 to 11"):
        ops.sparse24_compress_both(weight, mask, backend=backend)
    mask[7, 12:15] = True
    with pytest.raises(ValueError, match="row 7 keeps 3 in columns 12 to 15"):
        ops.sparse24_compress_both(weight, mask, backend=backend)


def test_gradients_through_both_packs():
    """Also at the edges, where the mask keeps fewer than two and zeros fill up."""
    weight = make_weight(5, 21).double().requires_grad_()
    mask = ops.sparse24_mask(weight, transposable=True)
    assert torch.autograd.gradcheck(lambda w: ops.sparse24_compress(w, mask)[0], (weight,))
    assert torch.autograd.gradcheck(lambda w: ops.sparse24_prune(w, transposable=True)[0], (weight,))
    assert torch.autograd.gradcheck(lambda w: ops.sparse24_compress_both(w, mask)[::2], (weight,))
    assert torch.autograd.gradcheck(lambda w: ops.sparse24_prune_both(w)[::2], (weight,))


def stored_places(metadata, in_features):
    stored = torch.zeros(len(metadata), reference.padded(in_features), dtype=torch.bool)
    return stored.scatter_(1, reference.kept_columns(metadata), True)[:, :in_features]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MASK_SHAPES, (130, 65), (66, 131)], ids=str)
def test_transpose_gives_the_second_pack(shape, dtype, backend):
    """Of a transposable mask, at every edge; trained values, so also those that only filled groups up."""
    _, metadata, _, metadata_t = ops.sparse24_prune_both(make_weight(*shape))
    assert ops.sparse24_is_transposable(metadata, shape[1])
    values = torch.randn(len(metadata), 4 * metadata.shape[1]).to(dtype)
    actual = ops.sparse24_transpose(values, metadata, shape[1], backend=backend)
    assert torch.equal(actual[1], metadata_t)
    dense = ops.sparse24_decompress(values, metadata, shape[1])
    assert torch.equal(ops.sparse24_decompress(*actual, shape[0]), dense.t())
    exact = reference.sparse24_transpose(values.double(), metadata, shape[1])
    assert all(map(torch.equal, as_float64(actual), exact))


@each_backend
@pytest.mark.parametrize("shape", [(1, 5), (14, 37), (130, 65), (66, 131)], ids=str)
def test_transpose_keeps_the_first_two_of_any_four(shape, backend):
    metadata = reference.sparse24_compress(*[(w := make_weight(*shape)), reference.sparse24_mask(w, False)])[
        1
    ]
    values = torch.randn(len(metadata), 4 * metadata.shape[1])
    stored = stored_places(metadata, shape[1])
    most = int(F.pad(stored, (0, 0, 0, -shape[0] % 4)).unflatten(0, (-1, 4)).sum(1).max())
    assert ops.sparse24_is_transposable(metadata, shape[1]) == (most <= 2)
    place = torch.arange(shape[0]) // 4
    before = torch.stack([stored[:i][place[:i] == place[i]].sum(0) for i in range(shape[0])])
    expected = ops.sparse24_decompress(values, metadata, shape[1]) * (before < 2)
    packed = ops.sparse24_transpose(values[:, :], metadata, shape[1], backend=backend)
    assert torch.equal(ops.sparse24_decompress(*packed, shape[0]), expected.t())
    aside = torch.cat((values.new_zeros(1), values.flatten()))[1:].view_as(values)  # not aligned
    for other in (aside, values.t().contiguous().t()):
        again = ops.sparse24_transpose(other, metadata, shape[1], backend=backend)
        assert all(map(torch.equal, again, packed))


def test_a_transposable_mask_stores_nothing_else():
    """Groups that an edge cuts off fill up beyond it."""
    for shape in MASK_SHAPES:
        weight = make_weight(*shape)
        _, metadata, _, metadata_t = ops.sparse24_prune_both(weight)
        mask = ops.sparse24_mask(weight, transposable=True)
        assert torch.equal(stored_places(metadata, shape[1]), mask)
        assert torch.equal(stored_places(metadata_t, shape[0]), mask.t())


def test_gradient_through_transpose():
    values, metadata = ops.sparse24_prune(make_weight(13, 21).double())
    assert torch.autograd.gradcheck(
        lambda v: ops.sparse24_transpose(v, metadata, 21)[0], (values.requires_grad_(),)
    )


def test_transpose_refuses_bad_input():
    values, metadata = ops.sparse24_prune(make_weight(4, 20))
    for arguments, message in (
        ((values, metadata, -1), "in_features must not be negative; got -1"),
        ((values, metadata, 40), "metadata must have shape"),
        ((values[:, 1:], metadata, 20), "values must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.sparse24_transpose(*arguments)
    with pytest.raises(ValueError, match="metadata must have shape"):
        ops.sparse24_is_transposable(metadata, 40)
    assert not ops.sparse24_is_transposable(metadata.to("meta"), 20)


def every_pattern():
    rows = [[int(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    tiles = [torch.tensor(tile) for tile in itertools.product(rows, repeat=4)]
    return torch.stack([tile for tile in tiles if bool((tile.sum(0) == 2).all())])


# few distinct magnitudes: many ties
TILES = hnp.arrays("float32", (4, 8), elements=st.integers(-3, 3) | st.floats(-1, 1, width=32))


@without_interpreter
@several
@given(tile=TILES)
def test_transposable_mask_is_the_best_of_all_patterns(tile, backend):
    weight = torch.from_numpy(tile)
    mask = ops.sparse24_mask(weight, transposable=True, backend=backend)
    patterns = every_pattern()
    assert len(patterns) == 90
    for begin in (0, 4):
        size = weight[:, begin : begin + 4].double().abs()
        kept = mask[:, begin : begin + 4]
        assert kept.sum(0).tolist() == kept.sum(1).tolist() == [2, 2, 2, 2]
        scores = (patterns * size).sum((1, 2))
        assert (size * kept).sum().item() >= scores.max().item() - 1e-12  # the order of the sum differs


@without_interpreter
@several
@given(weight=hnp.arrays("float32", st.tuples(st.integers(0, 5), st.integers(0, 37)),
                         elements=st.integers(-2, 2) | st.floats(-1, 1, width=32)))  # fmt: skip
def test_mask_keeps_the_largest_and_packs_exactly(weight, backend):
    weight = torch.from_numpy(weight)
    O, I = weight.shape
    mask = ops.sparse24_mask(weight, backend=backend)
    for row in range(O):
        for begin in range(0, I, 4):
            size, kept = weight[row, begin : begin + 4].abs(), mask[row, begin : begin + 4]
            assert int(kept.sum()) == min(2, len(size))
            if len(size) > 2:
                assert size[kept].min() >= size[~kept].max()
    values, metadata = ops.sparse24_compress(weight, mask, backend=backend)
    dense = ops.sparse24_decompress(values, metadata, I, backend=backend)
    assert torch.equal(dense, torch.where(mask, weight, 0))
    assert torch.equal(ops.sparse24_gather(dense, metadata, backend=backend), values)


@without_interpreter
@several
@given(data=st.data(), O=st.integers(1, 4), groups=st.integers(1, 9))
def test_compress_takes_masks_with_fewer(data, O, groups, backend):
    """Any 0, 1 or 2 kept in a group; what is not kept is not stored, even at a filled position."""
    sets = [s for n in range(3) for s in itertools.combinations(range(4), n)]
    mask = torch.zeros(O, groups * 4, dtype=torch.bool)
    for row in range(O):
        for group in range(groups):
            for i in data.draw(st.sampled_from(sets)):
                mask[row, group * 4 + i] = True
    weight = make_weight(O, groups * 4) + 10
    values, metadata = ops.sparse24_compress(weight, mask, backend=backend)
    expected = reference.sparse24_compress(weight, mask)
    assert torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
    assert torch.equal(ops.sparse24_decompress(values, metadata, groups * 4, backend=backend), weight * mask)
    first, second = metadata & 3, metadata >> 2 & 3
    assert bool((first < second).all())


@each_backend
def test_transposable_mask_of_many_tiles(backend):
    """Few distinct magnitudes, so that most tiles have several best patterns: the first is chosen."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (20, 402), generator=generator) * torch.tensor([1.0, 0.1])[None].repeat(
        1, 201
    )
    mask = ops.sparse24_mask(weight, transposable=True, backend=backend)
    assert torch.equal(mask, reference.sparse24_mask(weight, True))
    tiles = weight[:, :400].double().abs().view(5, 4, 100, 4).permute(0, 2, 1, 3)
    kept = mask[:, :400].view(5, 4, 100, 4).permute(0, 2, 1, 3)
    best = torch.einsum("prc,xyrc->xyp", every_pattern().double(), tiles).amax(2)
    torch.testing.assert_close((tiles * kept).sum((2, 3)), best)  # the order of the sum differs


@each_backend
def test_compress_every_pair_of_groups(backend):
    """A byte of metadata holds two groups: each of the 11 ways to keep 0, 1 or 2, beside each other way."""
    sets = [s for n in range(3) for s in itertools.combinations(range(4), n)]
    mask = torch.zeros(11, 11, 2, 4, dtype=torch.bool)
    for (i, left), (j, right) in itertools.product(enumerate(sets), repeat=2):
        mask[i, j, 0, list(left)] = True
        mask[i, j, 1, list(right)] = True
    mask = mask.view(11, 88)
    weight = make_weight(11, 88) + 10
    values, metadata = ops.sparse24_compress(weight, mask, backend=backend)
    expected = reference.sparse24_compress(weight, mask)
    assert torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
    assert torch.equal(ops.sparse24_decompress(values, metadata, 88, backend=backend), weight * mask)
    assert torch.equal(ops.sparse24_gather(weight * mask, metadata, backend=backend), values)


@each_backend
def test_metadata_bit_order(backend):
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [1, 3, 4, 7, 8, 9, 14, 15]] = True
    weight = torch.arange(16.0).view(1, 16)
    values, metadata = ops.sparse24_compress(weight, mask, backend=backend)
    assert values.tolist() == [[1, 3, 4, 7, 8, 9, 14, 15]]
    assert metadata.tolist() == [[1 | 3 << 2 | 0 << 4 | 3 << 6, 0 | 1 << 2 | 2 << 4 | 3 << 6]]


@each_backend
def test_nan_and_inf_weights_are_kept(backend):
    weight = torch.tensor([[1.0, float("nan"), 5.0, 2.0], [float("inf"), 3.0, float("-inf"), 9.0]])
    mask = ops.sparse24_mask(weight, backend=backend)
    assert mask.tolist() == [[False, True, True, False], [True, False, True, False]]
    tiles = ops.sparse24_mask(weight.repeat(2, 1), transposable=True, backend=backend)
    assert tiles.sum(0).tolist() == tiles.sum(1).tolist() == [2, 2, 2, 2]


@each_backend
def test_strided_weight_and_mask(backend):
    weight = make_weight(40, 24).t()[:, 3:33]
    mask = ops.sparse24_mask(weight, backend=backend)
    assert torch.equal(mask, ops.sparse24_mask(weight.contiguous(), backend=backend))
    assert torch.equal(
        ops.sparse24_compress(weight, mask.t().contiguous().t(), backend=backend)[0],
        ops.sparse24_compress(weight.contiguous(), mask, backend=backend)[0],
    )


@each_backend
def test_too_many_kept_names_the_first(backend):
    mask = torch.zeros(50, 20, dtype=torch.bool)
    mask[7, 12:15] = True
    mask[31, 0:4] = True
    with pytest.raises(ValueError, match="row 7 keeps 3 in columns 12 to 15"):
        ops.sparse24_compress(torch.ones(50, 20), mask, backend=backend)


# ---- linear ----


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_gradients(shape, dtype, backend):
    case = make_case(*shape, dtype=dtype)
    check_backward(case, None, backend)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 40, 21), (40, 19, 37)], ids=str)
def test_activation(shape, activation, dtype, backend):
    case = make_case(*shape, dtype=dtype)
    check_backward(case, activation, backend)


@without_interpreter
def test_many_groups_of_panels(backend):
    """More batch rows than are packed at a time: sums over the groups."""
    case = make_case(1300, 2064, 20)
    check_backward(case, "gelu", backend)


# (B, I, O) past the tiles that small cases take: the depth of the sums in parts, the largest tiles
CUDA_SHAPES = [(3, 1040, 20), (40, 600, 30), (600, 33, 20), (270, 130, 140)]


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels are not built for the CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_tiles_and_parts_of_cuda(shape, dtype):
    case = make_case(*shape, dtype=dtype)
    check_backward(case, "silu", "cuda")


# (B, I, O) of each of Hopper's tiles, with edges in B and O and columns that only padding fills; bulk
# stores (O a multiple of 8) and masked ones, the depth in parts, more tiles than blocks
HOPPER_SHAPES = [
    (5, 120, 21),
    (16, 128, 264),
    (3, 1152, 20),
    (5, 128, 1100),
    (20, 256, 72),
    (40, 248, 24),
    (70, 256, 136),
    (300, 120, 130),
    (520, 120, 130),
]
HOPPER = ["cuda-90"] if "cuda" in BACKENDS else []
on_hopper = pytest.mark.parametrize("backend", HOPPER, indirect=True)
on_hopper_and_reference = pytest.mark.parametrize("backend", ["reference", *HOPPER], indirect=True)


def launched(backend="cuda"):
    """Names of the CUDA kernels run since the last call."""
    return torch.ops.recsparse_cuda_on_cpu.launched().split() if backend == "cuda" else []


def check_sparse24_linear(case, activation, backend):
    """Output and the sum that is kept for backward."""
    arguments = (*case[:4], ACTIVATIONS.index(activation), True, False)
    op = OPS["sparse24_linear"]
    actual = op.overload(backend)(*arguments)
    exact = op.overload("reference")(*doubled(*case[:4]), *arguments[4:])
    baseline = op.overload("reference")(*arguments)
    for name, *three in zip(("output", "sum"), actual, exact, baseline, strict=True):
        assert_close(name, *three)
    return actual


@on_hopper_and_reference
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_tiles_and_parts_of_hopper(shape, dtype, backend):
    launched(backend)
    check_sparse24_linear(make_case(*shape, dtype=dtype), "gelu", backend)
    assert ("sparse24_linear_sm90" in launched(backend)) == (backend == "cuda")


@on_hopper_and_reference
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hopper_activations_and_gradients(activation, backend):
    case = make_case(9, 120, 40, dtype=torch.bfloat16)
    check_backward(case, activation, backend)


@on_hopper
def test_hopper_without_bias_or_sum_and_in_any_order_the_same(backend):
    input, values, metadata, _, _ = make_case(70, 256, 72, dtype=torch.bfloat16)
    results = []
    for order in (0, 1, 2):  # of the threads, and of the copies' ends: forward, reversed, random
        torch.ops.recsparse_cuda_on_cpu.set_order(order, 7)
        results.append(ops.sparse24_linear(input, values, metadata, None, backend=backend))
    torch.ops.recsparse_cuda_on_cpu.set_order(0, 0)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    zero = torch.zeros(72, dtype=torch.bfloat16)
    assert torch.equal(results[0], ops.sparse24_linear(input, values, metadata, zero, backend=backend))


@on_hopper
@pytest.mark.parametrize("why", ["rows", "metadata", "offset", "asked"])
def test_hopper_takes_the_other_kernel_where_bulk_copies_cannot_go(why, backend):
    case = list(make_case(9, {"rows": 127, "metadata": 136}.get(why, 128), 24, dtype=torch.bfloat16))
    if why == "offset":
        flat = torch.empty(case[0].numel() + 1, dtype=torch.bfloat16)[1:]
        case[0] = flat.copy_(case[0].flatten()).view(case[0].shape)
    use = torch.ops.recsparse_cuda_on_cpu.sparse24_use_warpgroups
    before = use(why != "asked")
    try:
        launched()
        check_sparse24_linear(case, "relu", backend)
        assert launched() == ["sparse24_linear"]
    finally:
        assert use(before) == (why != "asked")


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [6, 20])
def test_rows_that_begin_anywhere(B, dtype, backend):
    """Views of flat storage at odd offsets: no access may be wider than the data is aligned."""
    case = make_case(B, 128, 24, dtype=dtype)

    def moved(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return flat.copy_(t.flatten()).view(t.shape)

    expected = run_backward(*case, None, backend)
    input, values, metadata, bias, grad = (moved(t) for t in case)
    output = ops.sparse24_linear(input, values, metadata, bias, backend=backend)
    torch.testing.assert_close(output, expected[0])
    grad_input = OPS["sparse24_linear_grad_input"](grad, values, metadata, 128, backend=backend)
    torch.testing.assert_close(grad_input, expected[1])
    grad_values = OPS["sparse24_linear_grad_values"](grad, input, metadata, backend=backend)
    torch.testing.assert_close(grad_values, expected[2])
    dense = ops.sparse24_decompress(values, metadata, 128, backend=backend)
    assert torch.equal(dense, reference.sparse24_decompress(case[1], case[2], 128))
    mask = ops.sparse24_mask(moved(dense), backend=backend)
    packed = ops.sparse24_compress(moved(dense), moved(mask), backend=backend)
    assert torch.equal(packed[0], case[1]) and torch.equal(packed[1], case[2])
    assert torch.equal(ops.sparse24_gather(moved(dense), metadata, backend=backend), case[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_against_autograd(activation):
    """The explicit formulas against finite differences and against the dense layer."""
    input, values, metadata, bias, grad = doubled(*make_case(4, 13, 5, seed=3))
    inputs = tuple(t.requires_grad_() for t in (input, values, bias))

    def call(input, values, bias):
        return ops.sparse24_linear(input, values, metadata, bias, activation=activation, backend="reference")

    assert torch.autograd.gradcheck(call, inputs)
    ours = torch.autograd.grad(call(*inputs), inputs, grad)
    dense = reference.sparse24_decompress(values, metadata, 13)
    weight = dense.detach().requires_grad_()
    total = F.linear(input, weight, bias)
    function = getattr(F, activation) if activation else (lambda x: x)
    theirs = torch.autograd.grad(function(total), (input, weight, bias), grad)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], reference.sparse24_gather(theirs[1], metadata))
    torch.testing.assert_close(ours[2], theirs[2])


def test_pack_gradients():
    weight = make_weight(5, 21).double().requires_grad_()
    mask = ops.sparse24_mask(weight)
    values, metadata = ops.sparse24_compress(weight, mask)
    assert torch.autograd.gradcheck(lambda w: ops.sparse24_compress(w, mask)[0], (weight,))
    values = values.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ops.sparse24_decompress(v, metadata, 21), (values,))
    assert torch.autograd.gradcheck(lambda w: ops.sparse24_gather(w, metadata), (weight,))


@each_backend
@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_straight_through(activation, decay, backend):
    """The dense weight gets the gradient of an unmasked product, at the masked output."""
    input, _, _, bias, grad = make_case(19, 45, 12)
    weight = make_weight(12, 45)
    mask = ops.sparse24_mask(weight)

    def run(input, weight, bias, backend):
        input, weight, bias = (t.clone().requires_grad_() for t in (input, weight, bias))
        output = ops.sparse24_linear_ste(
            input, weight, mask, bias, activation=activation, decay=decay, backend=backend
        )
        output.backward(grad.to(output.dtype))
        return output, input.grad, weight.grad, bias.grad

    exact_input, exact_weight, exact_bias = (t.clone().requires_grad_() for t in doubled(input, weight, bias))
    used = (exact_weight * mask).detach().requires_grad_()
    function = getattr(F, activation) if activation else (lambda x: x)
    output = function(F.linear(exact_input, used, exact_bias))
    output.backward(grad.double())
    dense = used.grad + decay * torch.where(mask, 0, exact_weight.detach())
    exact = (output, exact_input.grad, dense, exact_bias.grad)
    actual, baseline = run(input, weight, bias, backend), run(input, weight, bias, "reference")
    for name, *three in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), actual, exact, baseline, strict=True
    ):
        assert_close(name, *three)


def ste_op_gradients(case, packs, weight, activation, backend):
    """Output and gradients of the op itself, which takes the second pack on every backend."""
    input, _, _, bias, grad = case
    input, weight, bias = (t.clone().requires_grad_() for t in (input, weight, bias))
    op = OPS["sparse24_linear_ste"]
    output, _ = op(input, weight, *packs, bias, activation, False, 0.1, backend=backend)
    return output, *torch.autograd.grad(output, (input, weight, bias), grad)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 16, 4), (3, 20, 9), (19, 45, 13), (40, 64, 36)], ids=str)
def test_straight_through_with_both_packs(shape, dtype, backend):
    """The gradient to the input is the same, from the pack of W or of W'."""
    B, I, O = shape
    case, weight = make_case(B, I, O, dtype=dtype), make_weight(O, I, dtype=dtype)
    packs = ops.sparse24_prune_both(weight, backend=backend)
    exact_packs = as_float64(packs)
    exact = ste_op_gradients(doubled(*case), (*exact_packs[:2], None, None), weight.double(), 3, "reference")
    baseline = ste_op_gradients(case, (*packs[:2], None, None), weight, 3, "reference")
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    for taken in (packs, (*packs[:2], None, None)):
        actual = ste_op_gradients(case, taken, weight, 3, backend)
        for name, *three in zip(names, actual, exact, baseline, strict=True):
            assert_close(name, *three)


class OpNames:
    """Names of the ops that are called meanwhile."""

    def __enter__(self):
        self.names = []
        self.observe = lambda op, args, picked, asked: self.names.append(op.name)
        OBSERVERS.append(self.observe)
        return self

    def __exit__(self, *_):
        OBSERVERS.remove(self.observe)


@each_backend
@pytest.mark.parametrize("with_mask", [False, True])
def test_transposable_straight_through(with_mask, backend):
    """Both packs are made where the products run on sparse tensor cores and the input has a gradient."""
    weight = make_weight(12, 36, dtype=torch.bfloat16)
    mask = ops.sparse24_mask(weight, transposable=True) if with_mask else None
    input, _, _, bias, grad = make_case(9, 36, 12, dtype=torch.bfloat16)

    def run(input, weight, bias, dtype=torch.bfloat16, **options):
        input, weight, bias = (t.to(dtype).clone().requires_grad_() for t in (input, weight, bias))
        output = ops.sparse24_linear_ste(input, weight, mask, bias, transposable=True, **options)
        return output, *torch.autograd.grad(output, (input, weight, bias), grad.to(dtype))

    with OpNames() as calls:
        actual = run(input, weight, bias, backend=backend)
    assert any("both" in name for name in calls.names) == (backend == "cuda")
    assert ("sparse24_linear_grad_input" in calls.names) == (backend != "cuda")
    exact = run(input, weight, bias, torch.float64, backend="reference")
    baseline = run(input, weight, bias, backend="reference")
    for name, *three in zip(("output", "input", "weight", "bias"), actual, exact, baseline, strict=True):
        assert_close(name, *three)
    with OpNames() as calls:
        ops.sparse24_linear_ste(input, weight, mask, transposable=True, backend=backend)
    assert not any("both" in name for name in calls.names)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 16, 4), (3, 20, 1), (19, 45, 13), (40, 64, 36)], ids=str)
def test_linear_from_the_transposed_pack(shape, dtype, backend):
    """The op's gradients with the pack of W' are those of the definition, on every backend."""
    B, I, O = shape
    input, _, _, bias, grad = make_case(B, I, O, dtype=dtype)
    values, metadata = ops.sparse24_prune(make_weight(O, I, dtype=dtype), transposable=True)

    def run(transposable, backend, *tensors):
        input, values, bias, grad = tensors
        arguments = [t.clone().requires_grad_() for t in (input, values, bias)]
        call = (arguments[0], arguments[1], metadata, arguments[2], 3, False, transposable)
        output, _ = OPS["sparse24_linear"](*call, backend=backend)
        return output, *torch.autograd.grad(output, arguments, grad)

    tensors = (input, values, bias, grad)
    with OpNames() as calls:
        output, grad_input, *others = run(True, backend, *tensors)
    assert "sparse24_transpose" in calls.names and "sparse24_linear_grad_input" not in calls.names
    exact, baseline = run(False, "reference", *doubled(*tensors)), run(False, "reference", *tensors)
    assert_close("grad_input", grad_input, exact[1], baseline[1])
    plain = run(False, backend, *tensors)
    assert all(map(torch.equal, (output, *others), (plain[0], *plain[2:])))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_the_transposed_pack_is_made(dtype, backend):
    """In a backward that the input has a part in, where products run on sparse tensor cores."""
    input, _, _, bias, _ = make_case(9, 36, 12, dtype=dtype)
    values, metadata = ops.sparse24_prune(make_weight(12, 36, dtype=dtype), transposable=True)
    on_cores = backend == "cuda" and dtype != torch.float32
    for wanted, transposable in ((True, True), (True, False), (False, True)):
        values = values.detach().requires_grad_()
        output = ops.sparse24_linear(
            input.requires_grad_(wanted), values, metadata, bias, transposable=transposable, backend=backend
        )
        with OpNames() as calls:
            output.sum().backward()
        assert ("sparse24_transpose" in calls.names) == (on_cores and wanted and transposable)
        assert ("sparse24_linear_grad_input" in calls.names) == (wanted and not (on_cores and transposable))


@pytest.mark.parametrize("name", ["sparse24_linear", "sparse24_linear_ste"])
def test_second_derivative_with_both_packs_is_refused(name):
    input, weight = make_case(4, 16, 8)[0].requires_grad_(), make_weight(8, 16)
    packs = ops.sparse24_prune_both(weight)
    arguments = {
        "sparse24_linear": (*packs[:2], None, 0, False, True),
        "sparse24_linear_ste": (weight, *packs, None, 0, False, 0.0),
    }
    output, _ = OPS[name](input, *arguments[name])
    (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="sparse24_linear_grad_input has no gradient"):
        grad.sum().backward()


@each_backend
def test_compile_straight_through_keeps_one_graph(backend):
    input, _, _, bias, _ = make_case(12, 36, 10, dtype=torch.bfloat16)
    weight = make_weight(10, 36, dtype=torch.bfloat16)

    def call(input, weight, bias):
        return ops.sparse24_linear_ste(
            input, weight, None, bias, activation="gelu", transposable=True, backend=backend
        )

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (input, weight, bias)]
        function(*inputs).float().sum().backward()
        results.append([t.grad for t in inputs])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@each_backend
def test_leading_dimensions_and_strides(backend):
    input, values, metadata, bias, _ = make_case(24, 40, 10)
    expected = ops.sparse24_linear(input, values, metadata, bias, backend=backend)
    for other in (input.view(2, 3, 4, 40), input.t().contiguous().t(), torch.cat([input, input], 1)[:, :40]):
        output = ops.sparse24_linear(other, values, metadata, bias, backend=backend)
        torch.testing.assert_close(output.reshape(24, 10), expected)
    one = ops.sparse24_linear(input[0], values, metadata, bias, backend=backend)
    torch.testing.assert_close(one, expected[0])
    row = input[:1].expand(24, 40)  # stride 0
    torch.testing.assert_close(
        ops.sparse24_linear(row, values, metadata, bias, backend=backend)[7], expected[0]
    )
    strided = ops.sparse24_linear(input, values.t().contiguous().t(), metadata.t().contiguous().t(), bias,
                                  backend=backend)  # fmt: skip
    torch.testing.assert_close(strided, expected)


@each_backend
@pytest.mark.parametrize("B", [4, 40])
def test_expanded_gradient(B, backend):
    """``output.sum().backward()`` hands over a gradient with strides 0."""
    case = list(make_case(B, 24, 10))
    case[4] = torch.ones(()).expand(B, 10)
    check_backward(case, None, backend)


@each_backend
@pytest.mark.parametrize("B", [3, 50])
def test_nan_and_inf_reach_what_keeps_them(B, backend):
    input, values, metadata, bias, _ = make_case(B, 32, 16)
    input[1, 5], input[2, 9] = float("nan"), float("inf")
    output = ops.sparse24_linear(input, values, metadata, bias, backend=backend)
    dense = reference.sparse24_decompress(values, metadata, 32)
    assert output[1][dense[:, 5] != 0].isnan().all()
    assert not output[2][dense[:, 9] != 0].isfinite().any()
    assert output[0].isfinite().all() and output[3:].isfinite().all()


@without_interpreter
@pytest.mark.parametrize("shape", [(7, 100, 50), (300, 100, 70)], ids=str)
def test_same_result_for_any_number_of_threads(shape, backend):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_backward(*make_case(*shape), "gelu", backend))
    finally:
        torch.set_num_threads(before)
    if backend == "native":
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


# ---- torch.library ----


@each_backend
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_opcheck_linear(activation, backend):
    input, _, _, bias, _ = make_case(6, 20, 9)
    values, metadata = ops.sparse24_prune(make_weight(9, 20), transposable=True)
    for keep_sum in (False, True):
        args = (
            input.requires_grad_(),
            values.requires_grad_(),
            metadata,
            bias.requires_grad_(),
            activation,
            keep_sum,
            not keep_sum,  # the gradient from the transposed pack
        )
        torch.library.opcheck(OPS["sparse24_linear"].overload(backend), args)
    args = (input, values, metadata, None, activation, False, False)
    torch.library.opcheck(OPS["sparse24_linear"].overload(backend), args)


@each_backend
def test_opcheck_the_others(backend):
    input, values, metadata, bias, grad = make_case(6, 20, 9)
    weight = make_weight(9, 20).requires_grad_()
    mask = ops.sparse24_mask(weight)
    both_ways = ops.sparse24_mask(weight, transposable=True)
    packs = ops.sparse24_prune_both(weight.detach())
    cases = {
        "sparse24_mask": (weight.detach(), True),
        "sparse24_compress": (weight, mask),
        "sparse24_prune": (weight, True),
        "sparse24_compress_both": (weight, both_ways),
        "sparse24_prune_both": (weight,),
        "sparse24_transpose": (packs[0].clone().requires_grad_(), packs[1], 20),
        "sparse24_gather": (weight, metadata),
        "sparse24_decompress": (values.requires_grad_(), metadata, 20),
        "sparse24_linear_ste": (
            input.requires_grad_(),
            weight,
            values.detach(),
            metadata,
            None,
            None,
            bias,
            3,
            False,
            0.1,
        ),
        "sparse24_linear_grad_input": (grad, values.detach(), metadata, 20),
        "sparse24_linear_grad_values": (grad, input.detach(), metadata),
    }
    for name, args in cases.items():
        torch.library.opcheck(OPS[name].overload(backend), args)
    args = (input, weight, *packs, bias, 3, True, 0.0)
    torch.library.opcheck(OPS["sparse24_linear_ste"].overload(backend), args)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compile_keeps_one_graph(activation, dtype, backend):
    torch._dynamo.reset()  # every case compiles the same function anew
    input, _, _, bias, grad = make_case(12, 36, 10, dtype=dtype)
    packed = ops.sparse24_prune(make_weight(10, 36, dtype=dtype), transposable=True)
    case = (input, *packed, bias, grad)
    compiled = torch.compile(run_backward_of(activation, backend), fullgraph=True, backend="aot_eager")
    results = []
    for function in (run_backward_of(activation, backend), compiled):
        inputs = [t.clone().requires_grad_() for t in (case[0], case[1], case[3])]
        function(inputs[0], inputs[1], case[2], inputs[2]).backward(case[4])
        results.append([t.grad for t in inputs])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def run_backward_of(activation, backend):
    def call(input, values, metadata, bias):
        return ops.sparse24_linear(
            input, values, metadata, bias, activation=activation, transposable=True, backend=backend
        )

    return call


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend):
    input, values, metadata, bias, _ = make_case(12, 36, 10)
    values.requires_grad_()
    with torch.autocast("cpu", dtype):
        output = ops.sparse24_linear(input, values, metadata, bias, activation="gelu", backend=backend)
        mixed = ops.sparse24_linear(input.to(dtype), values, metadata, bias, backend=backend)
    assert output.dtype == mixed.dtype == dtype
    output.float().sum().backward()
    assert values.grad.dtype == torch.float32 and values.grad.isfinite().all()


@each_backend
def test_function_transforms_of_a_transposable_linear(backend):
    input, _, _, bias, _ = make_case(6, 36, 12, dtype=torch.bfloat16)
    values, metadata = ops.sparse24_prune(make_weight(12, 36, dtype=torch.bfloat16), transposable=True)

    def loss(input, values):
        output = ops.sparse24_linear(input, values, metadata, bias, transposable=True, backend=backend)
        return output.float().square().sum()

    expected = torch.autograd.grad(loss(input.requires_grad_(), values.requires_grad_()), (input, values))
    for actual, wanted in zip(torch.func.grad(loss, (0, 1))(input, values), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    each = torch.func.vmap(torch.func.grad(loss), (0, None))(input[:, None], values)
    torch.testing.assert_close(each[:, 0], expected[0])
    transposed = torch.func.vmap(lambda v: ops.sparse24_transpose(v, metadata, 36, backend=backend)[0])(
        values[None]
    )
    assert torch.equal(transposed[0], ops.sparse24_transpose(values, metadata, 36, backend=backend)[0])


def test_float64_runs_on_the_reference():
    case = doubled(*make_case(5, 16, 3))
    assert ops.sparse24_linear(*case[:4]).dtype == torch.float64
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.sparse24_linear(*case[:4], backend="native")


def test_meta():
    case = [t.to("meta") for t in make_case(5, 16, 3)]
    assert ops.sparse24_linear(*case[:4]).shape == (5, 3)
    assert ops.sparse24_decompress(case[1], case[2], 16).device.type == "meta"


# ---- errors ----


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(input=torch.zeros(5, 33)), ValueError, r"metadata must have shape .* 48 .*got \(7, 4\)"),
        (dict(input=torch.zeros(5, 32, dtype=torch.int32)), TypeError, "input must be one of"),
        (dict(input=torch.zeros(())), ValueError, r"input must have shape \[..., I\]"),
        (dict(values=torch.zeros(7, 15)), ValueError, r"values must have shape .*\(7, 16\); got \(7, 15\)"),
        (dict(values=torch.zeros(7, 16).double()), TypeError, "values must have the dtype of input"),
        (dict(metadata=torch.zeros(7, 4)), TypeError, "metadata must be one of uint8"),
        (dict(metadata=None), TypeError, "metadata must be a tensor"),
        (dict(bias=torch.zeros(8)), ValueError, r"bias must have shape \[O\] = \(7\); got \(8,\)"),
        (dict(activation="softmax"), ValueError, "activation must be one of .*'softmax'"),
        (dict(backend="tpu"), ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, text):
    input, values, metadata, bias, _ = make_case(5, 32, 7)
    arguments = dict(input=input, values=values, metadata=metadata, bias=bias) | change
    with pytest.raises(error, match=text):
        ops.sparse24_linear(**arguments)


def test_native_checks_stand_alone():
    """The second fence: the op itself, called without the public function."""
    op = OPS["sparse24_linear"]
    if "native" not in op.backends():
        pytest.skip("the native library is not built")
    input, values, metadata, bias, _ = make_case(5, 32, 7)
    for args, error, text in (
        ((input[0], values, metadata, bias, 0, False, False), ValueError, "input must be"),
        ((input, values[:, :8], metadata, bias, 0, False, False), ValueError, "values must have shape"),
        ((input, values, metadata[:, :2], bias, 0, False, False), ValueError, "metadata must have 4 columns"),
        ((input, values, metadata.int(), bias, 0, False, False), TypeError, "metadata must be Byte"),
        ((input, values, metadata, bias.double(), 0, False, False), TypeError, "bias must have the dtype"),
        ((input, values, metadata, bias, 9, False, False), ValueError, "activation must be in"),
    ):
        with pytest.raises(error, match=text):
            op(*args, backend="native")


def test_other_errors():
    weight = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"mask must have shape that of weight = \(4, 8\); got \(4, 7\)"):
        ops.sparse24_compress(weight, torch.zeros(4, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be one of bool"):
        ops.sparse24_compress(weight, torch.zeros(4, 8))
    with pytest.raises(ValueError, match="in_features must not be negative"):
        ops.sparse24_decompress(torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.uint8), -1)
    with pytest.raises(ValueError, match="decay must not be negative"):
        ops.sparse24_linear_ste(torch.zeros(1, 8), weight, decay=-1.0)
    with pytest.raises(TypeError, match="SparseSemiStructuredTensor"):
        ops.sparse24_from_torch(weight)


# ---- torch's own 2:4 tensors ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_from_torch(dtype):
    weight = make_weight(64, 128, dtype=dtype)
    weight = weight * ops.sparse24_mask(weight)
    theirs = as_torch_packs(weight)
    values, metadata = ops.sparse24_from_torch(theirs)
    assert torch.equal(ops.sparse24_decompress(values, metadata, 128), weight)
    own = ops.sparse24_compress(weight, weight != 0)
    assert torch.equal(values, own[0]) and torch.equal(metadata, own[1])
