"""Masked embedding bags against torch's dense ones and FBGEMM's (put fbgemm_gpu on PYTHONPATH to have it)."""

import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from recsparse_kernels import use_huge_pages
from recsparse_kernels.nn import MaskedEmbeddingBag, MaskedFields
from recsparse_kernels.ops.masked_embedding import (
    FusedOptimizer,
    masked_embedding_bag,
    masked_embedding_matmul_t,
)
from recsparse_kernels.ops.masked_embedding_records import (
    masked_embedding_bag_frozen,
    masked_embedding_freeze,
)
from recsparse_kernels.testing.masked_embedding import make_large_table

from .harness import Case, compare, relative_error, rotating

HAS_FBGEMM = importlib.util.find_spec("fbgemm_gpu") is not None
BAR = (1_000_000, 64, 0.2, 2048, 20)  # V, D, density, bags, length


def shape_text(V, D, density, bags, length):
    return f"V={V} D={D} density={density} B={bags} L={length}"


@functools.lru_cache(maxsize=1)  # one case's table at a time
def table_and_weight(V, D, density, layout="bitmask", dtype=torch.float32):
    torch.manual_seed(0)
    return make_large_table(V, D, density, layout, dtype)


def draw_indices(V, bags, length, zipf=False):
    if not zipf:
        return torch.randint(V, (bags * length,))
    return (V ** torch.rand(bags * length)).long().sub_(1).clamp_(0, V - 1)  # P(i) about 1 / i


def index_sets(V, bags, length, zipf):
    torch.manual_seed(1)
    offsets = torch.arange(0, bags * length, length)
    return lambda i: (draw_indices(V, bags, length, zipf), offsets)


def fbgemm_infer(weight, dtype):
    """FBGEMM's inference table, without bounds check, as a call(indices, offsets with last)."""
    import fbgemm_gpu  # noqa: F401
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )

    kind = {torch.float32: SparseType.FP32, torch.float16: SparseType.FP16}[dtype]
    V, D = weight.shape
    tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", V, D, kind, EmbeddingLocation.HOST)], device="cpu", output_dtype=kind,
        bounds_check_mode=BoundsCheckMode.NONE,
    )  # fmt: skip
    tbe.initialize_weights()
    split = tbe.split_embedding_weights()[0][0]
    split[:, -D * weight.element_size() :].copy_(weight.view(torch.uint8).view(V, -1))
    return lambda indices, offsets: tbe(indices.int(), offsets.int())


