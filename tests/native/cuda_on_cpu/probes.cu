// Kernels that test the harness itself: each `bug` of a probe is a mistake that must be caught, 0
// is none.
#include "primitives.h"
#include "ptx.h"
#include "sort.h"

namespace recsparse {
namespace {

constexpr int kBlock = 64;

// output[i] = input[n - 1 - i] within a block of 64, through shared memory.
__global__ void reverse_kernel(const float* input, float* output, int64_t count, int64_t bug) {
  RS_SHARED(float, tile, [kBlock]);
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  const int64_t limit = bug == 3 ? count + 1 : count;  // 3: off by one at the tile's edge
  if (bug == 4 && i >= count) return;                  // leaves before the barrier: allowed
  if (bug != 7 || threadIdx.x)
    tile[threadIdx.x] = i < limit ? input[i] : 0.0f;  // 7: one never written
  if (bug == 2) {
    if (threadIdx.x < 40) __syncthreads();  // 2: a barrier in a branch
  } else if (bug == 5) {                    // 5: two barriers that are not the same one
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (bug != 1) {  // 1: no barrier
    __syncthreads();
  }
  const int64_t first = int64_t(blockIdx.x) * kBlock;
  const int64_t here = count - first < kBlock ? count - first : kBlock;
  const float* flat = tile;  // whose size the compiler does not know
  if (int64_t(threadIdx.x) < here)
    output[bug == 6 ? int64_t(threadIdx.x) : i] =
        flat[here - 1 - threadIdx.x + (bug == 8 ? kBlock : 0)];
}

// output[w] = sum of the warp's inputs.
__global__ void warp_kernel(const float* input, float* output, int64_t bug) {
  float value = input[threadIdx.x];
  if (bug == 1) {
    if (lane_id() < 16) value = warp_sum(value);  // 1: half a warp shuffles for the whole
  } else if (bug == 2) {
    value += __shfl_sync(0x0000ffffu, value, lane_id() % 16);  // 2: lanes outside their mask
  } else if (bug == 3) {
    if (lane_id() == 5) return;  // 3: a lane has ended
    value = warp_sum(value);
  } else {
    value = warp_sum(value);
  }
  if (lane_id() == 0) output[warp_id()] = value;
}

// Each lane passes its value to the next through shared memory, with __syncwarp between.
__global__ void syncwarp_kernel(const float* input, float* output, int64_t bug) {
  RS_SHARED(float, tile, [kBlock]);
  tile[threadIdx.x] = input[threadIdx.x];
  if (bug != 1) __syncwarp();  // 1: none
  const int64_t next =
      bug == 2 ? (threadIdx.x + 32) % kBlock : threadIdx.x ^ 1;  // 2: another warp's
  output[threadIdx.x] = tile[next];
}

// output = input by cp.async, two stages of 64 x 4 elements in flight.
__global__ void copy_kernel(const float* input, float* output, int64_t stages, int64_t bug) {
  float* tiles = dynamic_shared<float>();
  const int64_t at = 4 * int64_t(threadIdx.x);
  const auto fetch = [&](int64_t s) {
    if (s < stages)
      cp_async_16(tiles + s % 2 * 4 * kBlock + at, input + s * 4 * kBlock + at + (bug == 4));
    cp_async_commit();
  };
  fetch(0);
  for (int64_t s = 0; s < stages; ++s) {
    fetch(s + 1);
    if (bug == 1) {
      cp_async_wait<2>();  // 1: waits for nothing
    } else if (bug != 2 || s + 1 < stages) {
      cp_async_wait<1>();
    }  // 2: the last wait is missing
    if (bug != 3) __syncthreads();  // 3: no barrier: others' copies are not visible
    const int64_t from = (kBlock - 1 - int64_t(threadIdx.x)) * 4;
    if (bug != 2 || s + 1 < stages)
      for (int i = 0; i < 4; ++i)
        output[s * 4 * kBlock + from + i] = tiles[s % 2 * 4 * kBlock + from + i];
    if (bug != 5) __syncthreads();  // 5: the next copy overwrites what others still read
  }
}

// output = input, 16 bytes at a time from an element that is not a multiple of 4.
__global__ void misaligned_kernel(const float* input, float* output, int64_t first) {
  store_pack<float, 4>(output, load_pack<float, 4>(input + first));
}
// The same without the function that checks.
__global__ void cast_kernel(const float* input, float* output, int64_t first) {
  *reinterpret_cast<float4*>(output) = *reinterpret_cast<const float4*>(input + first);
}
// output[0] = the sum over the first row of a tile [4][8]; `columns` past 8 reads the second row.
__global__ void row_kernel(const float* input, float* output, int64_t columns) {
  RS_SHARED(float, tile, [4][8]);
  for (int i = 0; i < 32; ++i) tile[i / 8][i % 8] = input[i];
  float sum = 0.0f;
  for (int64_t c = 0; c < columns; ++c) sum += tile[0][c];
  output[0] = sum;
}

__global__ void sum_kernel(const float* input, float* output, int64_t count, int64_t bug) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += input[i];
  sum = block_sum(sum);
  if (bug == 1) sum += block_sum(sum) * 0.0f;  // twice: the second must not race with the first
  if (bug == 2) const_cast<float*>(input)[0] = sum;  // 2: writes what is only to be read
  if (bug == 3) atomicAdd(output + 1 + threadIdx.x % 2, 1.0f);
  if (threadIdx.x == 0) output[0] = sum;
}

void probe(int64_t which, int64_t bug, const Tensor& input, const Tensor& output) {
  const Stream stream(input);
  const auto* in = data<float>(stream, input);
  auto* out = mutable_data<float>(stream, output);
  const int64_t count = input.numel();
  switch (which) {
    case 0:
      return launch(stream, "reverse", reverse_kernel, {ceil_div(count, kBlock)}, {kBlock}, 0, in,
                    out, count, bug);
    case 1: return launch(stream, "warp", warp_kernel, {1}, {kBlock}, 0, in, out, bug);
    case 2: return launch(stream, "syncwarp", syncwarp_kernel, {1}, {kBlock}, 0, in, out, bug);
    case 3:
      return launch(stream, "copy", copy_kernel, {1}, {kBlock}, 2 * 4 * kBlock * 4, in, out,
                    count / (4 * kBlock), bug);
    case 4: return launch(stream, "misaligned", misaligned_kernel, {1}, {1}, 0, in, out, bug);
    case 6: return launch(stream, "cast", cast_kernel, {1}, {1}, 0, in, out, bug);
    case 7: return launch(stream, "row", row_kernel, {1}, {1}, 0, in, out, bug);
    default: return launch(stream, "sum", sum_kernel, {1}, {kBlock}, 0, in, out, count, bug);
  }
}

// ---- tensor cores: one warp, one instruction ----

template <class T>
__device__ uint32_t pair(const T* p, int64_t step) {
  uint16_t low, high;
  memcpy(&low, p, 2);
  memcpy(&high, p + step, 2);
  return uint32_t(low) | uint32_t(high) << 16;
}

// output [16, 8] += a [16, 16] b [16, 8], fragments loaded as the PTX ISA draws them.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* output) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t fa[4] = {pair(a + g * 16 + 2 * t, 1), pair(a + (g + 8) * 16 + 2 * t, 1),
                          pair(a + g * 16 + 2 * t + 8, 1), pair(a + (g + 8) * 16 + 2 * t + 8, 1)};
  const uint32_t fb[2] = {pair(b + 2 * t * 8 + g, 8), pair(b + (2 * t + 8) * 8 + g, 8)};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = output[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k16<T>(d, fa, fb);
  for (int i = 0; i < 4; ++i) output[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// The same through shared memory: A by ldmatrix, B by ldmatrix.trans.
template <class T>
__global__ void ldmatrix_kernel(const T* a, const T* b, float* output) {
  using Row = Pack<T, 8>;
  RS_SHARED(Row, tile_a, [16][2]);
  RS_SHARED(Row, tile_b, [16]);
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  tile_a[lane / 2][lane % 2] = load_pack<T, 8>(a + lane * 8);
  if (lane < 16) tile_b[lane] = load_pack<T, 8>(b + lane * 8);
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, &tile_a[lane % 16][lane / 16]);
  ldmatrix_x2_trans(fb, &tile_b[lane % 16]);
  float d[4] = {};
  mma_m16n8k16<T>(d, fa, fb);
  for (int i = 0; i < 4; ++i) output[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* output) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t fa[4] = {cvt_tf32(a[g * 8 + t]), cvt_tf32(a[(g + 8) * 8 + t]),
                          cvt_tf32(a[g * 8 + t + 4]), cvt_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t fb[2] = {cvt_tf32(b[t * 8 + g]), cvt_tf32(b[(t + 4) * 8 + g])};
  float d[4] = {};
  mma_m16n8k8_tf32(d, fa, fb);
  for (int i = 0; i < 4; ++i) output[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// output [16, 8] = the 2:4 matrix (values [16, 16], metadata [16, 4] bytes in natural order) b [32,
// 8].
template <class T, int kSelector>
__global__ void mma_sp_kernel(const T* values, const uint8_t* metadata, const T* b, float* output,
                              int64_t bug) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t fa[4] = {pair(values + g * 16 + 2 * t, 1), pair(values + (g + 8) * 16 + 2 * t, 1),
                          pair(values + g * 16 + 2 * t + 8, 1),
                          pair(values + (g + 8) * 16 + 2 * t + 8, 1)};
  uint32_t fb[4];
  for (int i = 0; i < 4; ++i) fb[i] = pair(b + (2 * t + 8 * i) * 8 + g, 8);
  const int half = t - 2 * kSelector;  // which 16 columns this lane describes, if any
  uint32_t e = 0xeeeeeeeeu;            // any valid places: must not be read
  if (half == 0 || half == 1) {
    const uint8_t* low = metadata + g * 4 + 2 * half;
    const uint8_t* high = metadata + (g + 8) * 4 + 2 * half;
    if (bug == 1) low = high;  // 1: rows swapped
    e = uint32_t(low[0]) | uint32_t(low[1]) << 8 | uint32_t(high[0]) << 16 |
        uint32_t(high[1]) << 24;
    if (bug == 2 && lane_id() == 2 * kSelector)
      e = (e & ~0xffu) | (e >> 4 & 0xf) | (e & 0xf) << 4;  // 2: nibbles swapped
    if (bug == 3 && lane_id() == 2 * kSelector)
      e = (e & ~0xfu) | (e >> 2 & 3) | (e & 3) << 2;  // 3: places descend
  }
  float d[4] = {};
  mma_sp_m16n8k32<T, kSelector>(d, fa, fb, e);
  for (int i = 0; i < 4; ++i) output[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

void probe_mma(int64_t which, int64_t bug, const Tensor& a, const Tensor& b, const Tensor& metadata,
               const Tensor& output) {
  const Stream stream(a);
  auto* out = mutable_data<float>(stream, output);
  if (which == 2)
    return launch(stream, "mma tf32", mma_tf32_kernel, {1}, {kWarp}, 0, data<float>(stream, a),
                  data<float>(stream, b), out);
  with_float_type(a.scalar_type(), "a", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, float>) {
      const T* pa = data<T>(stream, a);
      const T* pb = data<T>(stream, b);
      const auto* e = data<uint8_t>(stream, metadata);
      if (which == 0) launch(stream, "mma", mma_kernel<T>, {1}, {kWarp}, 0, pa, pb, out);
      if (which == 1) launch(stream, "ldmatrix", ldmatrix_kernel<T>, {1}, {kWarp}, 0, pa, pb, out);
      if (which == 3)
        launch(stream, "mma.sp", mma_sp_kernel<T, 0>, {1}, {kWarp}, 0, pa, e, pb, out, bug);
      if (which == 4)
        launch(stream, "mma.sp", mma_sp_kernel<T, 1>, {1}, {kWarp}, 0, pa, e, pb, out, bug);
    }
  });
}

void set_order(int64_t order, int64_t seed) {
  cuda_on_cpu::set_order(cuda_on_cpu::Order(order), uint64_t(seed));
}

void set_architecture(int64_t architecture) { cuda_on_cpu::set_architecture(int(architecture)); }
std::string launched() { return cuda_on_cpu::launched(); }

}  // namespace

RS_CUDA_DEFINITIONS(m) {
  m.def("probe(int which, int bug, Tensor input, Tensor(a!) output) -> ()");
  m.def(
      "probe_mma(int which, int bug, Tensor a, Tensor b, Tensor metadata, Tensor(a!) output) -> ()");
  m.def("set_order(int order, int seed) -> ()");
  m.def("set_architecture(int architecture) -> ()");
  m.def("launched() -> str");
}
RS_CUDA_OPS(m) {
  m.impl("probe", TORCH_BOX(&probe));
  m.impl("probe_mma", TORCH_BOX(&probe_mma));
}
RS_CUDA_SETTINGS(m) {
  m.impl("set_order", TORCH_BOX(&set_order));
  m.impl("set_architecture", TORCH_BOX(&set_architecture));
  m.impl("launched", TORCH_BOX(&launched));
}

}  // namespace recsparse
