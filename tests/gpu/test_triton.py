"""Triton's launchers on a GPU: captured in a CUDA graph, on two streams, with every configuration they may choose.

Needs ``TRITON_INTERPRET=0`` in the environment: the other tests run kernels in the interpreter. What can be known
without a GPU, that no launcher waits for the device, is known from tests/aot: tensors there hold no data.
"""

import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels import triton as backend
from recsparse_kernels.ops._backend import Op

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(bool(backend.REASON), reason=f"triton: {backend.REASON}"),
    pytest.mark.skipif(backend.INTERPRETED, reason="kernels are interpreted: set TRITON_INTERPRET=0"),
]

BAGS = lambda: torch.randint(1000, (128, 10), device="cuda")  # noqa: E731
ROWS = lambda: torch.randn(33, 256, device="cuda", dtype=torch.bfloat16)  # noqa: E731
CASES = {
    "masked bag": (lambda o: rk.nn.MaskedEmbeddingBag(1000, 64, mode="sum", **o), BAGS),
    "low-rank bag": (lambda o: rk.nn.LowRankEmbeddingBag(1000, 64, rank=16, mode="mean", **o), BAGS),
    "low-rank linear": (lambda o: rk.nn.LowRankLinear(256, 192, 16, **o), ROWS),
    "2:4 linear": (lambda o: rk.nn.Sparse24Linear(256, 192, **o), ROWS),
    "fan-in linear": (lambda o: rk.nn.FixedFanInLinear(256, 1000, 16, **o), ROWS),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """A layer whose every op runs on Triton, and an input."""
    monkeypatch.setattr(Op, "pick", lambda op, args, backend=None: backend or "triton")
    torch.manual_seed(0)
    make, input = CASES[request.param]
    return make({"device": "cuda", "dtype": torch.bfloat16}), input()


def step(module, x):
    """Output and gradients."""
    for parameter in module.parameters():
        parameter.grad = None
    y = module(x)
    y.float().square().sum().backward()
    return [y, *(parameter.grad for parameter in module.parameters())]


def test_a_cuda_graph_captures_forward_and_backward(case):
    module, x = case
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what is launched
        for _ in range(3):
            step(module, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x)
    x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    kept = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(kept, step(module, x), strict=True))


@torch.no_grad()
def test_two_streams_give_the_same_as_one(case):
    module, x = case
    wanted = module(x)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(module(x))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)


def test_every_configuration_gives_the_same_gradients(case):
    from recsparse_kernels.triton import _configs

    module, x = case
    wanted = [t.detach().float() for t in step(module, x)]
    for choices in _configs.every():
        with _configs.using(choices):
            for one, other in zip(step(module, x), wanted, strict=True):
                error = (one.detach().float() - other).abs().max()
                assert error <= 2e-2 * other.abs().max().clamp_min(1e-6)  # bfloat16, sums in another order
