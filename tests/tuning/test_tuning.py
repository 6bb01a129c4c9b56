"""The measured table: what is stored, what is believed, and that a bad file does no harm."""

import json
import time

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import recsparse_kernels as rk
from recsparse_kernels import _gpu, explain, tuning
from recsparse_kernels.nn._base import PackedModule
from recsparse_kernels.ops._backend import MEASURED, OBSERVERS, OPS, Op, device_name


def tuning_probe(input: Tensor, weight: Tensor) -> Tensor:
    return input * weight


class Probe(PackedModule):
    """A layer around one op; what the op does on "native" is set by each test."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return OPS["tuning_probe"](x, self.values)


@pytest.fixture(scope="module")
def op():
    """An op on both backends, the native one written here in Python."""
    library = torch.library.Library("recsparse", "FRAGMENT")
    schema = torch.library.infer_schema(tuning_probe, mutates_args=())
    library.define("tuning_probe" + schema)
    library.impl("tuning_probe", lambda input, weight: NATIVE[0](input, weight), "CPU")
    grad = lambda ctx, g, *, backend: (g * ctx.saved_tensors[1], (g * ctx.saved_tensors[0]).sum(0))  # noqa: E731
    op = Op(
        tuning_probe,
        fake=lambda input, weight: torch.empty_like(input),
        backward=grad,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        autocast=False,
    )
    yield op
    del OPS["tuning_probe"]


NATIVE = [tuning_probe]


def slow(input, weight):
    time.sleep(2e-3)
    return input * weight


def wrong(input, weight):
    return input * weight + 1


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    tuning.forget()
    yield
    monkeypatch.undo()
    NATIVE[0] = tuning_probe
    tuning.load()


X = torch.randn(100, 8)


def test_the_dense_path_is_taken_where_it_is_faster(op):
    NATIVE[0] = slow
    layer = Probe()
    assert op.pick((X, layer.values)) == "native"
    report = rk.tune(layer, X)
    (entry,) = report.entries
    assert entry.backend == "reference" and set(entry.milliseconds) == {"native", "reference"}
    assert entry.shape == "train 128x8, 8"
    assert op.pick((X, layer.values)) == "reference"
    assert op.pick((X[:70], layer.values)) == "reference"  # the same class: 65 to 128 rows
    assert op.pick((X[:5], layer.values)) == "native"  # another
    assert op.pick((X, layer.values), "native") == "native"  # asked for
    with torch.no_grad():
        assert op.pick((X, layer.values)) == "native"  # without gradient: not measured


def test_the_default_stays_when_it_is_not_slower(op):
    layer = Probe()
    (entry,) = rk.tune(layer, X, rounds=5).entries
    assert entry.backend in ("native", "reference")
    fast, default = min(entry.milliseconds.values()), entry.milliseconds["native"]
    assert (entry.backend == "native") == (default < tuning.MARGIN * fast)


def test_a_wrong_kernel_is_never_measured(op):
    NATIVE[0] = wrong
    report = rk.tune(Probe(), X)
    assert not report.entries and "results differ" in report.skipped[0] and not MEASURED
    assert report.path is None and not tuning.cache_path().exists()


def test_a_backend_that_raises_is_left_out(op):
    calls = []

    def breaks(input, weight):  # after the layer's own call
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of shared memory")
        return input * weight

    NATIVE[0] = breaks
    report = rk.tune(Probe(), X, rounds=1, store=False)
    (entry,) = report.entries
    assert entry.backend == "reference" and set(entry.milliseconds) == {"reference"}
    assert "tuning_probe, native: RuntimeError: out of shared memory" in report.skipped[0]


def test_entries_survive_the_process(op):
    NATIVE[0] = slow
    layer = Probe()
    report = rk.tune(layer, X)
    assert report.path == tuning.cache_path()
    tuning.forget()
    assert op.pick((X, layer.values)) == "native"
    assert tuning.load() == 1
    assert op.pick((X, layer.values)) == "reference"
    assert tuning.DETAILS[("tuning_probe", report.entries[0].key)] == report.entries[0]


def test_store_false_writes_nothing(op):
    assert rk.tune(Probe(), X, store=False).entries and not tuning.cache_path().exists()


def test_the_users_file_wins_over_the_shipped_one(op):
    key = ("tuning_probe", "cpu", torch.float32, False, "128x8, 8")
    tuning.save([tuning.Entry(*key, "reference", {"native": 2.0, "reference": 1.0})], tuning.SHIPPED)
    tuning.load()
    with torch.no_grad():
        assert op.pick((X, torch.ones(8))) == "reference"
        tuning.save([tuning.Entry(*key, "native", {"native": 1.0, "reference": 2.0})])
        tuning.load()
        assert op.pick((X, torch.ones(8))) == "native"


def test_other_machines_entries_are_kept_and_not_used(op, monkeypatch):
    entry = tuning.Entry(
        "tuning_probe", "cpu", torch.float32, False, "128x8, 8", "reference", {"reference": 1.0}
    )
    with monkeypatch.context() as context:
        context.setattr(tuning, "machine_class", lambda: "another machine")
        tuning.save([entry])
    assert tuning.load() == 0
    tuning.save([entry])
    assert set(json.loads(tuning.cache_path().read_text())["machines"]) == {
        "another machine",
        tuning.machine_class(),
    }


GPUS = ["NVIDIA A100, compute capability 8.0", "NVIDIA H200, compute capability 9.0"]


def entry_for(device, backend="reference", op="tuning_probe"):
    return tuning.Entry(op, device, torch.float32, False, "128x8, 8", backend, {backend: 1.0})


def test_a_gpus_entries_are_stored_under_its_name(op, monkeypatch):
    tuning.save([entry_for(GPUS[0]), entry_for("cpu"), entry_for(GPUS[1], "native")])
    machines = json.loads(tuning.cache_path().read_text())["machines"]
    assert {name: [e["device"] for e in found] for name, found in machines.items()} == {
        tuning.machine_class(): ["cpu"], GPUS[0]: [GPUS[0]], GPUS[1]: [GPUS[1]],
    }  # fmt: skip
    assert tuning.load() == 3
    # another CPU, or another number of threads: what GPUs were measured for still holds
    monkeypatch.setattr(tuning, "machine_class", lambda: "another machine")
    assert tuning.load() == 2
    assert [key[0] for key in MEASURED["tuning_probe"]] == GPUS


def test_what_is_listed_under_another_machine_is_not_used(op):
    path = tuning.save([entry_for("cpu")])
    content = json.loads(path.read_text())
    (found,) = content["machines"].values()
    found[0]["device"] = "cuda"
    content["machines"][GPUS[0]] = [{**found[0], "device": "cpu"}, {**found[0], "device": GPUS[1]}]
    path.write_text(json.dumps(content))
    assert tuning.load() == 0


def test_a_call_looks_up_its_own_gpu(op, monkeypatch):
    """Two GPUs in one process, each with its own entry; no GPU is here, so torch's answers are made up."""
    capability = {0: (8, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["NVIDIA A100", "NVIDIA H200"][i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    _gpu._name_of.cache_clear()
    try:
        assert [_gpu.gpu_name(torch.device("cuda", i)) for i in (0, 1)] == GPUS
        assert _gpu.gpu_name() == _gpu.gpu_name(torch.device("cuda")) == GPUS[1]
        assert [device_name(torch.device(d)) for d in ("cuda:0", "cuda:1", "cpu")] == [*GPUS, "cpu"]
        monkeypatch.setattr(op, "backends", lambda device, dtype: ("native", "reference"))
        tuning.save([entry_for(GPUS[0])])
        tuning.load()
        with FakeTensorMode(), torch.no_grad():
            picked = [
                op.pick((torch.empty(100, 8, device=f"cuda:{i}"), torch.empty(8, device=f"cuda:{i}")))
                for i in (0, 1)
            ]
        assert picked == ["reference", "native"]
    finally:
        _gpu._name_of.cache_clear()


def test_without_a_gpu_none_is_named():
    if not torch.cuda.is_initialized():
        assert _gpu.gpu_name() is None and device_name(torch.device("cuda")) == "cuda"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "machines": {"%s": [{"op": 1}]}}',
        '{"version": 1, "machines": 3}',
    ],
)
def test_a_corrupted_file_is_left_aside_with_a_warning(op, text):
    path = tuning.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("%s", tuning.machine_class()))
    with pytest.warns(UserWarning, match="is not a table of measurements and is left aside"):
        assert tuning.load() == 0
    NATIVE[0] = slow
    with pytest.warns(UserWarning):
        rk.tune(Probe(), X)
    assert tuning.load() == 1  # written anew


