"""swap_modules and unswap_modules: which layers, what stays as it was, what the report says."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import recsparse_kernels as rk
from recsparse_kernels import swap_modules, unswap_modules
from recsparse_kernels.swap_report import layer_bytes

from .layers import HalfEmbedding, HalfLinear, RankLinear, Tower, ids

LINEAR = {nn.Linear: HalfLinear}


def reasons(report):
    return {entry.name: entry.reason for entry in report.left}


def fingerprint(model):
    """Everything a failed swap must leave alone: objects, hooks, flags, numbers."""
    modules = {
        name: (
            id(m),
            m.training,
            {k: [id(h) for h in v.values()] for k, v in vars(m).items() if "hook" in k and v},
        )
        for name, m in model.named_modules()
    }
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, {k: v[:2] for k, v in parameters.items()}, {k: v[2] for k, v in parameters.items()}


def assert_untouched(model, before):
    modules, parameters, numbers = fingerprint(model)
    assert (modules, parameters) == before[:2]
    for name, value in numbers.items():
        assert torch.equal(value, before[2][name]), name


# -- which layers ---------------------------------------------------------------------------------------


def test_rules_by_type_and_name():
    model = Tower()
    report = swap_modules(
        model, {"head": (RankLinear, {"rank": 4}), nn.Linear: HalfLinear, "tables.u*": HalfEmbedding}
    )
    assert report.names == ["tables.user", "mlp.0", "mlp.2", "head"]
    assert type(model.head) is RankLinear and model.head.down.shape == (4, 64)
    assert type(model.mlp[0]) is HalfLinear and type(model.tables["user"]) is HalfEmbedding
    assert reasons(report)["tables.item"] == "no rule matches it"
    assert reasons(report)["click"].startswith("64 weights, fewer than min_numel=4096")


def test_first_matching_rule_counts():
    model = Tower()
    swap_modules(model, {nn.Linear: HalfLinear, "head": RankLinear})
    assert type(model.head) is HalfLinear


@pytest.mark.parametrize(
    "converter",
    [
        (RankLinear, {"rank": 3}),
        functools.partial(RankLinear, rank=3),
        functools.partial(RankLinear.from_dense, rank=3),
        lambda module: RankLinear.from_dense(module, rank=3),
    ],
    ids=["pair", "partial class", "partial from_dense", "callable"],
)
def test_forms_of_a_converter(converter):
    model = Tower()
    swap_modules(model, {"head": converter})
    assert model.head.down.shape == (3, 64)


def test_callable_rule_sees_module_and_name():
    model = Tower()
    report = swap_modules(
        model,
        lambda m, name: HalfLinear.from_dense(m) if isinstance(m, nn.Linear) and "mlp" in name else None,
    )
    assert report.names == ["mlp.0", "mlp.2"]
    assert reasons(report)["head"] == "the rule returned None"


def test_include_exclude_min_numel():
    model = Tower()
    report = swap_modules(model, LINEAR, include="mlp.*", exclude=["*.2"])
    assert report.names == ["mlp.0"]
    assert reasons(report)["head"] == "not included"
    assert reasons(report)["mlp.2"] == "excluded as mlp.2"
    report = swap_modules(model, LINEAR, min_numel=0)
    assert set(report.names) == {"mlp.2", "head", "click"}


def test_one_wide_layers_are_left_alone():
    model = nn.Sequential(nn.Embedding(10_000, 1), nn.Linear(10_000, 1))
    report = swap_modules(model, {nn.Embedding: HalfEmbedding, nn.Linear: HalfLinear})
    assert not report and all("1-wide" in reason for reason in reasons(report).values())


def test_unmatched_rule_is_reported():
    report = swap_modules(Tower(), {"towr.*": HalfLinear, nn.EmbeddingBag: HalfEmbedding})
    assert report.unmatched_rules == ["'towr.*'", "EmbeddingBag"]
    assert "rule 'towr.*' matched no layer" in str(report)


def test_second_swap_leaves_packed_layers():
    model = Tower()
    swap_modules(model, LINEAR)
    report = swap_modules(model, LINEAR)
    assert not report and reasons(report)["mlp.0"] == "is packed already"


# -- the result -----------------------------------------------------------------------------------------


def test_output_is_that_of_the_dense_view():
    model, twin = Tower(), None
    swap_modules(model, LINEAR)
    twin = copy.deepcopy(model)
    unswap_modules(twin)
    assert not any(isinstance(m, HalfLinear) for m in twin.modules())
    for ours, dense in zip(model(*ids()), twin(*ids()), strict=True):
        torch.testing.assert_close(ours, dense)


def test_bytes():
    model = Tower()
    before = layer_bytes(model)
    report = swap_modules(model, {"head": HalfLinear})
    assert report.bytes_before == 4 * (64 * 100 + 100)
    assert report.bytes_after == 4 * (32 * 100 + 100) + 32 * 100
    assert report.model_bytes_before == before
    assert report.model_bytes_after == layer_bytes(model) == before - report.bytes_before + report.bytes_after


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")], ids=str)
def test_flags_device_dtype(training, frozen):
    model = Tower().to(torch.bfloat16).train(training)
    for name in frozen:
        getattr(model.head, name).requires_grad_(False)
    swap_modules(model, LINEAR)
    head = model.head
    assert head.training is training and head.values.dtype == torch.bfloat16
    assert head.values.requires_grad is ("weight" not in frozen)
    assert head.bias.requires_grad is ("bias" not in frozen)
    unswap_modules(model)
    assert model.head.weight.requires_grad is ("weight" not in frozen)
    assert model.head.training is training and model.head.weight.dtype == torch.bfloat16


def test_meta_device():
    model = Tower().to("meta")
    swap_modules(model, lambda m, name: HalfLinear(m.in_features, m.out_features) if name == "head" else None)
    assert model.head.values.device.type == "meta"


def test_hooks_move_and_their_handles_work():
    model, calls = Tower(), []
    forward = model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    swap_modules(model, LINEAR)
    model(*ids())[0].sum().backward()
    assert calls == ["pre", "forward", "backward"]
    forward.remove()
    calls.clear()
    model(*ids())
    assert calls == ["pre"]
    unswap_modules(model)
    calls.clear()
    model(*ids())
    assert calls == ["pre"]


def test_pickle_and_deepcopy_after_swap():
    model = Tower()
    swap_modules(model, LINEAR)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        unswap_modules(twin)
        assert type(twin.head) is nn.Linear


def test_training_after_swap():
    model = Tower()
    swap_modules(model, LINEAR)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.head.values.detach().clone()
    model(*ids())[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.values)


def test_dry_run_changes_nothing_and_knows_the_bytes():
    model = Tower()
    before = fingerprint(model)
    planned = swap_modules(model, LINEAR, dry_run=True)
    assert_untouched(model, before)
    done = swap_modules(model, LINEAR)
    assert planned.swapped == done.swapped and planned.model_bytes_after == done.model_bytes_after
    assert "would swap" in str(planned)


def test_report_prints():
    report = swap_modules(Tower(), LINEAR)
    text = str(report)
    for wanted in ("3 layers swapped", "mlp.0", "Linear -> HalfLinear", "left alone", "no rule matches it"):
        assert wanted in text
    report.show()
    assert bool(report) and not bool(swap_modules(Tower(), {}))


def test_rich_draws_the_report():
    console = pytest.importorskip("rich.console").Console(width=200, record=True, quiet=False)
    for table in swap_modules(Tower(), LINEAR).tables():
        console.print(table)
    assert "HalfLinear" in console.export_text()


# -- all or nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("form", ["mapping", "callable"])
def test_a_failing_converter_leaves_the_model_as_it_was(failing, form):
    model = Tower().eval()
    model.mlp[0].register_forward_hook(lambda *_: None)
    model.head.weight.requires_grad_(False)
    before, count = fingerprint(model), iter(range(10))

    def convert(module, name=None):
        if next(count) == failing:
            raise ArithmeticError("no")
        return HalfLinear.from_dense(module)

    rules = {nn.Linear: convert}
    if form == "callable":
        rules = lambda m, name: convert(m) if isinstance(m, nn.Linear) else None  # noqa: E731
    with pytest.raises(ArithmeticError) as error:
        swap_modules(model, rules)
    if hasattr(error.value, "__notes__"):
        assert error.value.__notes__ == [
            f"while converting {['mlp.0', 'mlp.2', 'head'][failing]!r}; the model is as it was"
        ]
    assert_untouched(model, before)


def test_a_failing_unswap_leaves_the_model_as_it_was(monkeypatch):
    model = Tower()
    swap_modules(model, {nn.Linear: HalfLinear, "tables.*": HalfEmbedding})
    before = fingerprint(model)

    def fail(self):
        raise MemoryError

    monkeypatch.setattr(HalfLinear, "_empty_dense", fail)
    with pytest.raises(MemoryError):
        unswap_modules(model)
    assert_untouched(model, before)


def test_converter_must_return_a_module():
    model = Tower()
    before = fingerprint(model)
    with pytest.raises(TypeError, match="converter of 'mlp.0' must return a module or None; got int"):
        swap_modules(model, {nn.Linear: lambda module: 3})
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("model", LINEAR), TypeError, "model must be a torch.nn.Module; got str"),
        (
            (nn.ReLU(), [HalfLinear]),
            TypeError,
            r"rules must be a mapping or callable\(module, name\); got list",
        ),
        ((nn.ReLU(), {3: HalfLinear}), TypeError, "keyed by name pattern or module type; got 3"),
        ((nn.ReLU(), {"a": 3}), TypeError, "a converter must be a packed layer class"),
        ((nn.ReLU(), {"a": nn.Linear}), TypeError, "must be a PackedModule; got Linear"),
        ((nn.Linear(64, 64), LINEAR), ValueError, "model is itself a Linear"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        swap_modules(*arguments)


def test_bad_options():
    with pytest.raises(ValueError, match="min_numel must be an int >= 0 or None; got -1"):
        swap_modules(Tower(), LINEAR, min_numel=-1)
    with pytest.raises(TypeError, match="include must be name patterns; got 3"):
        swap_modules(Tower(), LINEAR, include=[3])
    with pytest.raises(TypeError, match="report must be what swap_modules returned; got dict"):
        unswap_modules(Tower(), {})


# -- shared layers and tied weights ---------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Sequential(nn.ReLU(), self.first)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_layer_registered_twice_is_swapped_once():
    model = Shared()
    report = swap_modules(model, LINEAR)
    assert model.first is model.second[1] and type(model.first) is HalfLinear
    assert report.names == ["first"] and report.swapped[0].aliases == ("second.1",)
    unswap_modules(model)
    assert model.first is model.second[1] and type(model.first) is nn.Linear


def test_a_shared_layer_excluded_under_one_name_is_left():
    report = swap_modules(Shared(), LINEAR, exclude="second.*")
    assert not report and reasons(report)["first"] == "excluded as second.1"


class Tied(nn.Module):
    def __init__(self, tie_bias=False):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight
        if tie_bias:
            self.b.bias = self.a.bias


@pytest.mark.parametrize("tie_bias", [True, False])
def test_tied_weights_stay_tied(tie_bias):
    model = Tied(tie_bias)
    report = swap_modules(model, LINEAR)
    assert len(report.swapped) == 2
    assert model.a.values is model.b.values and model.a.second is model.b.second
    assert (model.a.bias is model.b.bias) is tie_bias
    unswap_modules(model)
    assert model.a.weight is model.b.weight
    assert (model.a.bias is model.b.bias) is tie_bias


def test_a_tie_that_would_break_is_left():
    model = nn.ModuleDict({"embedding": nn.Embedding(100, 64), "output": nn.Linear(64, 100, bias=False)})
    model["output"].weight = model["embedding"].weight
    report = swap_modules(model, {nn.Embedding: HalfEmbedding, nn.Linear: HalfLinear})
    assert not report and model["output"].weight is model["embedding"].weight
    assert "tied to output" in reasons(report)["embedding"]
    # one of the two alone would break it as well
    report = swap_modules(model, LINEAR)
    assert not report and "tied to embedding" in reasons(report)["output"]


def test_tie_between_views_of_one_storage():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Embedding(64, 64)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())  # another Parameter, the same memory
    assert not swap_modules(model, LINEAR)


def test_ties_whose_replacements_differ_are_left():
    count = iter(range(10))

    def convert(module):  # not the same for the same weight
        new = HalfLinear.from_dense(module)
        new.values.data += next(count)
        return new

    model = Tied()
    report = swap_modules(model, {nn.Linear: convert})
    assert not report and type(model.a) is nn.Linear and model.a.weight is model.b.weight
    assert any("their replacements differ in values" in reason for reason in reasons(report).values())


def test_a_cycle_of_modules_is_survived():
    model = Tower()
    model.head.__dict__["_modules"]["parent"] = model
    assert "mlp.0" in swap_modules(model, LINEAR, include="mlp.*").names


# -- layers that must not be replaced -------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that changes nothing of the computation."""


