"""bench/gpu_cases.py, which makes the tests' op calls on a GPU: here on the CUDA kernels run on the CPU."""

import json

import pytest
import torch

from bench import gpu, gpu_cases
from recsparse_kernels.ops._backend import OBSERVERS, OPS, TEST_BACKENDS
from recsparse_kernels.ops.masked_embedding import masked_embedding_bag, masked_embedding_unpack
from recsparse_kernels.testing.masked_embedding import make_table

pytestmark = pytest.mark.skipif("cuda" not in TEST_BACKENDS, reason="built by cmake -DRECSPARSE_TESTS=ON")


@pytest.fixture
def calls():
    table, _ = make_table(30, 10)
    recorder = gpu_cases.Recorder()
    OBSERVERS.append(recorder)
    for _ in range(2):  # the second time is the same case
        masked_embedding_unpack(table, backend="reference")
        masked_embedding_bag(torch.tensor([[1, 2], [3, 3]]), table, mode="max", backend="reference")
    OBSERVERS.remove(recorder)
    return dict(recorder.calls)


def test_each_kind_of_call_is_recorded_once_and_made_again(calls):
    assert {name: len(every) for name, every in calls.items()} == {
        "masked_embedding_unpack": 1,
        "masked_embedding_bag": 1,
    }
    lines = gpu_cases.replay_all(calls, "cuda", "cpu")
    assert [(line["op"], line["cases"], line["failures"]) for line in lines] == [
        ("masked_embedding_bag", 1, 0),
        ("masked_embedding_unpack", 1, 0),
    ]


def test_equal_tensors_are_kept_once(calls):
    (bag,), (unpack,) = calls["masked_embedding_bag"], calls["masked_embedding_unpack"]
    assert bag[0].data_ptr() == unpack[0].data_ptr()  # the table's values
    assert bag[1].data_ptr() != bag[0].data_ptr()


@pytest.mark.parametrize("wrong", [0, 1], ids=["values", "integers"])
def test_a_wrong_result_is_a_failure(calls, wrong, monkeypatch):
    right = gpu_cases._run

    def run(op, backend, args):
        result = right(op, backend, args)
        if backend == "cuda" and op.name == "masked_embedding_bag":
            result[wrong] = result[wrong] + 1
        return result

    monkeypatch.setattr(gpu_cases, "_run", run)
    bag, unpack = gpu_cases.replay_all(calls, "cuda", "cpu")
    assert bag["failures"] == 1 and bag["first"] and unpack["failures"] == 0


def test_what_an_op_writes_to_is_compared_too():
    table, _ = make_table(30, 10)
    op = OPS["masked_embedding_renorm"]
    args = (table.values, *table.index, torch.arange(30), *table.sizes, 0.5, 2.0)
    (before, *_), written = args, gpu_cases._run(op, "cuda", gpu_cases._map(args, torch.clone))
    assert len(written) == 1 and not torch.equal(written[0], before)
    gpu_cases.replay("masked_embedding_renorm", args, "cuda", "cpu")


def test_what_the_definition_refuses_is_not_made(calls):
    table, _ = make_table(30, 10)
    args = (
        table.values,
        *table.index,
        torch.tensor([[99]]),
        None,
        None,
        *table.sizes,
        0,
        -1,
        False,
        False,
        False,
    )
    with pytest.raises(gpu_cases.Refused):
        gpu_cases.replay("masked_embedding_bag", args, "cuda", "cpu")
    assert gpu_cases.replay_all({"masked_embedding_bag": [args]}, "cuda", "cpu") == []


def test_the_ops_are_checked_in_a_process_of_their_own(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SILENT_SECONDS", 600)  # a busy machine is no GPU that hangs
    file, out = tmp_path / "calls.pt", tmp_path / "out.jsonl"
    torch.save(calls, file)
    options = ["--device", "cpu", "--calls", str(file), "--out", str(out), "--commit", "c0ffee"]
    assert gpu.main(options) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["commit"] for line in lines} == {"c0ffee"}
    assert {line["op"]: (line["cases"], line["failures"]) for line in lines} == {
        "masked_embedding_bag": (1, 0),
        "masked_embedding_unpack": (1, 0),
    }


def test_calls_are_recorded_by_file_and_until_the_time(tmp_path):
    test = tmp_path / "test_unpack.py"
    test.write_text(
        "import pytest, time, torch\n"
        "from recsparse_kernels.ops.masked_embedding import masked_embedding_unpack\n"
        "from recsparse_kernels.testing.masked_embedding import make_table\n"
        "@pytest.mark.parametrize('rows', [3, 4])\n"
        "def test_reference(rows):\n"
        "    masked_embedding_unpack(make_table(rows, 10)[0], backend='reference')\n"
        "    time.sleep(1)\n"
        "    assert rows == 4\n"
    )
    for seconds, count in ((1e6, 2), (0.5, 1)):
        calls = gpu_cases.record_apart([test], gpu_cases.SELECT, seconds, 2)
        assert len(calls["masked_embedding_unpack"]) == count