def test_a_file_of_a_later_version_is_left_aside(op):
    path = tuning.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text('{"version": 99, "anything": 1}')
    assert tuning.load() == 0


def test_a_failed_write_keeps_the_old_file(op, monkeypatch):
    NATIVE[0] = slow
    rk.tune(Probe(), X)
    before = tuning.cache_path().read_text()
    monkeypatch.setattr(
        "recsparse_kernels._store.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        rk.tune(Probe(), X[:3])
    assert tuning.cache_path().read_text() == before
    assert [path.name for path in tuning.cache_path().parent.iterdir()] == ["measured.json"]


def test_the_shipped_table_is_readable():
    shipped = tuning.Path(tuning.__file__).with_name("measured.json")
    for machine, entries in tuning._read(shipped).items():
        assert machine
        for entry in entries:
            assert entry.op in OPS and entry.backend in entry.milliseconds


def test_tune_refuses():
    with pytest.raises(TypeError, match="module must be a torch.nn.Module; got int"):
        rk.tune(3)
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        rk.tune(nn.ReLU(), X, rounds=0)


# -- explain ----------------------------------------------------------------------------------------------


def test_explain_says_which_way_and_why(op):
    NATIVE[0] = slow
    model = nn.Sequential(Probe(), nn.Linear(8, 8), Probe())
    rows = explain(model, X).rows
    assert [row[:4] for row in rows] == [[name, "Probe", "tuning_probe", "native"] for name in ("0", "2")]
    assert rows[0][4].startswith("first in order; not measured at this shape")
    rk.tune(model, X)
    rows = explain(model, X).rows
    assert rows[0][3] == "reference" and rows[0][4].startswith("measured: native ")
    assert "reference" in str(explain(model, X)) and not OBSERVERS
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_explain_other_reasons(op):
    rows = explain(Probe().double(), X.double()).rows
    assert rows[0][3:] == ["reference", "native runs float32, bfloat16 and float16, not float64"]
    model = nn.ModuleList([Probe()])
    model.forward = lambda x: x
    assert explain(model, X).rows[0][4] == "not called in this forward"
    assert explain(nn.Linear(2, 2)).title == "no packed layers"
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got int"):
        explain(3)


def test_explain_cleans_up_after_a_failing_forward(op):
    model = nn.Sequential(Probe())
    with pytest.raises(RuntimeError):
        explain(model, torch.randn(3, 5))
    assert not OBSERVERS and not model[0]._forward_hooks