def test_forward_of_its_own_is_left():
    model = nn.Sequential(Scaled(64, 64), nn.Linear(64, 64))
    model[1].forward = lambda x: x
    report = swap_modules(model, LINEAR)
    assert not report and all("forward of its own" in reason for reason in reasons(report).values())


def test_subclass_is_swapped_and_its_class_restored():
    model = nn.Sequential(Renamed(64, 64))
    model[0].tag = "kept"
    weight = HalfLinear.from_dense(model[0]).dense_weight()
    swap_modules(model, LINEAR)
    assert type(model[0]) is HalfLinear
    unswap_modules(model)
    assert type(model[0]) is Renamed and model[0].tag == "kept" and torch.equal(model[0].weight, weight)


def test_state_beyond_weight_and_bias_is_left():
    model = nn.Sequential(Renamed(64, 64))
    model[0].register_buffer("scale", torch.ones(1))
    assert "holds scale beyond weight and bias" in reasons(swap_modules(model, LINEAR))["0"]


def test_attention_output_is_left():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    report = swap_modules(model, LINEAR)
    assert set(report.names) == {"linear1", "linear2"}
    assert "MultiheadAttention reads its weight" in reasons(report)["self_attn.out_proj"]
    model.eval()
    x = torch.randn(2, 5, 64)
    dense = copy.deepcopy(model)
    unswap_modules(dense)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-4)


