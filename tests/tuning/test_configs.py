"""Configurations of Triton kernels: what was measured on a GPU is taken there, and a bad file does no harm."""

import json

import pytest
import torch

from recsparse_kernels import triton as backend
from recsparse_kernels import tuning
from recsparse_kernels.triton import _configs
from recsparse_kernels.triton._configs import PLAIN, TABLES, Choice, Configs

pytestmark = pytest.mark.skipif(bool(backend.REASON), reason=f"triton: {backend.REASON}")
GPU = "A GPU"
PLACE = "probe", "many rows"


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_configs, "SHIPPED", tmp_path / "triton_configs.json")
    monkeypatch.setattr(_configs, "gpu_name", lambda: GPU)
    _configs.reload()
    yield tmp_path
    TABLES.pop("probe", None)
    monkeypatch.undo()
    _configs.reload()


@pytest.fixture
def table():
    return Configs(
        "probe",
        {"few rows": {"BLOCK": 16}, "many rows": {"BLOCK": 64}},
        {"many rows": {"small": {"BLOCK": 32}, "large": {"BLOCK": 128}}},
    )


def store(path, name, gpu=GPU):
    _configs.save([Choice(gpu, *PLACE, name, {})], path)
    _configs.reload()


def test_without_a_measurement_the_plain_choice_is_taken(table):
    assert table["few rows"] == {"BLOCK": 16} and table["many rows"] == {"BLOCK": 64}


def test_the_measured_configuration_is_taken_on_that_gpu(table, own_files):
    store(own_files / "triton_configs.json", "large")
    assert table["many rows"] == {"BLOCK": 128} and table["few rows"] == {"BLOCK": 16}
    store(None, "small")  # the user's file wins
    assert table["many rows"] == {"BLOCK": 32}
    with _configs.using({PLACE: PLAIN}):
        assert table["many rows"] == {"BLOCK": 64}


def test_another_gpu_and_none_take_the_plain_choice(table, monkeypatch):
    store(None, "large", gpu="Another GPU")
    assert table["many rows"] == {"BLOCK": 64}
    monkeypatch.setattr(_configs, "gpu_name", lambda: None)
    assert table["many rows"] == {"BLOCK": 64}


def test_the_files_are_read_once(table, monkeypatch):
    reads = []
    monkeypatch.setattr(_configs, "_read", lambda path: reads.append(path) or {})
    for _ in range(3):
        assert table["many rows"] == {"BLOCK": 64}
    assert len(reads) == 2  # shipped, the user's


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"version": 1}', '{"version": 1, "gpus": {"A GPU": {"probe": {"many rows": 3}}}}', "\x00"],
)
def test_a_corrupt_file_is_a_warning_and_the_plain_choice(table, text):
    path = _configs.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="triton_configs.json is not a table of measurements"):
        assert table["many rows"] == {"BLOCK": 64}
    assert table["many rows"] == {"BLOCK": 64}  # no second warning
    with pytest.warns(UserWarning, match="left aside"):
        store(None, "small")
    assert table["many rows"] == {"BLOCK": 32}


def test_an_unknown_name_is_a_warning_and_the_plain_choice(table):
    store(None, "gone")
    with pytest.warns(UserWarning, match="no configuration 'gone' of probe, 'many rows'"):
        assert table["many rows"] == {"BLOCK": 64}


def test_a_file_of_another_version_is_not_read(table):
    path = _configs.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text('{"version": 99, "gpus": 3}')
    assert table["many rows"] == {"BLOCK": 64}


