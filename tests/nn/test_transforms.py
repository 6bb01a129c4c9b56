"""Layers inside torch.func: gradients, gradients of each sample, ensembles; what has none says so."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from recsparse_kernels.nn import (
    FixedFanInLinear,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    LowRankLinear,
    MaskedEmbedding,
    MaskedEmbeddingBag,
    MaskedLinear,
    Sparse24Linear,
    Sparse24LinearSTE,
)

LAYERS = {
    "sparse24": lambda: Sparse24Linear(24, 10, activation="gelu"),
    "sparse24_ste": lambda: Sparse24LinearSTE(24, 10),
    "low_rank": lambda: LowRankLinear(24, 10, rank=3),
    "fan_in": lambda: FixedFanInLinear(24, 10, fan_in=5),
    "masked_linear": lambda: MaskedLinear.from_dense(nn.Linear(24, 10), density=0.3),
    "masked_embedding": lambda: MaskedEmbedding(24, 10, density=0.3),
    "masked_bag": lambda: MaskedEmbeddingBag(24, 10, mode="mean", density=0.3),
    "masked_bag_max": lambda: MaskedEmbeddingBag(24, 10, mode="max", density=0.3),
    "low_rank_embedding": lambda: LowRankEmbedding(24, 10, rank=3),
    "low_rank_bag": lambda: LowRankEmbeddingBag(24, 10, rank=3, mode="sum"),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def inputs(layer, samples=4):
    lookup = isinstance(layer, (MaskedEmbedding, MaskedEmbeddingBag, LowRankEmbedding, LowRankEmbeddingBag))
    return torch.randint(0, 24, (samples, 3)) if lookup else torch.randn(samples, 24)


def loss(layer, parameters, input):
    return functional_call(layer, parameters, (input,)).square().sum()


def test_gradients(layer):
    parameters, input = dict(layer.named_parameters()), inputs(layer)
    got = grad(loss, argnums=1)(layer, parameters, input)
    layer(input).square().sum().backward()
    assert all(torch.equal(got[name], own.grad) for name, own in parameters.items())


def test_gradients_of_each_sample(layer):
    parameters, input = dict(layer.named_parameters()), inputs(layer)
    got = vmap(lambda x: grad(loss, argnums=1)(layer, parameters, x[None]))(input)
    for k, sample in enumerate(input):
        layer.zero_grad()
        layer(sample[None]).square().sum().backward()
        for name, own in parameters.items():
            torch.testing.assert_close(got[name][k], own.grad)


def test_ensemble(layer):
    """Several sets of parameters at once."""
    input = inputs(layer)
    sets = {name: torch.stack([own.detach(), 2 * own.detach()]) for name, own in layer.named_parameters()}
    got = vmap(lambda parameters: functional_call(layer, parameters, (input,)))(sets)
    for k in range(2):
        own = functional_call(layer, {name: stacked[k] for name, stacked in sets.items()}, (input,))
        torch.testing.assert_close(got[k], own)


def test_jacobian_of_a_linear_layer():
    layer, input = LAYERS["fan_in"](), torch.randn(24)
    torch.testing.assert_close(jacrev(lambda x: layer(x))(input), layer.dense_weight().detach())


def test_second_and_forward_derivatives_say_that_there_are_none(layer):
    parameters, input = dict(layer.named_parameters()), inputs(layer)

    def norm(parameters):
        return sum(g.square().sum() for g in grad(loss, argnums=1)(layer, parameters, input).values())

    if not isinstance(layer, Sparse24LinearSTE):  # its gradient to the weight is plain torch
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            grad(norm)(parameters)
    with pytest.raises(RuntimeError, match="jvp"):
        jvp(lambda p: functional_call(layer, p, (input,)), (parameters,), (parameters,))