def test_lazy_layer_is_left():
    report = swap_modules(nn.Sequential(nn.LazyLinear(64)), LINEAR)
    assert "no shape yet" in reasons(report)["0"]


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layer_is_left(wrap):
    report = swap_modules(nn.Sequential(wrap(nn.Linear(64, 64))), LINEAR)
    assert "parametrized: call parametrize.remove_parametrizations first" in reasons(report)["0"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_is_left():
    report = swap_modules(nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 64))), LINEAR)
    assert "is under WeightNorm" in reasons(report)["0"]


def test_integer_and_subclass_weights_are_left():
    class Odd(torch.Tensor):
        pass

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight = nn.Parameter(torch.randn(64, 64).as_subclass(Odd))
    model[1].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    report = swap_modules(model, LINEAR)
    assert not report and "not a plain tensor" in reasons(report)["0"] and "int8" in reasons(report)["1"]


def test_pruning_mask_is_taken_over():
    model = nn.Sequential(nn.Linear(64, 64))
    mask = torch.zeros(64, 64)
    mask[:, 1::2] = 1  # not the larger ones
    prune.custom_from_mask(model[0], "weight", mask)
    calls = []
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 64)
    wanted = model(x)
    report = swap_modules(model, LINEAR)
    assert report.swapped[0].note == "pruning mask taken over"
    torch.testing.assert_close(model(x), wanted)
    assert len(calls) == 2
    unswap_modules(model)
    torch.testing.assert_close(model(x), wanted)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]


