"""The optimizer step fused into the backward pass, stochastic rounding, and prune and regrow."""

import dataclasses

import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels import ops
from recsparse_kernels.ops import FanInUpdate
from recsparse_kernels.ops import fan_in as fan_in_ops
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.fan_in import make_case

SLOW = ("triton", "cuda")  # interpreted or modelled: small cases
native_only = pytest.mark.skipif(not rk.cpu_levels(), reason="the native library is not built")
OPTIMIZERS = {
    "sgd": (dict(kind="sgd", lr=0.3), torch.optim.SGD),
    "sgd with decay": (dict(kind="sgd", lr=0.3, weight_decay=0.1), torch.optim.SGD),
    "momentum": (dict(kind="sgd", lr=0.3, momentum=0.9, weight_decay=0.1), torch.optim.SGD),
    "adam": (dict(kind="adam", lr=0.01, betas=(0.8, 0.95), weight_decay=0.1), torch.optim.Adam),
    "adamw": (dict(kind="adamw", lr=0.01, eps=1e-6, weight_decay=0.1), torch.optim.AdamW),
}


def copy_of(case):
    return dataclasses.replace(
        case, weight=case.weight.clone(), bias=case.bias.clone(), indices=case.indices.clone()
    )


# ---- fused update ----


@pytest.mark.parametrize("backend", backends("fan_in_loss_step"), indirect=True)
@pytest.mark.parametrize("group_size", [1, 16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_equals_torch_optim(name, group_size, backend):
    """Three steps through the loss, one through the linear, against torch.optim in float64."""
    options, torch_optimizer = OPTIMIZERS[name]
    shape = (21, 40, 150, 11) if backend not in SLOW else (5, 12, 70, 7)  # the interpreter is slow
    results = []
    for dtype in (torch.float64, torch.float32):
        case = make_case(*shape, group_size)
        case = case.double() if dtype == torch.float64 else case
        parameters = [p.requires_grad_() for p in (case.weight, case.bias)]
        optimizer = torch_optimizer(parameters, **{k: v for k, v in options.items() if k != "kind"})
        for step in range(4):
            optimizer.zero_grad()
            if step < 3:
                loss = ops.fan_in_loss(
                    *case.layer, *case.positives, reduction="batchmean", group_size=group_size
                )
            else:
                loss = ops.fan_in_linear(*case.layer, group_size=group_size).square().mean()
            loss.backward()
            optimizer.step()
        results.append([loss.detach(), *(p.detach() for p in parameters)])
    case, update = make_case(*shape, group_size), FanInUpdate(**options)
    for step in range(3):
        options_of_loss = dict(reduction="batchmean", group_size=group_size, backend=backend)
        if step % 2:
            ops.fan_in_loss_step(*case.layer, *case.positives, update, **options_of_loss)
        else:
            weight = case.weight.requires_grad_()
            loss = ops.fan_in_loss(*case.layer, *case.positives, update=update, **options_of_loss)
            loss.backward()
            assert weight.grad is None
            case.weight.requires_grad_(False)
    output = ops.fan_in_linear(*case.layer, group_size=group_size, backend=backend)
    loss = output.square().mean()
    ops.fan_in_linear_update(
        2 * output / output.numel(), *case.layer, update, group_size=group_size, backend=backend
    )
    assert update.step == 4
    ours = (loss, case.weight, case.bias)
    for what, actual, exact, baseline in zip(("loss", "weight", "bias"), ours, *results, strict=True):
        assert_close(what, actual, exact, baseline, factor=4)  # four steps' rounding add up


@pytest.mark.parametrize("backend", backends("fan_in_loss_step"), indirect=True)
def test_fused_gradient_to_the_input(backend):
    case = make_case(21, 40, 150, 11)
    plain = case.input.clone().requires_grad_()
    loss = ops.fan_in_loss(plain, *case.layer[1:], *case.positives, backend=backend)
    (wanted,) = torch.autograd.grad(3 * loss, plain)
    for form in ("backward", "step"):
        fresh = copy_of(case)
        x, update = case.input.clone().requires_grad_(), FanInUpdate("sgd", lr=0.1)
        if form == "backward":
            fused = ops.fan_in_loss(x, *fresh.layer[1:], *case.positives, update=update, backend=backend)
            assert torch.equal(fresh.weight, case.weight)  # nothing happens before backward
            (3 * fused).backward()
            actual = x.grad
        else:
            fused, grad = ops.fan_in_loss_step(
                x.detach(), *fresh.layer[1:], *case.positives, update, backend=backend
            )
            actual = 3 * grad
        torch.testing.assert_close(fused, loss)
        torch.testing.assert_close(actual, wanted)
        assert not torch.equal(fresh.weight, case.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|second time"):
        loss = ops.fan_in_loss(x, *fresh.layer[1:], *case.positives, update=update, backend=backend)
        loss.backward(retain_graph=True)
        loss.backward()


@pytest.mark.parametrize("backend", backends("fan_in_loss_step"), indirect=True)
def test_stochastic_rounding(backend):
    """Unbiased, one of the two neighbours, and a function of seed, step and element alone."""
    count = 500 if backend in SLOW else 4000  # the interpreter is slow
    case = make_case(1, 8, count, 8)
    weight = torch.full((count, 8), 1.0 + 2**-7 * 0.25).bfloat16()  # 1.0
    grad = torch.ones(1, count).bfloat16()
    x = torch.ones(1, 8).bfloat16()

    def run(seed, labels=count):
        w, b = weight[:labels].clone(), torch.ones(labels).bfloat16()
        update = FanInUpdate("sgd", lr=0.25 * 2**-8, stochastic_rounding=True, seed=seed)
        ops.fan_in_linear_update(grad[:, :labels], x, w, case.indices[:labels], b, update, backend=backend)
        return w, b

    w, b = run(seed=1)
    assert set(w.flatten().tolist()) == {1.0, 1.0 - 2**-8}
    for rounded in (w, b):  # wanted 1/4, within five standard deviations
        share = (rounded < 1).float().mean().item()
        assert abs(share - 0.25) < 5 * (0.25 * 0.75 / rounded.numel()) ** 0.5
    assert torch.equal(w, run(seed=1)[0]) and not torch.equal(w, run(seed=2)[0])
    assert torch.equal(run(seed=1, labels=count // 4)[0], w[: count // 4])
    nearest = weight.clone()
    ops.fan_in_linear_update(
        grad,
        x,
        nearest,
        case.indices,
        torch.ones(count).bfloat16(),
        FanInUpdate("sgd", lr=0.25 * 2**-8),
        backend=backend,
    )
    assert torch.equal(nearest, weight)  # rounding to nearest loses the step


@native_only
def test_stochastic_rounding_bits_equal_the_reference():
    case = make_case(4, 30, 300, 9, dtype=torch.bfloat16)
    results = []
    for backend in ("native", "reference"):
        c, update = (
            copy_of(case),
            FanInUpdate("sgd", lr=0.0, weight_decay=0.0, stochastic_rounding=True, seed=3),
        )
        values = torch.linspace(-3, 3, 2700).view(300, 9)
        update.lr = 1.0  # w - (w - values), exact where the gradient of a single row is w - values
        c.weight.zero_()
        grad = torch.zeros(4, 300, dtype=torch.bfloat16)
        grad[0] = -values[:, 0].bfloat16()
        c.input.zero_()
        c.input[0] = torch.linspace(0.3, 1.7, 30).bfloat16()
        ops.fan_in_linear_update(grad, *c.layer, update, backend=backend)
        results.append(c.weight)
    assert torch.equal(*results)  # one product each: the same float32, so the same bits


@native_only
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_same_for_any_number_of_threads(name):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            case, update = (
                make_case(40, 60, 3000, 10, 4, dtype=torch.bfloat16),
                FanInUpdate(**OPTIMIZERS[name][0]),
            )
            update.stochastic_rounding = True
            for _ in range(2):
                out = ops.fan_in_loss_step(*case.layer, *case.positives, update, group_size=4)
            results.append([*out, case.weight, case.bias, *update.state])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", backends("fan_in_loss_step"), indirect=True)
def test_failed_update_changes_nothing(backend):
    case = make_case(5, 10, 200, 4)
    update = FanInUpdate("adam", lr=0.1)
    ops.fan_in_loss_step(*case.layer, *case.positives, update, backend=backend)
    kept = copy_of(case)
    moments = [m.clone() for m in update.state]
    bad_labels = case.labels.clone()
    bad_labels[-1] = 200
    with pytest.raises(IndexError, match="labels"):
        ops.fan_in_loss_step(*case.layer, case.offsets, bad_labels, update, backend=backend)
    case.indices[199, 3] = 10
    with pytest.raises(IndexError, match="indices"):
        ops.fan_in_loss_step(*case.layer, *case.positives, update, backend=backend)
    with pytest.raises(IndexError, match="indices"):
        ops.fan_in_linear_update(torch.ones(5, 200), *case.layer, update, backend=backend)
    with pytest.raises(IndexError, match="indices"):
        ops.fan_in_rewire(
            case.weight, case.indices, 10, fraction=0.5, state=update.weight_state(), backend=backend
        )
    assert torch.equal(case.weight, kept.weight) and torch.equal(case.bias, kept.bias) and update.step == 1
    assert all(torch.equal(a, b) for a, b in zip(moments, update.state, strict=True))


def test_update_errors():
    case = make_case(5, 10, 20, 4)
    with pytest.raises(ValueError, match="kind must be one of 'sgd', 'adam', 'adamw'; got 'lamb'"):
        FanInUpdate("lamb")
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\); got 1.5"):
        FanInUpdate("sgd", momentum=1.5)
    with pytest.raises(ValueError, match="momentum belongs to 'sgd'"):
        FanInUpdate("adam", momentum=0.9)
    with pytest.raises(ValueError, match="lr must not be negative; got -1"):
        FanInUpdate("adam", lr=-1)
    with pytest.raises(TypeError, match="stochastic_rounding needs a bfloat16 weight"):
        ops.fan_in_loss_step(*case.layer, *case.positives, FanInUpdate("sgd", stochastic_rounding=True))
    strided = torch.stack([case.weight, case.weight], 2)[:, :, 0]
    with pytest.raises(ValueError, match="weight is updated in place and must be contiguous"):
        ops.fan_in_loss_step(case.input, strided, case.indices, case.bias, *case.positives, FanInUpdate())
    update = FanInUpdate("adam", state=[torch.zeros(20, 4)])
    with pytest.raises(ValueError, match="state must have shapes"):
        ops.fan_in_loss_step(*case.layer, *case.positives, update)


# ---- prune and regrow ----


def group_scores(weight, rows, group_size):
    padded = torch.cat(
        [weight, torch.full((rows * group_size - weight.shape[0], weight.shape[1]), float("nan"))]
    )
    return padded.double().square().view(rows, group_size, -1).nanmean(1).sqrt().float()


REWIRE_CASES = {
    "threshold": dict(threshold=0.1),
    "fraction": dict(fraction=0.3),
    "all": dict(fraction=1.0),
    "none": dict(fraction=0.0),
    "row": dict(fraction=0.25, scope="row"),
    "random init": dict(fraction=0.4, init_scale=0.2),
    "duplicates": dict(fraction=0.4, allow_duplicates=True),
}


REWIRE_LAYERS = [
    pytest.param(group_size, dtype, backend, id=f"{backend}-{dtype}-{group_size}")
    for backend in backends("fan_in_rewire")
    for dtype in (torch.float32, torch.bfloat16)
    for group_size in (1, 3, 16)
    if backend not in SLOW or (group_size, dtype) in {(3, torch.float32), (16, torch.bfloat16)}
]


@pytest.mark.parametrize("group_size, dtype, backend", REWIRE_LAYERS, indirect=["backend"])
@pytest.mark.parametrize("name", REWIRE_CASES)
def test_rewire(name, group_size, dtype, backend):
    options = REWIRE_CASES[name]
    labels = 20 if backend in SLOW else 100  # a program for each row of indices: the interpreter is slow
    case = make_case(1, 30, labels, 12, group_size, dtype=dtype, duplicates=False)
    case.weight[::2, ::3] = 0  # many equal scores
    before, moments = copy_of(case), torch.ones(labels, 12)
    rows = case.indices.shape[0]
    count = ops.fan_in_rewire(
        case.weight,
        case.indices,
        30,
        state=[moments],
        group_size=group_size,
        seed=11,
        backend=backend,
        **options,
    )
    dropped = (moments == 0)[::group_size]
    mask = dropped.repeat_interleave(group_size, 0)[:labels]
    assert torch.equal(moments == 0, mask) and int(count) == int(dropped.sum())
    scores = group_scores(before.weight.float(), rows, group_size)
    if name == "threshold":
        assert torch.equal(dropped, scores < 0.1)
    elif name == "row":
        assert (dropped.sum(1) == 3).all()
        assert (scores.masked_fill(~dropped, 0).amax(1) <= scores.masked_fill(dropped, 9).amin(1)).all()
    else:
        assert int(count) == int(options["fraction"] * rows * 12 + 0.5)
        if 0 < int(count) < rows * 12:
            assert scores[dropped].max() <= scores[~dropped].min()
    assert torch.equal(case.weight[~mask], before.weight[~mask])
    assert torch.equal(case.indices[~dropped], before.indices[~dropped])
    assert ((0 <= case.indices) & (case.indices < 30)).all()
    if name == "random init":
        grown = case.weight[mask].float()
        assert (
            grown.abs().max() <= 0.2
            and (grown != 0).all()
            and abs(grown.mean()) < (0.05 if labels == 100 else 0.15)
        )
    else:
        assert (case.weight[mask] == 0).all()
    if name != "duplicates":
        assert all(len(set(row)) == 12 for row in case.indices.tolist())


@native_only
@pytest.mark.parametrize("options", REWIRE_CASES.values(), ids=REWIRE_CASES)
@pytest.mark.parametrize(
    "shape", [(1000, 12, 40, 1), (1000, 12, 12, 7), (70, 5, 2000, 64), (0, 3, 9, 1)], ids=str
)
def test_rewire_equals_the_reference(shape, options):
    """Bit for bit, for any number of threads; F = I leaves one choice, after the rounds of draws."""
    out_features, fan_in, in_features, group_size = shape
    case = make_case(1, in_features, out_features, fan_in, group_size, duplicates=False)
    case.weight[::2] = 0
    before, results = torch.get_num_threads(), []
    try:
        for backend, threads in (("reference", 1), ("native", 1), ("native", 3)):
            torch.set_num_threads(threads)
            c = copy_of(case)
            count = ops.fan_in_rewire(
                c.weight, c.indices, in_features, group_size=group_size, seed=5, backend=backend, **options
            )
            results.append((count, c.weight, c.indices))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", [b for b in SLOW if b in backends("fan_in_rewire")])
@pytest.mark.parametrize("name", ["threshold", "layer", "row", "duplicates"])
@pytest.mark.parametrize(
    "shape", [(6, 12, 12, 1), (40, 12, 40, 7), (2, 140, 150, 1), (0, 3, 9, 1), (5, 0, 4, 1)], ids=str
)
def test_rewire_on_a_gpu_equals_the_reference(shape, name, backend):
    """As above, with moments and on small cases; F past a block of threads."""
    options = {
        "threshold": dict(threshold=0.1),
        "layer": dict(fraction=0.3, init_scale=0.2),
        "row": dict(fraction=1.0, scope="row"),
        "duplicates": dict(fraction=0.4, allow_duplicates=True),
    }[name]
    out_features, fan_in, in_features, group_size = shape
    case = make_case(1, in_features, out_features, fan_in, group_size, duplicates=False)
    case.weight[::2] = 0  # ties
    results = []
    for each in ("reference", backend):
        weight, indices = case.weight.clone(), case.indices.clone()
        state = [torch.ones(out_features, fan_in), torch.ones(out_features, fan_in).double()]
        count = ops.fan_in_rewire(
            weight, indices, in_features,
            group_size=group_size, state=state, seed=-5, backend=each, **options,
        )  # fmt: skip
        results.append((count, weight, indices, *state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@native_only
def test_rewire_of_a_layer_of_several_slabs():
    """More than 2^20 connections: the count is exact across slabs, ties at the limit included."""
    weight = torch.zeros(70_000, 32)
    weight[:, :16] = torch.randn(70_000, 16).abs() + 1
    indices = torch.arange(32, dtype=torch.int16).repeat(70_000, 1)
    kept = weight.clone()
    count = ops.fan_in_rewire(weight, indices, 100, fraction=0.2, seed=1, init_scale=1.0)
    assert int(count) == 448_000
    changed = weight != kept
    assert int(changed.sum()) == 448_000 and not changed[:, :16].any()
    share = changed[:, 16:].float().mean(1)  # of the ties, spread evenly: 0.4
    assert abs(share[:35_000].mean() - share[35_000:].mean()) < 0.01
    drawn = torch.bincount(indices[changed].long(), minlength=100).double()
    free = drawn[32:]  # columns 32.. are free in every row
    assert (free / free.mean() - 1).abs().max() < 0.06  # about 6,000 draws each: standard deviation 0.013


@pytest.mark.parametrize("backend", backends("fan_in_rewire"), indirect=True)
def test_rewire_keeps_nan_and_seeds_differ(backend):
    case = make_case(1, 40, 12 if backend in SLOW else 50, 6, duplicates=False)
    case.weight[3, 2], case.weight[4, 1] = float("nan"), float("inf")
    results = []
    for seed in (1, 1, 2):
        c = copy_of(case)
        ops.fan_in_rewire(c.weight, c.indices, 40, fraction=0.9, seed=seed, backend=backend)
        results.append(c.indices)
        assert c.weight[3, 2].isnan() and c.weight[4, 1].isinf()
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_rewire_errors():
    case = make_case(1, 10, 20, 4)
    with pytest.raises(ValueError, match="give either threshold or fraction"):
        ops.fan_in_rewire(case.weight, case.indices, 10)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]; got 1.5"):
        ops.fan_in_rewire(case.weight, case.indices, 10, fraction=1.5)
    with pytest.raises(ValueError, match="scope must be one of 'layer', 'row'; got 'group'"):
        ops.fan_in_rewire(case.weight, case.indices, 10, fraction=0.5, scope="group")
    with pytest.raises(
        ValueError, match="a row of 4 distinct indices needs as many inputs; in_features is 3"
    ):
        ops.fan_in_rewire(case.weight, case.indices % 3, 3, fraction=0.5)
    with pytest.raises(ValueError, match="in_features 40000 does not fit indices of torch.int16"):
        ops.fan_in_rewire(case.weight, case.indices, 40000, fraction=0.5)
    with pytest.raises(ValueError, match=r"state\[0\] must have shape \[O, F\] = \(20, 4\); got \(20, 3\)"):
        ops.fan_in_rewire(case.weight, case.indices, 10, fraction=0.5, state=[torch.zeros(20, 3)])
    with pytest.raises(ValueError, match="indices is changed in place and must be contiguous"):
        ops.fan_in_rewire(case.weight, case.indices.repeat(1, 2)[:, ::2], 10, fraction=0.5)


def test_every_op_is_native():
    """No op of the family is left to the reference where the library is there."""
    if not rk.cpu_levels():
        pytest.skip("the native library is not built")
    names = [name for name in vars(fan_in_ops.reference) if name.startswith("fan_in_")]
    assert len(names) == 12
    assert all("native" in rk.ops._backend.OPS[name].backends() for name in names)
