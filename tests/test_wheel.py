"""The wheel: one file for every CPython >= 3.10 and torch >= 2.10, small, and asking little of the system."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import recsparse_kernels as rk

ROOT = Path(__file__).parents[1]
LIBRARY = Path(rk.__file__).with_name("_native_cpu.so")
CUDA_LIBRARY = LIBRARY.with_name("_native_cuda.so")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built")
needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")

# torch's stable C shims; what every ELF library has; libc and libstdc++ by symbol version (below)
ALLOWED = re.compile(
    r"^(aoti_torch_|torch_)\w+$|^(_ITM_\w+TMCloneTable|__gmon_start__)$|@(GLIBC|GLIBCXX|CXXABI|GCC)_"
)
HIGHEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}  # manylinux_2_28


@pytest.fixture(params=[LIBRARY, CUDA_LIBRARY], ids=lambda path: path.stem)
def library(request):
    if not request.param.exists():
        pytest.skip(f"{request.param.name} is not built")
    return request.param


def undefined_symbols(library: Path) -> list[str]:
    run = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    return [line.split()[-1] for line in run.stdout.splitlines()]


@needs_binutils
def test_undefined_symbols_are_on_the_allow_list(library):
    symbols = undefined_symbols(library)
    assert [s for s in symbols if not ALLOWED.search(s)] == []
    assert not [s for s in symbols if s.startswith(("Py", "_Py", "cu"))]


@needs_binutils
def test_symbol_versions_fit_manylinux_2_28(library):
    too_new = []
    for symbol in undefined_symbols(library):
        match = re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", symbol)
        if match and tuple(map(int, match[2].split("."))) > HIGHEST[match[1]]:
            too_new.append(symbol)
    assert too_new == []


@needs_binutils
def test_exports_nothing(library):
    run = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    assert run.stdout == ""


def test_holds_no_path_of_the_build_machine(library):
    content = library.read_bytes()
    assert str(ROOT).encode() not in content
    assert str(Path(sys.prefix)).encode() not in content


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(out)]
    # a scratch build folder: what lies in build/lib from an older tree must not get into the wheel
    command[4:4] = ["--bdist-dir", str(out / "tree")]
    egg_info = ["egg_info", "--egg-base", str(out)]
    build = ["build", "--build-base", str(out / "build")]
    subprocess.run(
        [*command[:3], *egg_info, *build, *command[3:]],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_wheel_is_one_small_file_for_all_pythons(wheel):
    assert re.fullmatch(r"recsparse_kernels-[\d.]+-py3-none-(manylinux_2_28|linux)_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "recsparse_kernels/_native_cpu.so" in names
    with_cuda = "recsparse_kernels/_native_cuda.so" in names
    assert with_cuda == CUDA_LIBRARY.exists()
    assert wheel.stat().st_size < (20e6 if with_cuda else 5e6)
    assert not [n for n in names if n.startswith(("tests/", "bench/", "csrc/"))]


def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import recsparse_kernels as rk; print(rk.__file__); assert rk.cpu_levels(), rk.show_config()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout


def copy_without_libraries(folder):
    ignore = shutil.ignore_patterns("*.so")
    shutil.copytree(Path(rk.__file__).parent, folder / "recsparse_kernels", ignore=ignore)


def printed_there(folder, code):
    """By a new process that imports the copy."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ".", "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_without_the_library(tmp_path):
    copy_without_libraries(tmp_path)
    code = (
        "import recsparse_kernels as rk, torch\n"
        "from recsparse_kernels.ops._backend import OPS\n"
        "assert rk.cpu_levels() == () and rk.cpu_level() is None\n"
        "assert all(op.backends() == ('reference',) for op in OPS.values())\n"
        "print(rk.show_config())"
    )
    printed = printed_there(tmp_path, code)
    assert "missing" in printed and "not built" in printed and "reference only" in printed


@pytest.mark.parametrize(
    ("library", "said", "warned"),
    [
        ("", "was built from other sources", ""),
        ("cpu_levels() -> int", "another machine's instructions", ""),
        ("cpu_levels() -> int", "", "selection_mask runs on the reference"),
    ],
    ids=["old", "other machine", "old schema"],
)
def test_a_library_of_other_sources_or_another_machine_is_passed_over(tmp_path, library, said, warned):
    """A stand-in for the library: ``cpu_levels`` returns 0 (no level runs here), or 1 with an op that differs."""
    copy_without_libraries(tmp_path)
    (tmp_path / "recsparse_kernels" / "_native_cpu.so").write_bytes(b"stand-in")
    code = f"""
import torch, warnings
library = torch.library.Library("recsparse", "DEF")
def load(path):
    library.define("selection_mask(Tensor old) -> Tensor")
    library.impl("selection_mask", lambda old: old, "CPU")
    if {bool(library)}:
        library.define("cpu_levels() -> int")
        library.impl("cpu_levels", lambda: {int(bool(warned))}, "CompositeExplicitAutograd")
    for name in ("cpu_level() -> int", "use_huge_pages(Tensor tensor) -> int"):
        library.define(name)
        library.impl(name.partition("(")[0], lambda *a: 0, "CompositeExplicitAutograd")
torch.ops.load_library = load
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import recsparse_kernels as rk
from recsparse_kernels.ops._backend import OPS
assert all(op.backends() == ("reference",) for op in OPS.values())
rk.nn.Sparse24Linear(32, 8)(torch.ones(2, 32))
print(rk.show_config(), *(w.message for w in caught))
"""
    printed = printed_there(tmp_path, code)
    assert said in printed and warned in printed


def test_a_library_that_does_not_load_is_reported(tmp_path):
    copy_without_libraries(tmp_path)
    (tmp_path / "recsparse_kernels" / "_native_cpu.so").write_bytes(b"not a library")
    code = "import recsparse_kernels as rk; print(rk.show_config())"
    assert "does not load" in printed_there(tmp_path, code)
