"""Build and metadata. CMakeLists.txt owns the native build; this drives it and packs the result.

The wheel holds op libraries that use neither Python's C API nor torch's C++ ABI, so one wheel serves
every CPython >= 3.10 and every torch >= 2.10: its tag is py3-none-<platform>.

RECSPARSE_NO_NATIVE=1   pack no library: the reference backend only
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# cmake and ninja may have come with pip, beside this interpreter
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# glibc 2.28: what the library's symbols need (tests/test_wheel.py checks it)
PLATFORM_TAG = {"x86_64": "manylinux_2_28_x86_64", "aarch64": "manylinux_2_28_aarch64"}


class CMakeBuild(build_ext):
    def run(self):
        # CMake puts the library into the source tree; a wheel takes a copy, so both share the objects
        build = ROOT / "build" / "cmake"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(build), *generator, f"-DPython_EXECUTABLE={sys.executable}",
             *os.environ.get("CMAKE_ARGS", "").split()],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        if not self.inplace:
            for output in map(Path, self.get_outputs()):
                output.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / "recsparse_kernels" / output.name, output)

    def get_outputs(self):
        # _native_cuda.so is built where nvcc is found (CMakeLists.txt says so); a wheel without it is whole
        cache = (ROOT / "build" / "cmake" / "CMakeCache.txt").read_text(encoding="utf-8")
        cuda = ["_native_cuda.so"] if "RECSPARSE_BUILDS_CUDA:INTERNAL=ON" in cache else []
        folder = Path(self.build_lib) / "recsparse_kernels"
        return [str(folder / name) for name in ["_native_cpu.so", *cuda]]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*"))]


class PlatformWheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not NATIVE

    def get_tag(self):
        tag = PLATFORM_TAG.get(platform.machine(), f"linux_{platform.machine()}")
        return "py3", "none", tag if NATIVE else "any"


NATIVE = os.environ.get("RECSPARSE_NO_NATIVE") != "1"

setup(
    name="recsparse_kernels",
    version="0.1.0",
    description="Sparse and low-rank layers for recommender and extreme-classification models in PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["recsparse_kernels*"]),
    package_data={"recsparse_kernels": ["*.json"]},
    install_requires=["torch>=2.10", "numpy"],
    extras_require={
        "demo": ["rich>=13", "matplotlib>=3.7", "scikit-learn>=1.3"],
        "test": ["pytest>=8", "pytest-benchmark>=5", "hypothesis>=6", "expecttest", "safetensors"],
    },
    ext_modules=[Extension("recsparse_kernels._native_cpu", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    zip_safe=False,
)
