"""The harness that runs CUDA kernels on the CPU: planted bugs are caught, instructions compute what they should."""

import pytest
import torch

if not hasattr(torch.ops.recsparse_cuda_on_cpu, "probe"):  # loaded by tests/conftest.py
    pytest.skip("built by cmake -DRECSPARSE_TESTS=ON (make test does)", allow_module_level=True)

ops = torch.ops.recsparse_cuda_on_cpu
REVERSE, WARP, SYNCWARP, COPY, MISALIGNED, SUM, CAST, ROW = range(8)
FORWARD, REVERSED, RANDOM = range(3)


@pytest.fixture(params=[(FORWARD, 0), (REVERSED, 0), (RANDOM, 1), (RANDOM, 2)], ids=str)
def order(request):
    ops.set_order(*request.param)
    yield
    ops.set_order(FORWARD, 0)


def run(which: int, bug: int, count: int, out: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    input = torch.arange(count, dtype=torch.float32) + 1
    output = torch.full((out or count,), -1.0)
    ops.probe(which, bug, input, output)
    return input, output


@pytest.mark.parametrize("count", [64, 1, 100, 200])
def test_barriers_and_shared_memory(order, count):
    for bug in (0, 4):  # 4: threads that leave before a barrier do not count
        if bug == 4 and count % 64:
            continue
        input, output = run(REVERSE, bug, count)
        assert torch.equal(output, torch.cat([tile.flip(0) for tile in input.split(64)]))


@pytest.mark.parametrize(
    "bug, count, message",
    [
        (1, 64, "race: |nobody has written"),  # which of them depends on the order of the threads
        (2, 64, "ended|no thread can go on|race|nobody has written"),
        (3, 100, "out of bounds, 0 past the end of an array of 400 bytes"),
        (5, 64, "a barrier at probes.cu:.* while others wait at the one at probes.cu"),
        (6, 128, "writes what block"),
        (7, 64, "nobody has written"),
        (8, 64, "out of bounds of a shared array"),
    ],
)
def test_mistakes_with_shared_memory_are_caught(order, bug, count, message):
    with pytest.raises(RuntimeError, match=f"cuda_on_cpu: kernel reverse.*({message})"):
        run(REVERSE, bug, count)


def test_a_launch_after_a_failed_one_is_clean():
    with pytest.raises(RuntimeError, match="nobody has written"):
        run(REVERSE, 1, 64)
    input, output = run(REVERSE, 0, 64)
    assert torch.equal(output, input.flip(0))


def test_shuffles(order):
    input, output = run(WARP, 0, 64, out=2)
    assert torch.equal(output, input.view(2, 32).sum(1))


@pytest.mark.parametrize("bug", [1, 2, 3])
def test_divergent_shuffles_are_caught(order, bug):
    wanted = {1: "ended or never was|no thread can go on", 2: "own mask", 3: "ended or never was"}[bug]
    with pytest.raises(RuntimeError, match=wanted):
        run(WARP, bug, 64, out=2)


def test_syncwarp(order):
    input, output = run(SYNCWARP, 0, 64)
    assert torch.equal(output, input.view(32, 2).flip(1).reshape(-1))


@pytest.mark.parametrize("bug", [1, 2])
def test_memory_of_a_warp_needs_syncwarp_and_of_a_block_more(order, bug):
    with pytest.raises(RuntimeError, match="race: |nobody has written"):
        run(SYNCWARP, bug, 64)


def test_block_sum(order):
    for bug in (0, 1):
        input, output = run(SUM, bug, 1000, out=3)
        assert output[0] == input.sum()
    _, output = run(SUM, 3, 10, out=3)
    assert output.tolist() == [55, 31, 31]  # atomics


def test_a_write_to_an_input_is_caught():
    with pytest.raises(RuntimeError, match="only to be read"):
        run(SUM, 2, 64, out=3)


def test_a_misaligned_vector_is_caught():
    assert run(MISALIGNED, 4, 8, out=4)[1].tolist() == [5, 6, 7, 8]
    with pytest.raises(RuntimeError, match="misaligned access of 16 bytes"):
        run(MISALIGNED, 2, 8, out=4)
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(MISALIGNED, 8, 8, out=4)


def test_a_misaligned_cast_is_caught():
    assert run(CAST, 4, 8, out=4)[1].tolist() == [5, 6, 7, 8]
    with pytest.raises(RuntimeError, match="misaligned access at .*probes.cu"):
        run(CAST, 2, 8, out=4)


def test_an_index_past_the_row_of_an_array_is_caught():
    assert run(ROW, 8, 32, out=1)[1].tolist() == [36]
    with pytest.raises(RuntimeError, match="index 8 is out of bounds at .*probes.cu"):
        run(ROW, 9, 32, out=1)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_cp_async(order, stages):
    input, output = run(COPY, 0, 256 * stages)
    assert torch.equal(output, input)


@pytest.mark.parametrize(
    "bug, message",
    [
        (1, "cp.async has yet to fill"),
        (2, "ended with cp.async under way"),
        (3, "race|cp.async has yet to fill|nobody has written"),
        (4, "misaligned"),
        (5, "race|cp.async has yet to fill"),
    ],
)
def test_mistakes_with_cp_async_are_caught(order, bug, message):
    with pytest.raises(RuntimeError, match=message):
        run(COPY, bug, 256 * 5)


# ---- tensor cores ----

MMA, LDMATRIX, TF32, SP_0, SP_1 = range(5)
NO_METADATA = torch.zeros(0, dtype=torch.uint8)


def matrices(dtype, m, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=generator).to(dtype)
    return a, torch.randn(k, n, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_m16n8k16(order, dtype):
    a, b = matrices(dtype, 16, 16, 8)
    output = torch.ones(16, 8)
    ops.probe_mma(MMA, 0, a, b, NO_METADATA, output)
    torch.testing.assert_close(output, (1 + a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ldmatrix_loads_the_fragments_of_mma(order, dtype):
    a, b = matrices(dtype, 16, 16, 8)
    output = torch.empty(16, 8)
    ops.probe_mma(LDMATRIX, 0, a, b, NO_METADATA, output)
    torch.testing.assert_close(output, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


def test_mma_m16n8k8_tf32(order):
    a, b = matrices(torch.float32, 16, 8, 8)
    output = torch.empty(16, 8)
    ops.probe_mma(TF32, 0, a, b, NO_METADATA, output)

    def tf32(x):  # 10 bits of mantissa, ties away from zero
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    torch.testing.assert_close(output, (tf32(a) @ tf32(b)).float(), rtol=1e-6, atol=1e-6)


def sparse24(dtype, seed):
    """A 2:4 matrix [16, 32], its kept values [16, 16] and their places, metadata [16, 4] in natural order."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(16, 8, 4, generator=generator).to(dtype)
    places = torch.rand(16, 8, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values
    values = dense.gather(-1, places)
    dense = torch.zeros_like(dense).scatter_(-1, places, values).view(16, 32)
    nibbles = (places[..., 0] | places[..., 1] << 2).view(16, 4, 2)
    metadata = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)
    return dense, values.reshape(16, 16).contiguous(), metadata


@pytest.mark.parametrize("which", [SP_0, SP_1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_sp_m16n8k32(order, dtype, which):
    dense, values, metadata = sparse24(dtype, seed=which)
    _, b = matrices(dtype, 1, 32, 8)
    output = torch.empty(16, 8)
    ops.probe_mma(which, 0, values, b, metadata, output)
    torch.testing.assert_close(output, (dense.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)
    for bug in (1, 2):  # metadata of another row, nibbles swapped
        ops.probe_mma(which, bug, values, b, metadata, output)
        assert not torch.allclose(output, (dense.double() @ b.double()).float(), rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="must ascend"):
        ops.probe_mma(which, 3, values, b, metadata, output)
