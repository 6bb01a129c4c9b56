#include "tensor_cores.h"

#include <cmath>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Element `half` (0 low, 1 high) of a register.
float element(uint32_t r, int half, bool brain) {
  const auto bits = uint16_t(r >> (16 * half));
  return brain ? __bfloat162float({bits}) : __half2float({bits});
}

// d += A B for this lane's four elements: k terms of A's rows g and g + 8 and B's columns 2t and
// 2t + 1. Exact products, one rounding of each sum: at least as exact as the hardware.
template <class A, class B>
void multiply(float* d, int k, const A& a, const B& b) {
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i < 2 ? 0 : 8), column = 2 * t + i % 2;
    double sum = d[i];
    for (int j = 0; j < k; ++j) {
      const double x = a(row, j), y = b(j, column);
      sum += x * y;
    }
    d[i] = float(sum);
  }
}

struct Fragments {
  uint32_t a[4], b[4], metadata;
};

}  // namespace

void ldmatrix(uint32_t* r, int matrices, const void* shared, bool transposed, Site site) {
  check(is_shared(shared) || lane() >= 8 * matrices, "ldmatrix from what is not shared memory");
  const void* rows[32];
  exchange(kAllLanes, "ldmatrix", site, &shared, sizeof shared, rows);
  const int g = lane() / 4, t = lane() % 4;
  for (int m = 0; m < matrices; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      const auto* p = static_cast<const uint16_t*>(rows[8 * m + row]);
      check_alignment(p, 16);
      check_access(p + column, 2, Access::kRead);
      pair[i] = p[column];
    }
    r[m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
}

void stmatrix_x4_trans(void* shared, const uint32_t* r, Site site) {
  check(is_shared(shared), "stmatrix to what is not shared memory");
  struct {
    uint32_t r[4];
  } mine, all[32];
  std::memcpy(mine.r, r, sizeof mine.r);
  exchange(kAllLanes, "stmatrix", site, &mine, sizeof mine, all);
  // this lane's row of matrix lane / 8, as one access of 16 bytes
  const int matrix = lane() / 8, row = lane() % 8;
  check_alignment(shared, 16);
  check_access(shared, 16, Access::kWrite);
  for (int i = 0; i < 8; ++i) {
    const auto bits = uint16_t(all[4 * i + row / 2].r[matrix] >> (16 * (row % 2)));
    std::memcpy(static_cast<uint16_t*>(shared) + i, &bits, 2);
  }
}

uint32_t cvt_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isfinite(x)) bits += 0x1000;  // to nearest, ties away from zero
  return bits & 0xffffe000u;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool brain, Site site) {
  Fragments mine = {}, all[32];
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, 2 * sizeof *b);
  exchange(kAllLanes, "mma.m16n8k16", site, &mine, sizeof mine, all);
  multiply(
      d, 16,
      [&](int row, int k) {
        const Fragments& f = all[row % 8 * 4 + k % 8 / 2];
        return element(f.a[row / 8 + 2 * (k / 8)], k % 2, brain);
      },
      [&](int k, int column) {
        const Fragments& f = all[column * 4 + k % 8 / 2];
        return element(f.b[k / 8], k % 2, brain);
      });
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Fragments mine = {}, all[32];
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, 2 * sizeof *b);
  exchange(kAllLanes, "mma.m16n8k8.tf32", site, &mine, sizeof mine, all);
  const auto number = [](uint32_t bits) {
    bits &= 0xffffe000u;  // the low bits of a register are not read
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  multiply(
      d, 8,
      [&](int row, int k) { return number(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]); },
      [&](int k, int column) { return number(all[column * 4 + k % 4].b[k / 4]); });
}

void mma_sp_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata,
                     int selector, bool brain, Site site) {
  Fragments mine = {}, all[32];
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  mine.metadata = metadata;
  exchange(kAllLanes, "mma.sp.m16n8k32", site, &mine, sizeof mine, all);
  // where in its group of four kept value n (0, 1) of group q of a row is
  const auto place = [&](int row, int q, int n) {
    const Fragments& f = all[row % 8 * 4 + 2 * selector + q / 4];
    return int(f.metadata >> (16 * (row / 8) + 4 * (q % 4) + 2 * n) & 3);
  };
  for (int row = lane() / 4; row < 16; row += 8)
    for (int q = 0; q < 8; ++q)
      check(place(row, q, 0) < place(row, q, 1),
            "mma.sp::ordered_metadata: the two places of a group must ascend");
  multiply(
      d, 32,
      [&](int row, int k) {
        for (int n = 0; n < 2; ++n)
          if (place(row, k / 4, n) == k % 4) {
            const int kept = k / 4 * 2 + n;  // column of the compressed A [16, 16]
            const Fragments& f = all[row % 8 * 4 + kept % 8 / 2];
            return element(f.a[row / 8 + 2 * (kept / 8)], kept % 2, brain);
          }
        return 0.0f;
      },
      [&](int k, int column) {
        const Fragments& f = all[column * 4 + k % 8 / 2];
        return element(f.b[k / 8], k % 2, brain);
      });
}

}  // namespace cuda_on_cpu
