"""remap_optimizer: groups, state at the kept positions, and what starts anew."""

import pytest
import torch
from torch import nn

from recsparse_kernels import remap_optimizer, swap_modules, unswap_modules
from recsparse_kernels.nn import MaskedLinear

from .layers import Conv1D, HalfEmbedding, HalfLinear, RankLinear, Tower, ids

RULES = {nn.Linear: HalfLinear, nn.Embedding: HalfEmbedding}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(output.square().mean() for output in model(*ids())).backward()
        optimizer.step()


def tensors(state):
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_moves_to_the_kept_positions(make):
    model = Tower()
    optimizer = make(model.parameters())
    train(model, optimizer)
    old = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    report = swap_modules(model, RULES)
    result = remap_optimizer(optimizer, report)
    assert {entry.state for entry in result.entries} == {"carried"}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert all(id(p) in held for p in optimizer.state)
    for key, value in tensors(old["head.weight"]).items():
        new = optimizer.state[model.head.values][key]
        assert torch.equal(new, model.head.pack_state("values", value)) and new.abs().sum() > 0
    for key, value in tensors(old["tables.user.weight"]).items():
        assert torch.equal(optimizer.state[model.tables["user"].values][key], value[:, ::2])
    for key, value in tensors(old["head.bias"]).items():
        assert torch.equal(optimizer.state[model.head.bias][key], value)
    assert optimizer.state[model.head.values].get("step") == old["head.weight"].get("step")
    train(model, optimizer)