FORWARD = [
    (*BAR, torch.float32, False),
    (*BAR, torch.bfloat16, False),
    (*BAR, torch.float16, False),
    (*BAR, torch.float32, True),
    *((1_000_000, D, 0.2, 2048, 20, torch.float32, False) for D in (8, 10, 16, 32, 50, 128)),
    *((1_000_000, 64, density, 2048, 20, torch.float32, False) for density in (0.02, 0.05, 0.1, 0.5)),
    (10_000, 64, 0.2, 2048, 20, torch.float32, False),  # in cache: fewer bytes do not help
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_bag_forward(case, benchmark):
    V, D, density, bags, length, dtype, zipf = case
    table, weight = table_and_weight(V, D, density, dtype=dtype)
    records = masked_embedding_freeze(table)
    make = index_sets(V, bags, length, zipf)
    indices, offsets = make(0)
    exact = F.embedding_bag(indices, weight.double(), offsets, mode="sum") if V * D < 2**25 else None
    dense = F.embedding_bag(indices, weight, offsets, mode="sum")

    def check():
        reference = dense if exact is None else exact
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (
            relative_error(masked_embedding_bag(indices, table, offsets, mode="sum"), reference) < tolerance
        )
        assert (
            relative_error(masked_embedding_bag_frozen(indices, records, offsets, "sum"), reference)
            < tolerance
        )

    row_bytes = D * weight.element_size()
    spin = functools.partial(rotating, make, bytes_each=bags * length * row_bytes)
    candidates = {
        "nn.EmbeddingBag": spin(lambda i, o: F.embedding_bag(i, weight, o, mode="sum")),
        "ours": spin(lambda i, o: masked_embedding_bag(i, table, o, mode="sum")),
        "ours-frozen": spin(lambda i, o: masked_embedding_bag_frozen(i, records, o, "sum")),
    }
    if (V, D, density, bags, length) == BAR:  # what huge pages do for the dense table
        placed = weight.clone()
        use_huge_pages(placed)
        candidates["nn.EmbeddingBag, huge pages"] = spin(
            lambda i, o: F.embedding_bag(i, placed, o, mode="sum")
        )
    if HAS_FBGEMM and dtype != torch.bfloat16 and D % 4 == 0:
        tbe = fbgemm_infer(weight, dtype)
        last = torch.arange(0, bags * length + 1, length)
        assert relative_error(tbe(indices, last), dense) < 2e-2
        candidates["fbgemm TBE"] = spin(lambda i, o: tbe(i, last))
    own = sum(t.numel() * t.element_size() for t in table[:5] if t is not None)
    print(f"\nbytes: {own / weight.numel() / weight.element_size():.3f} of dense")
    name = "masked_embedding_bag" + (" zipf" if zipf else "")
    with torch.no_grad():
        compare(
            Case(name, "forward", shape_text(V, D, density, bags, length), str(dtype)[6:], density),
            candidates, dense="nn.EmbeddingBag", check=check, benchmark=benchmark,
            work_bytes=int(bags * length * own / V), work_flops=int(bags * length * D * density),
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["bitmask", "fixed_k", "row_remap"])
@pytest.mark.parametrize("density", [0.02, 0.25])
def test_layouts(layout, density, benchmark):
    V, D, bags, length = 1_000_000, 64, 2048, 20
    table, weight = table_and_weight(V, D, density, layout)
    make = index_sets(V, bags, length, False)
    spin = functools.partial(rotating, make, bytes_each=bags * length * D * 4)
    with torch.no_grad():
        compare(
            Case(f"masked_embedding_bag {layout}", "forward", shape_text(V, D, density, bags, length),
                 density=density),
            {
                "nn.EmbeddingBag": spin(lambda i, o: F.embedding_bag(i, weight, o, mode="sum")),
                "ours": spin(lambda i, o: masked_embedding_bag(i, table, o, mode="sum")),
            },
            dense="nn.EmbeddingBag", benchmark=benchmark,
        )  # fmt: skip


STEPS = [
    (*BAR, False),
    (*BAR, True),
    (1_000_000, 16, 0.2, 2048, 20, False),
    (1_000_000, 128, 0.1, 2048, 20, False),
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_bag_step(case, benchmark):
    """Forward, backward and SGD; the dense-gradient bag is timed alone, it takes a hundred times as long."""
    V, D, density, bags, length, zipf = case
    table, weight = table_and_weight(V, D, density)
    make = index_sets(V, bags, length, zipf)
    grad = torch.randn(bags, D)
    values = torch.nn.Parameter(table.values.clone())
    use_huge_pages(values)
    own = table._replace(values=values)
    fused_values = table.values.clone().requires_grad_()
    use_huge_pages(fused_values)
    fused_table = table._replace(values=fused_values)
    parameters = {name: torch.nn.Parameter(weight.clone()) for name in ("dense", "sparse")}
    optimizers = {name: torch.optim.SGD([p], lr=0.1) for name, p in (*parameters.items(), ("ours", values))}
    fused = {
        kind: FusedOptimizer.create(kind, fused_table, 0.01) for kind in ("sgd", "rowwise_adagrad", "adam")
    }

    def step(name, forward):
        def run(indices, offsets):
            forward(indices, offsets).backward(grad)
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)

        return run

    def torch_bag(name, sparse):
        return step(name, lambda i, o: F.embedding_bag(i, parameters[name], o, mode="sum", sparse=sparse))

    def fused_step(kind):
        return lambda i, o: masked_embedding_bag(i, fused_table, o, mode="sum", fused=fused[kind]).backward(
            grad
        )

    spin = functools.partial(rotating, make, bytes_each=bags * length * D * 4)
    candidates = {
        "nn.EmbeddingBag sparse": spin(torch_bag("sparse", True)),
        "ours-fused": spin(fused_step("sgd")),
        "ours-fused adagrad": spin(fused_step("rowwise_adagrad")),
        "ours-fused adam": spin(fused_step("adam")),
        "ours-sparse": spin(
            step("ours", lambda i, o: masked_embedding_bag(i, own, o, mode="sum", sparse=True))
        ),
    }
    text = shape_text(V, D, density, bags, length) + (" zipf" if zipf else "")
    compare(
        Case("masked_embedding_bag", "step", text, "float32", density),
        candidates, dense="nn.EmbeddingBag sparse", rounds=20, benchmark=benchmark,
    )  # fmt: skip
    if case == STEPS[0]:
        compare(
            Case("masked_embedding_bag", "step, dense gradient", text, "float32", density),
            {
                "nn.EmbeddingBag": spin(torch_bag("dense", False)),
                "ours-fused": candidates["ours-fused"],
                "ours-packed gradient": spin(
                    step("ours", lambda i, o: masked_embedding_bag(i, own, o, mode="sum"))
                ),
            },
            dense="nn.EmbeddingBag", rounds=7,
        )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 16, 128])
