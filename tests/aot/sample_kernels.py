"""Kernels for the tests of recsparse_kernels.triton.compile: one in order, and one for each fault."""

import torch
import triton
import triton.language as tl

from recsparse_kernels.triton._launch import launch


@triton.jit
def _sum_kernel(input_ptr, bias_ptr, output_ptr, N, stride, scale, flag, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(input_ptr + at * stride, mask=at < N, other=0.0)
    if bias_ptr is not None:
        value += tl.load(bias_ptr)
    tl.store(output_ptr + at, value * scale + flag, mask=at < N)


@triton.jit
def _spilling_kernel(input_ptr, output_ptr, BLOCK: tl.constexpr):
    # a row of 16384 in one warp, used again after its sum: more values than a thread has registers
    at = tl.arange(0, BLOCK)
    row = tl.load(input_ptr + at)
    tl.store(output_ptr + at, row / tl.sum(row))


@triton.jit
def _wide_kernel(a_ptr, b_ptr, output_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    m, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + begin + k[None, :])
        b = tl.load(b_ptr + m[:, None] * K + begin + k[None, :])
        total = tl.dot(a, tl.trans(b), total)
    tl.store(output_ptr + m[:, None] * BLOCK + m[None, :], total)


@triton.jit
def _wrong_kernel(input_ptr, BLOCK: tl.constexpr):
    tl.store(input_ptr, tl.arange(0, BLOCK + 1))


@triton.jit
def _addresses_kernel(input_ptr, output_ptr, rows, tiles, stride, NARROW: tl.constexpr, BLOCK: tl.constexpr):
    # a row times its stride, and the programs of the first axis times BLOCK, pass 2**31 in a large tensor
    pid, first = tl.program_id(0), tl.program_id(1)
    if not NARROW:
        pid, first = pid.to(tl.int64), first.to(tl.int64)
    column = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    element = pid // tiles * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = first * 0
    for row in range(first, rows):
        total += tl.load(input_ptr + begin + column, mask=column < stride, other=0.0)
        begin = row * stride
    tl.store(output_ptr + element, total)


def sum_arguments():
    """Every kind of argument: tensors aligned and not, None, integers 1, 16 n, odd and wide, a float, a bool."""
    data = torch.empty(1024)
    yield data, None, data[1:], 1000, 1, 0.5, True
    yield data.half(), data > 0, data[4:], 2**31, 7, 2.0, False
    yield data.int(), data.bfloat16(), data.long(), 4096, 2**33 + 1, 1.0, True


def compile_cases():
    for n, args in enumerate(sum_arguments()):
        yield f"sum {n}", lambda args=args: launch(_sum_kernel, (4,), *args, BLOCK=256, num_warps=2)
    data = torch.empty(1 << 20, dtype=torch.bfloat16)
    yield (
        "spilling",
        lambda: launch(_spilling_kernel, (1,), data.float(), data.float(), BLOCK=16384, num_warps=1),
    )
    yield (
        "wide",
        lambda: launch(
            _wide_kernel, (1,), data, data, data, 4096, BLOCK=128, BLOCK_K=128, num_warps=8, num_stages=5
        ),
    )
    for narrow in (False, True):
        yield (
            f"addresses, narrow {narrow}",
            lambda narrow=narrow: launch(
                _addresses_kernel, (4, 4), data.float(), data.float(), 50, 7, 100, NARROW=narrow, BLOCK=64
            ),
        )
    yield "wrong", lambda: launch(_wrong_kernel, (1,), data, BLOCK=16)