def test_training_goes_on_as_masked_dense_training():
    """Packed values with carried state move as dense weights whose gradient is masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.randn(16, 64)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()

    step()
    optimizer.step()
    dense = model[0]
    report = swap_modules(model, RULES)
    mask = model[0].dense_weight().detach() != 0
    reference = nn.Sequential(nn.Linear(64, 64, bias=False))
    reference[0].weight.data = dense.weight.detach() * mask
    follow = torch.optim.Adam(reference.parameters(), lr=0.01)
    follow.state[reference[0].weight] = {
        key: value * mask if value.dim() else value.clone()
        for key, value in optimizer.state[dense.weight].items()
    }
    remap_optimizer(optimizer, report)
    for _ in range(3):
        step()
        optimizer.step()
        follow.zero_grad()
        reference(x).square().mean().backward()
        reference[0].weight.grad *= mask
        follow.step()
    torch.testing.assert_close(model[0].dense_weight(), reference[0].weight * mask)


def test_low_rank_factors_start_anew_and_the_report_says_so():
    for make in OPTIMIZERS.values():
        model = Tower()
        optimizer = make(model.parameters())
        train(model, optimizer)
        result = remap_optimizer(optimizer, swap_modules(model, {"head": RankLinear}))
        states = {entry.name: (entry.state, entry.reason) for entry in result.entries}
        assert (
            states["head.down"] == states["head.up"] == ("fresh", "it has no positions in the dense weight")
        )
        assert states["head.bias"][0] == "carried"
        train(model, optimizer)
        assert "no positions" in str(result)


def test_fresh_adagrad_starts_at_its_initial_value():
    model = Tower()
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    remap_optimizer(optimizer, swap_modules(model, {"head": RankLinear}))
    assert bool((optimizer.state[model.head.down]["sum"] == 0.5).all())


def test_groups_names_and_schedulers_stay():
    model = Tower()
    optimizer = torch.optim.SGD(
        [
            {"params": list(model.tables.named_parameters()), "lr": 1.0},
            {"params": list(model.head.named_parameters()), "lr": 2.0, "weight_decay": 0.1},
        ],
        momentum=0.5,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    report = swap_modules(model, RULES)
    result = remap_optimizer(optimizer, report)
    tables, head = optimizer.param_groups
    assert [id(p) for p in tables["params"]] == [id(p) for p in model.tables.parameters()]
    assert [id(p) for p in head["params"]] == [id(model.head.values), id(model.head.bias)]
    assert head["param_names"] == ["head.values", "head.bias"]
    assert result.left == ["mlp.0", "mlp.2"]  # they were not in this optimizer
    train(model, optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]


def test_frozen_weight_stays_out():
    model = Tower()
    optimizer = torch.optim.Adam([model.head.bias])
    remap_optimizer(optimizer, swap_modules(model, RULES))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model.head.bias)]


def test_tied_parameters_are_placed_once():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    remap_optimizer(optimizer, swap_modules(model, RULES))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_transposed_state_of_conv1d():
    model = nn.Sequential(Conv1D(96, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    report = swap_modules(model, RULES)
    remap_optimizer(optimizer, report)
    packed = optimizer.state[model[0].values]["momentum_buffer"]
    assert torch.equal(packed, model[0].pack_state("values", momentum.t().contiguous()))
    remap_optimizer(optimizer, unswap_modules(model))
    restored = optimizer.state[model[0].weight]["momentum_buffer"]
    assert restored.shape == momentum.shape
    assert torch.equal(restored[restored != 0], momentum[restored != 0])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_there_and_back(make):
    model = Tower()
    optimizer = make(model.parameters())
    train(model, optimizer)
    old = dict(optimizer.state[model.head.weight])
    remap_optimizer(optimizer, swap_modules(model, RULES))
    kept = model.head.dense_weight() != 0
    result = remap_optimizer(optimizer, unswap_modules(model))
    assert {entry.state for entry in result.entries} == {"carried"}
    for key, value in tensors(old).items():
        assert torch.equal(optimizer.state[model.head.weight][key][kept], value[kept])
    train(model, optimizer)


def test_state_of_another_shape_starts_anew():
    """A row-wise optimizer keeps one number a row: no positions for it in packed values."""

    class RowWise(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})
            for p in self.param_groups[0]["params"]:
                self.state[p] = {"step": torch.tensor(3.0), "rows": torch.ones(p.shape[0])}

    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    optimizer = RowWise(model.parameters())
    result = remap_optimizer(optimizer, swap_modules(model, RULES))
    assert result.entries[0].state == "fresh" and "rows has shape (64,)" in result.entries[0].reason
    assert optimizer.state[model[0].values]["step"] == 0


def test_adafactor_between_vectors_and_matrices():
    """It keeps factors of a matrix's state, and the whole of a vector's: neither is the other."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 8))
    optimizer = torch.optim.Adafactor(model.parameters())

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()

    step()
    rules = {nn.Linear: (MaskedLinear, {"density": 0.3})}  # packed values are a vector
    there = remap_optimizer(optimizer, swap_modules(model, rules, min_numel=0))
    step()
    back = remap_optimizer(optimizer, unswap_modules(model))
    for report in (there, back):
        states = {entry.name.rpartition(".")[2]: entry.state for entry in report.entries}
        assert states["bias"] == "carried" and {states.get("values"), states.get("weight")} == {"fresh", None}
    step()
    assert set(optimizer.state[model[0].weight]) == {"step", "row_var", "col_var"}


def test_refusals():
    model = nn.Sequential(nn.Linear(16, 64, bias=False))
    optimizer = torch.optim.Muon(model.parameters())
    before = optimizer.param_groups[0]["params"][:]
    report = swap_modules(model, {nn.Linear: (MaskedLinear, {"density": 0.3})}, min_numel=0)
    with pytest.raises(ValueError, match="Muon takes only matrices, and 0.packed.values has shape"):
        remap_optimizer(optimizer, report)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
    model = Tower()
    report = swap_modules(model, RULES)
    with pytest.raises(ValueError, match="LBFGS keeps one history"):
        remap_optimizer(torch.optim.LBFGS(model.parameters()), report)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer; got Tower"):
        remap_optimizer(model, report)
    with pytest.raises(TypeError, match="report must be what swap_modules returned; got list"):
        remap_optimizer(torch.optim.SGD(model.parameters()), [])
