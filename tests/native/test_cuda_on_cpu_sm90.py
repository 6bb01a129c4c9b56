"""Models of sm_90a's instructions: what they compute, and that mistakes with them are caught."""

import pytest
import torch

if not hasattr(torch.ops.recsparse_cuda_on_cpu, "probe_bulk"):  # loaded by tests/conftest.py
    pytest.skip("built by cmake -DRECSPARSE_TESTS=ON (make test does)", allow_module_level=True)

ops = torch.ops.recsparse_cuda_on_cpu
FORWARD, REVERSED, RANDOM = range(3)
RING, STORE, STMATRIX = range(3)


@pytest.fixture(params=[(FORWARD, 0), (REVERSED, 0), (RANDOM, 1), (RANDOM, 2)], ids=str)
def order(request):
    ops.set_order(*request.param)
    yield
    ops.set_order(FORWARD, 0)


# ---- mbarriers and bulk copies ----


def load_boxes(bug: int, rows: int = 8, columns: int = 200, boxes: int = 5, row: int = 0):
    """Boxes [8, 64] of a matrix; and what they should be: zeros outside."""
    matrix = torch.arange(1, rows * columns + 1).view(rows, columns).to(torch.int16)
    output = torch.full((boxes, 8, 64), -1, dtype=torch.int16)
    wanted = torch.zeros(8, boxes * 64, dtype=torch.int16)
    here = matrix[max(row, 0) : row + 8]
    first = max(-row, 0)
    wanted[first : first + len(here), :columns] = here
    ops.probe_bulk(RING, bug, matrix, row, output)
    return output, wanted.view(8, boxes, 64).transpose(0, 1)


@pytest.mark.parametrize("row, rows", [(0, 8), (0, 5), (3, 13), (-2, 20), (40, 8)])
def test_bulk_loads_through_a_ring_of_stages(order, row, rows):
    actual, wanted = load_boxes(0, rows=rows, row=row)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    "bug, message",
    [
        (1, "no fence_mbarrier_init"),
        (2, "never initialised|before the thread can know"),
        (3, "race: |yet to fill|more arrivals"),
        (4, "no thread can go on.*mbarrier_wait"),
        (5, "more bytes than the phase"),
        (6, "more bytes than the phase|without a wait for its mbarrier|yet to fill"),
        (7, "yet to fill|without a wait for its mbarrier|nobody has written"),
        (8, "yet to fill|without a wait for its mbarrier|nobody has written"),
        (10, "race: writes shared memory"),
        (11, "more arrivals|race|yet to fill|no thread can go on"),
    ],
)
def test_mistakes_with_barriers_and_loads_are_caught(order, bug, message):
    with pytest.raises(RuntimeError, match=message):
        load_boxes(bug)


def test_the_wrong_swizzle_gives_other_elements():
    actual, wanted = load_boxes(9)
    assert not torch.equal(actual, wanted)


def store_boxes(bug: int, rows: int = 21, columns: int = 104, column: int = 48):
    input = torch.arange(1, 24 * 64 + 1).view(24, 64).to(torch.int16)
    output = torch.full((rows, columns), -1, dtype=torch.int16)
    wanted = output.clone()
    wanted[:, column:] = input[:rows, : columns - column]
    ops.probe_bulk(STORE, bug, input, column, output)
    return output, wanted


@pytest.mark.parametrize("column", [0, 48, 96])
def test_bulk_stores_leave_out_what_is_outside(order, column):
    actual, wanted = store_boxes(0, columns=112 if column else 64, column=column)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    "bug, message",
    [
        (1, "a bulk store still reads"),
        (2, "no fence_proxy_async"),
        (3, "race: an asynchronous read|nobody has written|no fence_proxy_async"),
        (4, "ended with bulk stores under way"),
        (5, "no thread can go on.*named_barrier_sync"),
    ],
)
def test_mistakes_with_bulk_stores_are_caught(order, bug, message):
    with pytest.raises(RuntimeError, match=message):
        store_boxes(bug)


def test_stmatrix_stores_transposed(order):
    output = torch.zeros(128, dtype=torch.int32)
    ops.probe_bulk(STMATRIX, 0, output, 0, output)
    rows = output.view(torch.int16).view(4, 8, 8)
    m, r, c = torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(rows.int(), (1000 * m + 10 * r + c).int())


def test_a_tensor_map_that_the_driver_would_refuse():
    with pytest.raises(RuntimeError, match="rows are not multiples of 16 bytes apart"):
        load_boxes(0, columns=201)


# ---- products of a warpgroup ----


def product(columns: int, dtype: torch.dtype, bug: int = 0, seed: int = 0, rows: int | None = None):
    """One [64, 64] 2:4 matrix times b [rows, 64] transposed, plus 1; and what it should be."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(64, 16, 4, generator=generator).to(dtype)
    places = torch.rand(64, 16, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values
    values = dense.gather(-1, places)
    dense = torch.zeros_like(dense).scatter_(-1, places, values).view(64, 64)
    nibbles = (places[..., 0] | places[..., 1] << 2).view(64, 8, 2)
    metadata = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)
    b = torch.randn(rows or columns, 64, generator=generator).to(dtype)
    output = torch.full((64, columns), torch.nan)
    ops.probe_wgmma(columns, bug, values.view(64, 32), b, metadata, output)
    wanted = torch.ones(64, columns, dtype=torch.float64)
    wanted[:, : len(b)] += dense.double() @ b.double().T
    return output, wanted.float()


@pytest.mark.parametrize("columns", [16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wgmma_sp(order, columns, dtype):
    actual, wanted = product(columns, dtype, rows=columns - 3)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bug", [1, 2, 5, 8], ids=["rows", "halves", "swizzle", "selector"])
def test_wrong_metadata_or_swizzle_gives_other_sums(bug):
    actual, wanted = product(16, torch.bfloat16, bug)
    assert not torch.allclose(actual, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "bug, message",
    [
        (3, "must ascend"),
        (4, "no wgmma_fence"),
        (6, "no thread can go on.*wgmma_wait"),
        (7, "issue different products"),
        (9, "does not begin where its swizzle does"),
        (10, "yet to fill|without a wait for its mbarrier|nobody has written"),
        (11, "no fence_proxy_async"),
        (12, "a wgmma still reads"),
        (13, "touches the sums of a wgmma under way"),
    ],
)
def test_mistakes_with_products_are_caught(order, bug, message):
    with pytest.raises(RuntimeError, match=message):
        product(16, torch.bfloat16, bug)
