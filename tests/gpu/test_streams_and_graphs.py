"""What only a GPU can show: CUDA graphs, several streams, several processes, errors of the device."""

import subprocess
import sys

import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels.ops._backend import OPS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = {
    "masked_embedding_bag": lambda: (
        rk.nn.MaskedEmbeddingBag(1000, 64, mode="sum", device="cuda"),
        torch.randint(1000, (128, 10), device="cuda"),
    ),
    "low_rank_linear": lambda: (
        rk.nn.LowRankLinear(256, 192, 16, device="cuda"),
        torch.randn(33, 256, device="cuda"),
    ),
    "sparse24_linear": lambda: (
        rk.nn.Sparse24Linear(256, 192, device="cuda"),
        torch.randn(33, 256, device="cuda"),
    ),
    "fan_in_linear": lambda: (
        rk.nn.FixedFanInLinear(256, 1000, 16, device="cuda"),
        torch.randn(33, 256, device="cuda"),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    if OPS[request.param].backends("cuda") == ("reference",):
        pytest.skip("neither CUDA C++ nor Triton has the op here")
    torch.manual_seed(0)
    return CASES[request.param]()


def test_a_cuda_graph_captures_forward_and_backward(case):
    module, x = case

    def step():
        for p in module.parameters():
            p.grad = None
        y = module(x)
        y.square().sum().backward()
        return y, [p.grad for p in module.parameters()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, grads = step()
    x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    kept, kept_grads = captured.clone(), [g.clone() for g in grads]
    wanted, wanted_grads = step()
    assert torch.equal(kept, wanted)
    assert all(torch.equal(a, b) for a, b in zip(kept_grads, wanted_grads, strict=True))


@torch.no_grad()
def test_two_streams_give_the_same_as_one(case):
    module, x = case
    wanted = module(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [[], []]
    for _ in range(20):
        for stream, found in zip(streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(module(x))
    torch.cuda.synchronize()
    assert all(torch.equal(r, wanted) for found in results for r in found)


def test_two_processes_share_the_gpu():
    code = (
        "import torch, recsparse_kernels as rk\n"
        "torch.manual_seed(0)\n"
        "m = rk.nn.MaskedEmbeddingBag(1000, 64, mode='sum', device='cuda')\n"
        "x = torch.arange(5000, device='cuda').view(500, 10) % 1000\n"
        "print(sum(float(m(x).double().sum()) for _ in range(50)))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1] and printed[0].strip()


@pytest.mark.parametrize("mode", ["clamp", "none"])
def test_indices_out_of_range_do_no_harm(mode):
    before = rk.config.get_check_indices()
    rk.set_check_indices(mode)
    try:
        module = rk.nn.MaskedEmbeddingBag(100, 64, mode="sum", device="cuda")
        good = torch.randint(100, (50, 4), device="cuda")
        wanted = module(good)
        module(torch.full_like(good, 2**40)).sum().backward()
        torch.cuda.synchronize()
        assert torch.equal(module(good), wanted)
    finally:
        rk.set_check_indices(before)


@pytest.mark.parametrize("dense_labels", [0, 7])
def test_a_head_gives_what_it_gives_on_the_cpu(dense_labels, check_indices):
    head = rk.nn.FanInHead(12, 50, 5, group_size=4, dense_labels=dense_labels, label_order=torch.randperm(50))
    x, labels = torch.randn(4, 12), torch.tensor([4, 49, 4, 0, 7, 30])
    offsets, candidates = torch.tensor([0, 3, 3, 5, 6]), torch.tensor([[4, 0, 49, 30]] * 4)
    wanted = head.loss(x, (offsets, labels)), head.score(x, candidates)
    head, x, candidates = head.cuda(), x.cuda(), candidates.cuda()
    found = head.loss(x, (offsets.cuda(), labels.cuda())), head.score(x, candidates)
    check_indices("none")
    offsets[-1], labels = 8, torch.cat([labels, torch.tensor([50, -1])])  # outside: as if they were not there
    found += (head.loss(x, (offsets.cuda(), labels.cuda())),)
    for one, other in zip(found, (*wanted, wanted[0]), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