def test_matmul_t(batch, benchmark):
    """Scores against a whole catalogue."""
    V, D, density = 200_000, 64, 0.2
    table, weight = table_and_weight(V, D, density)
    spin = functools.partial(rotating, lambda i: (torch.randn(batch, D),), bytes_each=batch * D * 4)
    x = torch.randn(batch, D)

    def check():
        assert relative_error(masked_embedding_matmul_t(x, table), x @ weight.t()) < 1e-5

    with torch.no_grad():
        compare(
            Case("masked_embedding_matmul_t", "forward", f"B={batch} V={V} D={D} density={density}",
                 density=density),
            {
                "F.linear": spin(lambda x: F.linear(x, weight)),
                "ours": spin(lambda x: masked_embedding_matmul_t(x, table)),
            },
            dense="F.linear", check=check, benchmark=benchmark, dense_flops=2 * batch * V * D,
        )  # fmt: skip


@pytest.mark.parametrize("batch", [16, 2048])
def test_many_tables(batch, benchmark):
    """The 26 tables of a click-through model, one row each: a lookup in all at once, and one by one."""
    V, D, density, tables = 40_000, 64, 0.2, 26
    torch.manual_seed(0)
    fields = MaskedFields([V] * tables, D, density=density)
    dense = fields.to_dense()
    alone = [MaskedEmbeddingBag.from_dense(t) for t in dense]
    offsets = torch.arange(batch)
    spin = functools.partial(
        rotating, lambda i: (torch.randint(V, (batch, tables)),), bytes_each=batch * tables * 8
    )

    def one_by_one(layers):
        return lambda rows: torch.stack(
            [t(r, offsets) for t, r in zip(layers, rows.unbind(1), strict=True)], 1
        )

    def check():
        rows = torch.randint(V, (batch, tables))
        assert torch.equal(fields(rows), one_by_one(dense)(rows))

    with torch.no_grad():
        compare(
            Case("masked_fields", "forward", f"{tables} tables V={V} D={D} density={density} B={batch}",
                 density=density),
            {
                "nn.EmbeddingBag": spin(one_by_one(dense)),
                "MaskedEmbeddingBag": spin(one_by_one(alone)),
                "ours": spin(fields),
            },
            dense="nn.EmbeddingBag", check=check, benchmark=benchmark,
        )  # fmt: skip