def test_saving_adds_and_replaces_in_one_step(own_files, monkeypatch):
    path = own_files / "out.json"
    _configs.save([Choice(GPU, *PLACE, "small", {})], path)
    _configs.save(
        [Choice("Another GPU", *PLACE, "large", {}), Choice(GPU, "probe", "few rows", PLAIN, {})], path
    )
    content = {
        "A GPU": {"probe": {"few rows": "plain", "many rows": "small"}},
        "Another GPU": {"probe": {"many rows": "large"}},
    }
    assert json.loads(path.read_text()) == {"version": 1, "gpus": content}

    def fails(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr("recsparse_kernels._store.json.dump", fails)
    with pytest.raises(OSError, match="disk full"):
        _configs.save([Choice(GPU, *PLACE, "large", {})], path)
    assert json.loads(path.read_text())["gpus"] == content
    assert [p.name for p in own_files.iterdir()] == ["out.json"]


def test_tuning_takes_the_fastest_that_runs(table):
    milliseconds, ran = {64: 2.0, 32: 1.0}, []

    def run():
        block = table["many rows"]["BLOCK"]
        ran.append(block)
        if block == 128:
            raise RuntimeError("out of resources: shared memory")

    def timer(runs, rounds):
        assert rounds == 5
        times = []
        for one in runs:
            one()
            times.append(milliseconds[ran[-1]])
        return times

    (choice,) = _configs.tune(run, GPU, 5, timer)
    assert choice == Choice(GPU, *PLACE, "small", {PLAIN: 2.0, "small": 1.0})
    assert 128 in ran and table["many rows"] == {"BLOCK": 32}  # from now on
    milliseconds[64] = 1.01  # within the noise
    (choice,) = _configs.tune(run, GPU, 5, timer)
    assert choice.name == PLAIN and table["many rows"] == {"BLOCK": 64}


def test_nothing_to_choose_is_not_timed(table):
    def timer(runs, rounds):
        raise AssertionError("timed")

    assert _configs.tune(lambda: table["few rows"], GPU, 5, timer) == []


def test_launchers_take_the_choice_and_all_are_compiled(monkeypatch):
    from recsparse_kernels.triton import _launch, compile, sparse24_linear

    input = torch.empty(64, 1024, dtype=torch.bfloat16, device="meta")
    values = torch.empty(1024, 512, dtype=torch.bfloat16, device="meta")
    metadata = torch.empty(1024, 128, dtype=torch.uint8, device="meta")

    def block():
        with _launch.recording() as launches:
            sparse24_linear.sparse24_linear(input, values, metadata, None, 0, False, False)
        return launches[0][2]["BLOCK_I"]

    choices = sparse24_linear.LINEAR_CONFIGS.choices["64 rows"]
    assert len({config["BLOCK_I"] for config in choices.values()}) == len(choices) > 1
    for name, config in choices.items():
        with _configs.using({("sparse24_linear", "64 rows"): name}):
            assert block() == config["BLOCK_I"]
    # the interpreter's kernels have no types to describe: what is compiled is told by the constants
    monkeypatch.setattr(
        compile, "describe", lambda kernel, args, options: compile.Launch(kernel, {}, options, (), {})
    )
    compiled = {
        launch.constants["BLOCK_I"]
        for launch in compile.collect(sparse24_linear)
        if launch.kernel is sparse24_linear._linear_kernel and launch.constants["BLOCK_B"] == 64
    }
    assert compiled >= {config["BLOCK_I"] for config in choices.values()}


def test_every_choice_of_every_table_is_tried_when_compiling():
    taken = {(place, name) for choices in _configs.every() for place, name in choices.items()}
    assert taken == {
        ((table.name, cls), name)
        for table in TABLES.values()
        for cls, choices in table.choices.items()
        for name in choices
    }


def test_a_model_is_tuned_with_the_configurations_of_its_kernels(monkeypatch, own_files):
    """As on a GPU, with the interpreter timed in its place by a clock that prefers every other choice."""
    import recsparse_kernels as rk
    from recsparse_kernels.ops._backend import Op

    monkeypatch.setattr(Op, "timed_backends", Op.backends)
    monkeypatch.setattr(tuning, "SHIPPED", own_files / "measured.json")
    clock = lambda runs, rounds: [float(len(runs) - n) for n in range(len(runs))]  # noqa: E731
    monkeypatch.setattr(_configs.tune, "__defaults__", (9, clock))
    layer = rk.nn.Sparse24Linear(32, 16, dtype=torch.bfloat16).eval().requires_grad_(False)
    report = rk.tune(layer, torch.zeros(4, 32, dtype=torch.bfloat16), rounds=1)
    places = [(choice.table, choice.shape_class, choice.name) for choice in report.configs]
    assert places == [("sparse24_linear", "16 rows", "short")]
    assert "Triton sparse24_linear, 16 rows: short" in str(report)
    stored = json.loads(_configs.cache_path().read_text())
    assert stored["gpus"] == {GPU: {"sparse24_linear": {"16 rows": "short"}}}
    tuning.forget()
