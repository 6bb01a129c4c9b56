"""Huge pages are asked for where they should be, and nowhere once they are turned off.

Each test runs in a process of its own, where malloc has no memory to give again that asked for huge pages
before.
"""

import functools
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels.ops import sparse24_compress, sparse24_linear, sparse24_mask

SMAPS = Path("/proc/self/smaps")
pytestmark = [
    pytest.mark.skipif(not rk.cpu_levels(), reason="the native library is not built"),
    pytest.mark.skipif(not SMAPS.exists(), reason="this system does not say which pages were asked for"),
]

ROWS = 80_000  # of 128 float32, 41 MB: malloc maps that much anew each time, and gives it back


def in_new_process(test):
    @functools.wraps(test)
    def run():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(call, test.__name__).result()

    run.body = test
    return run


def call(name):
    globals()[name].body()


def asked_for(tensor):
    """Whether the mapping that holds the tensor's middle has the flag of madvise(MADV_HUGEPAGE)."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor is in no mapping")


@in_new_process
def test_outputs():
    weight = torch.ones(128, 16)
    packed = sparse24_compress(weight, sparse24_mask(weight))
    input = torch.ones(ROWS, 16)
    for enabled in (True, False, True):
        rk.set_huge_pages(enabled)
        output = sparse24_linear(input, *packed, backend="native")
        assert asked_for(output) == enabled
        del output


@in_new_process
def test_tables():
    for enabled in (False, True):
        rk.set_huge_pages(enabled)
        layer = rk.nn.LowRankEmbedding(ROWS * 16, 16, rank=8)
        assert asked_for(layer.table) == enabled
        del layer


@in_new_process
def test_by_name():
    rk.set_huge_pages(False)
    table = torch.zeros(ROWS, 128)
    assert not asked_for(table)
    assert rk.use_huge_pages(table) > 2**25 and asked_for(table) and not table.any()
    assert rk.use_huge_pages(torch.zeros(10), None) == 0
