"""The CUDA library as built: hot kernels without a spill, the instructions they are about, and that it loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cuda_resources

ROOT = Path(__file__).parents[2]
LIBRARY = cuda_resources.LIBRARY
CUOBJDUMP = cuda_resources.find_cuobjdump()

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="_native_cuda.so is not built: no nvcc")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump: neither CUDA's nor Triton's")

# Kernels on a training or inference path, and what their machine code must contain, on every architecture.
HOT = {
    "bag_kernel": (),
    "rows_kernel": (),
    "grad_weights_kernel": (),
    "pieces_kernel": (),
    "join_kernel": (),
    "product_kernel": (),
    "matmul_kernel": (),
    "sparse_linear_kernel": ("HMMA.SP",),
    "sparse_linear_sm90_kernel": ("HGMMA.SP", "UBLKCP"),
    "linear_rows_kernel": (),
    "expanded_product_kernel": (),
    "prune_kernel": (),
    "tiles_kernel": (),
    "transpose_pack_kernel": (),
    "compress_kernel": (),
    "gather_kernel": (),
    "decompress_kernel": (),
    "forward_kernel": (),
    "backward_kernel": (),
    "segments_kernel": (),
    "fields_kernel": (),
    "group_logits_kernel": (),
    "group_grad_weight_kernel": (),
    "group_fused_kernel": ("HMMA",),
    "group_grad_input_kernel": (),
    "label_logits_kernel": (),
    "label_grad_weight_kernel": (),
    "sum_by_input_kernel": (),
}
# In 16 bit these are on tensor cores; in float32 by fused multiply-adds, in full precision
ON_TENSOR_CORES = ["group_logits_kernel", "group_grad_weight_kernel", "group_grad_input_kernel"]


@pytest.fixture(scope="module")
def kernels():
    found = cuda_resources.collect(LIBRARY, CUOBJDUMP)
    assert found
    return found


@needs_cuobjdump
@pytest.mark.parametrize("name", sorted(HOT))
def test_hot_kernels_do_not_spill(kernels, name):
    mine = [k for k in kernels if k.name == name]
    assert mine, f"{name} is not in the library"
    assert [(k.instance, k.arch, k.local) for k in mine if k.local] == []
    for kernel in mine:
        for mnemonic in HOT[name]:
            assert kernel.instructions[mnemonic], f"{kernel.instance} on {kernel.arch} has no {mnemonic}"


@needs_cuobjdump
@pytest.mark.parametrize("name", ON_TENSOR_CORES)
def test_grouped_kernels_are_on_tensor_cores(kernels, name):
    mine = [k for k in kernels if k.name == name and "<float" not in k.instance]
    assert mine and all(k.instructions["HMMA"] for k in mine)


@needs_cuobjdump
def test_expanded_products_are_on_tensor_cores_but_for_float32_in_full(kernels):
    mine = [k for k in kernels if k.name == "expanded_product_kernel"]
    in_full = [k for k in mine if "<float" in k.instance and "(Multiply)1" not in k.instance]
    assert in_full and len(mine) > len(in_full)
    assert all(bool(k.instructions["HMMA"]) == (k not in in_full) for k in mine)


@needs_cuobjdump
def test_products_of_a_warpgroup_are_not_serialised(kernels):
    """Where the compiler cannot tell that products may overlap, it waits after each."""
    mine = [k for k in kernels if k.name == "sparse_linear_sm90_kernel"]
    assert mine and all(k.instructions["WARPGROUP.DEPBAR"] < k.instructions["HGMMA.SP"] for k in mine)


@needs_cuobjdump
def test_every_launch_gets_the_shared_memory_it_does_not_ask_for(kernels):
    """A kernel's own arrays and kSharedUnasked are at most the 48 KB that a block has by default."""
    text = (ROOT / "csrc" / "cuda" / "launch.h").read_text(encoding="utf-8")
    unasked = int(re.search(r"kSharedUnasked = (\d+) \* 1024;", text)[1])
    assert max(k.shared for k in kernels) <= (48 - unasked) * 1024


@needs_cuobjdump
def test_the_table_has_a_line_for_each_kernel_and_architecture(kernels):
    lines = cuda_resources.table(kernels).splitlines()
    assert len(lines) == 2 + len({(k.name, k.arch) for k in kernels})


def test_the_library_loads_without_a_driver(tmp_path):
    """With a torch that has CUDA the library finds libtorch_cuda.so in the process; here a stand-in of that name."""
    stand_in = ROOT / "build" / "cmake" / "names" / "libtorch_cuda.so"
    if not stand_in.exists():
        pytest.skip("the stand-in for libtorch_cuda.so lies in the build folder, which is not here")
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(stand_in)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import recsparse_kernels as rk\n"
        "from recsparse_kernels.ops._backend import OPS\n"
        f"torch.ops.load_library({str(LIBRARY)!r})\n"
        "assert torch.ops.recsparse.cuda_runtime_version() >= 12000\n"
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('recsparse::masked_embedding_bag', 'CUDA')\n"
        "print(torch.ops.recsparse.cuda_driver_version())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().isdigit()