def test_pruning_mask_that_does_not_fit_is_left():
    model = nn.Sequential(nn.Linear(64, 64))
    prune.random_unstructured(model[0], "weight", 0.9)
    report = swap_modules(model, LINEAR)
    assert (
        not report
        and reasons(report)["0"] == "its pruning mask does not fit: mask must keep one of each pair"
    )


# -- wrapped models -------------------------------------------------------------------------------------


def test_compiled_model_runs_the_new_layers():
    model = Tower()
    compiled = torch.compile(model, backend="eager")
    compiled(*ids())
    report = swap_modules(compiled, LINEAR)
    assert report.names == ["mlp.0", "mlp.2", "head"]
    for ours, eager in zip(compiled(*ids()), model(*ids()), strict=True):
        torch.testing.assert_close(ours, eager)
    dense = copy.deepcopy(model)
    unswap_modules(dense)
    torch.testing.assert_close(compiled(*ids())[0], dense(*ids())[0])


def test_layer_compiled_by_itself_is_left():
    model = Tower()
    model.head = torch.compile(model.head)
    model.mlp[0].compile()
    report = swap_modules(model, LINEAR)
    assert report.names == ["mlp.2"]
    assert (
        "compiled by itself" in reasons(report)["head"] and "compiled by itself" in reasons(report)["mlp.0"]
    )


def test_data_parallel_is_looked_into():
    model = nn.DataParallel(Tower())
    assert swap_modules(model, LINEAR).names == ["mlp.0", "mlp.2", "head"]


def test_distributed_data_parallel_is_refused(tmp_path):
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch has no distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Tower())
        with pytest.raises(ValueError, match="change the layers of the plain model first, then wrap it"):
            swap_modules(model, LINEAR)
        assert swap_modules(model.module, LINEAR, dry_run=True)
    finally:
        distributed.destroy_process_group()


# -- stale references -----------------------------------------------------------------------------------


class Regularised(Tower):
    """Keeps its parameters in a list from the constructor on, as deepctr-torch does."""

    def __init__(self):
        super().__init__()
        self.regularization_weight = [(list(self.tables.parameters()), 0.0, 1e-5), ([self.head.weight], 0, 0)]
        self.layers = [self.mlp[0]]  # a plain list: not registered
        self.optim = torch.optim.Adam(self.parameters())
        self.callbacks = {"norm": lambda weight=self.head.weight: weight.norm()}


