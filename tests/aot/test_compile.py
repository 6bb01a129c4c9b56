"""Every kernel compiles for the GPUs we know of, within their shared memory and without a spill; no GPU needed.

CI compiles each kernel, type and constant once, block sizes aside (``--brief``): for sm_80 and sm_90 with
the Triton that is installed and, where `make test` could install it, for sm_90 with the oldest supported
one. ``python -m recsparse_kernels.triton.compile --table FILE`` compiles all for all targets.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
OLDEST = ROOT / ".venv" / "triton-oldest"  # made by the Makefile
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SAMPLES = """
import dataclasses, json
from recsparse_kernels.triton import compile as aot
from tests.aot import sample_kernels
launches = aot.collect(sample_kernels)
found = aot.compile_all(launches, ["sm_80"], jobs=1)
print(json.dumps([[launch.name, dataclasses.asdict(one["sm_80"])] for launch, one in zip(launches, found)]))
"""

# What the JIT makes of the same arguments: (type, attributes) of each.
JIT_VIEW = """
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from recsparse_kernels.triton import compile as aot
from tests.aot.sample_kernels import _sum_kernel, sum_arguments
backend = make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(_sum_kernel.signature, _sum_kernel.params, backend)
for args in sum_arguments():
    _, theirs, _ = bind(*args, BLOCK=256, debug=False)
    ours = aot.describe(_sum_kernel, args, {"BLOCK": 256})
    for param, (kind, attributes) in zip(_sum_kernel.params, theirs):
        assert ours.signature[param.name] == kind, (param.name, ours.signature, theirs)
        if kind != "constexpr":
            assert (param.name in ours.aligned) == ("D" in (attributes or "")), (param.name, ours.aligned, theirs)
        elif not param.is_constexpr:
            assert ours.constants[param.name] == args[param.num]
"""


def compiling(*command, triton=None):
    """Runs in a process that loads the launchers to be recorded, from ``triton`` if that is a folder."""
    path = [str(ROOT), *([str(triton)] if triton else []), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(reversed([p for p in path if p])),
        "RECSPARSE_TRITON_COMPILE": "1",
        "TRITON_INTERPRET": "0",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(params=["installed", "oldest"])
def triton(request):
    if request.param == "oldest" and not OLDEST.exists():
        pytest.skip(
            f"{OLDEST.relative_to(ROOT)} is missing: make test installs the oldest supported triton there"
        )
    return OLDEST if request.param == "oldest" else None


def test_every_launch(triton, tmp_path):
    report = tmp_path / "report.json"
    done = compiling(
        "-m", "recsparse_kernels.triton.compile", "--brief", "--json", str(report),
        "--targets", "sm_90" if triton else "sm_80,sm_90", triton=triton,
    )  # fmt: skip
    assert report.exists(), done.stderr
    found = json.loads(report.read_text())
    assert found["faults"] == [] and done.returncode == 0
    for launch in found["launches"]:
        for resources in launch["resources"].values():
            assert 0 < resources["registers"] <= 255 and resources["spilled"] == 0 and not resources["error"]


def test_faults_are_found(triton):
    done = compiling("-c", SAMPLES, triton=triton)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [name for name, _ in found] == ["_sum_kernel"] * 3 + [
        "_spilling_kernel",
        "_wide_kernel",
        "_addresses_kernel",
        "_addresses_kernel",
        "_wrong_kernel",
    ]
    errors = [resources["error"] for _, resources in found]
    assert errors[:3] == ["", "", ""]
    assert "spills" in errors[3]
    assert "shared memory above 163 KiB" in errors[4]
    assert errors[5] == "" and errors[6] == "multiplies sizes in 32 bits: begin, element"
    assert "does not compile" in errors[7]


def test_types_and_attributes_are_those_of_the_jit(triton):
    done = compiling("-c", JIT_VIEW, triton=triton)
    assert done.returncode == 0, done.stderr