def test_stale_references_are_found():
    model = Regularised()
    report = swap_modules(model, {nn.Linear: HalfLinear, nn.Embedding: HalfEmbedding})
    found = {str(reference) for reference in report.stale}
    assert "model.regularization_weight[0][0][0] holds the old tables.user.weight" in found
    assert "model.regularization_weight[1][0][0] holds the old head.weight" in found
    assert "model.layers[0] holds the old mlp.0" in found
    assert "model.optim.param_groups[0]['params'][0] holds the old tables.user.weight" in found
    assert "model.callbacks['norm'].__defaults__[0] holds the old head.weight" in found
    assert not any("click" in text for text in found)  # not replaced
    assert "stale: model.layers[0]" in str(report)


def test_stale_references_of_a_given_optimizer():
    model = Tower()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1.0)
    report = swap_modules(model, LINEAR, optimizer=optimizer)
    assert [str(reference) for reference in report.stale] == [
        "optimizer.param_groups[0]['params'][0] holds the old head.weight",
        "optimizer.param_groups[0]['params'][1] holds the old head.bias",
    ]


def test_no_stale_references_in_a_clean_model():
    assert swap_modules(Tower(), LINEAR).stale == []


def test_the_report_does_not_keep_the_dense_weights():
    import gc
    import weakref

    model = Tower()
    old = weakref.ref(model.head.weight)
    report = swap_modules(model, LINEAR)
    gc.collect()
    assert report.names and old() is None


# -- dense checkpoints ----------------------------------------------------------------------------------


def test_dense_state_dict_has_the_keys_of_the_dense_model():
    model = Tower()
    keys = {key: value.shape for key, value in model.state_dict().items()}
    swap_modules(model, {nn.Linear: HalfLinear, nn.Embedding: HalfEmbedding})
    state = rk.dense_state_dict(model)
    assert {key: value.shape for key, value in state.items()} == keys and list(state) == list(keys)
    fresh = Tower()
    fresh.load_state_dict(state)
    for ours, dense in zip(model(*ids()), fresh(*ids()), strict=True):
        torch.testing.assert_close(ours, dense)


def test_load_dense_state_dict():
    trained, model = Tower(), Tower()
    rules = {nn.Linear: HalfLinear, nn.Embedding: HalfEmbedding}
    swap_modules(model, rules)
    parameters = dict(model.named_parameters())
    rk.load_dense_state_dict(model, trained.state_dict())
    swap_modules(trained, rules)
    for ours, wanted in zip(model(*ids()), trained(*ids()), strict=True):
        assert torch.equal(ours, wanted)
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_load_dense_state_dict_keeps_ties():
    model = Tied()
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    state["b.weight"] = state["a.weight"]
    swap_modules(model, LINEAR)
    rk.load_dense_state_dict(model, state)
    assert model.a.values is model.b.values
    torch.testing.assert_close(
        model.a.dense_weight(), HalfLinear.from_dense(model.a.to_dense()).dense_weight()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("head.weight"), "head.weight is missing"),
        (
            lambda s: s.update({"head.bias": torch.zeros(7)}),
            r"head.bias must have shape \(100,\), got \(7,\)",
        ),
        (lambda s: s.update({"extra": torch.zeros(7)}), "extra is not known here"),
        (lambda s: s.update({"click.weight": 3}), "click.weight must be a tensor, got int"),
    ],
)
def test_load_dense_state_dict_all_or_nothing(change, message):
    model = Tower()
    swap_modules(model, LINEAR)
    before, state = fingerprint(model), dict(Tower().state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        rk.load_dense_state_dict(model, state)
    assert_untouched(model, before)


def test_load_dense_state_dict_rolls_back(monkeypatch):
    model = Tower()
    swap_modules(model, LINEAR)
    before, load, count = fingerprint(model), HalfLinear._load_dense, iter(range(9))

    def fail_late(self, dense, mask=None):
        load(self, dense, mask)
        if next(count) == 2:
            raise MemoryError

    monkeypatch.setattr(HalfLinear, "_load_dense", fail_late)
    with pytest.raises(MemoryError):
        rk.load_dense_state_dict(model, Tower().state_dict())
    assert_untouched(model, before)


def test_load_dense_state_dict_not_strict():
    model = Tower()
    swap_modules(model, LINEAR)
    bias = torch.randn(100)
    weight = model.head.dense_weight().detach().clone()
    rk.load_dense_state_dict(model, {"head.bias": bias, "unknown": bias}, strict=False)
    assert torch.equal(model.head.bias, bias)
    torch.testing.assert_close(model.head.dense_weight(), weight)
