// The one header that names an instruction set.
//
// Every csrc/cpu/*_kernels.cpp is compiled once per level (CMakeLists.txt) with RS_ISA set to the
// namespace of that level: portable, avx2 (AVX2 + FMA + F16C + BMI2) or avx512 (F + BW + DQ + VL).
// Kernels are written against Vec, kLanes floats wide: 16 in avx512, 8 in the others.
// Everything here is internal to a translation unit, so that no AVX-512 copy of an inline function
// can be linked into code that runs on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(RS_ISA_AVX512) || defined(RS_ISA_AVX2)
#include <immintrin.h>
#endif

#include "types.h"

#define RS_INLINE static inline __attribute__((always_inline))

namespace recsparse {
namespace RS_ISA {

// ---- scalar conversions -----------------------------------------------------------------------

RS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
RS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

RS_INLINE float to_float(float value) { return value; }
RS_INLINE float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
RS_INLINE float to_float(f16 value) {
#if defined(RS_ISA_AVX512) || defined(RS_ISA_AVX2)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return bits_to_float(sign | float_to_bits(subnormal));
#endif
}

template <class T>
RS_INLINE T from_float(float value);
template <>
inline __attribute__((always_inline)) float from_float<float>(float value) {
  return value;
}
template <>
inline __attribute__((always_inline)) bf16 from_float<bf16>(float value) {  // round to nearest even
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((bits >> 16) | 0x40u)};  // quiet NaN
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline __attribute__((always_inline)) f16 from_float<f16>(float value) {
#if defined(RS_ISA_AVX512) || defined(RS_ISA_AVX2)
  return f16{uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return f16{uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return f16{uint16_t(sign | ((rounded - (112u << 23)) >> 13))};
#endif
}

// ---- Vec: kLanes floats -----------------------------------------------------------------------

#if defined(RS_ISA_AVX512)

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
using LaneMask = __mmask16;

RS_INLINE LaneMask first_lanes(int64_t n) { return LaneMask((1u << n) - 1u); }
RS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
RS_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
RS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
RS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
RS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
RS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
RS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
RS_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// The second operand is returned when either is NaN, as the instruction does.
RS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
RS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
RS_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
RS_INLINE Vec round_to_int(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
RS_INLINE LaneMask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
RS_INLINE LaneMask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
RS_INLINE Vec select(LaneMask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
RS_INLINE bool any(LaneMask m) { return m != 0; }
// x * 2^n for integral n held as float, saturating like ldexp.
RS_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
RS_INLINE float sum_lanes(Vec a) { return _mm512_reduce_add_ps(a.v); }
RS_INLINE float max_lanes(Vec a) { return _mm512_reduce_max_ps(a.v); }

RS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
RS_INLINE Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
RS_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
RS_INLINE Vec load_first(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
RS_INLINE Vec load_first(const bf16* p, int64_t n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
RS_INLINE Vec load_first(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}

RS_INLINE __m256i to_bf16_bits(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i chosen = _mm512_mask_blend_epi32(is_nan(a), rounded, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
RS_INLINE __m256i to_f16_bits(Vec a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
RS_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
RS_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, to_bf16_bits(a)); }
RS_INLINE void store(f16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, to_f16_bits(a)); }
RS_INLINE void store_first(float* p, Vec a, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
RS_INLINE void store_first(bf16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16_bits(a));
}
RS_INLINE void store_first(f16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16_bits(a));
}

// Lane i takes the next element of `packed` where bit i is set, else 0. In registers: expanding or
// compressing straight from or to memory is microcoded on Zen 4.
RS_INLINE Vec expand_lanes(uint32_t bits, Vec packed) {
  asm("" : "+v"(packed.v));  // or the compiler folds the load of `packed` into the expansion
  return {_mm512_maskz_expand_ps(LaneMask(bits), packed.v)};
}
// The inverse: lanes whose bit is set, moved to the front; what follows them is unspecified.
RS_INLINE Vec compress_lanes(uint32_t bits, Vec a) {
  return {_mm512_maskz_compress_ps(LaneMask(bits), a.v)};
}

#elif defined(RS_ISA_AVX2)

constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
struct LaneMask {
  __m256 v;
};

RS_INLINE LaneMask first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane))};
}
RS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
RS_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
RS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
RS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
RS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
RS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
RS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
RS_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
RS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
RS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
RS_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
RS_INLINE Vec round_to_int(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
RS_INLINE LaneMask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
RS_INLINE LaneMask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
RS_INLINE Vec select(LaneMask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
RS_INLINE bool any(LaneMask m) { return _mm256_movemask_ps(m.v) != 0; }
// In two steps, so that results near the ends of the exponent range saturate as ldexp does.
RS_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}
RS_INLINE float sum_lanes(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
RS_INLINE float max_lanes(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

RS_INLINE Vec widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
RS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
RS_INLINE Vec load(const bf16* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
RS_INLINE Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
RS_INLINE Vec load_first(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, _mm256_castps_si256(first_lanes(n).v))};
}
template <class T>
RS_INLINE __m128i load_first_16bit(const T* p, int64_t n) {  // AVX2 has no masked 16-bit load
  alignas(16) uint16_t buffer[8] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i].bits;
  return _mm_load_si128((const __m128i*)buffer);
}
RS_INLINE Vec load_first(const bf16* p, int64_t n) { return widen_bf16(load_first_16bit(p, n)); }
RS_INLINE Vec load_first(const f16* p, int64_t n) {
  return {_mm256_cvtph_ps(load_first_16bit(p, n))};
}

RS_INLINE __m128i to_bf16_bits(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan(a).v));
  const __m256i narrow = _mm256_packus_epi32(_mm256_srli_epi32(chosen, 16), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(narrow, 0x08));
}
RS_INLINE __m128i to_f16_bits(Vec a) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
RS_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
RS_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128((__m128i*)p, to_bf16_bits(a)); }
RS_INLINE void store(f16* p, Vec a) { _mm_storeu_si128((__m128i*)p, to_f16_bits(a)); }
RS_INLINE void store_first(float* p, Vec a, int64_t n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(n).v), a.v);
}
template <class T>
RS_INLINE void store_first_16bit(T* p, __m128i bits, int64_t n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128((__m128i*)buffer, bits);
  for (int64_t i = 0; i < n; ++i) p[i].bits = buffer[i];
}
RS_INLINE void store_first(bf16* p, Vec a, int64_t n) { store_first_16bit(p, to_bf16_bits(a), n); }
RS_INLINE void store_first(f16* p, Vec a, int64_t n) { store_first_16bit(p, to_f16_bits(a), n); }

// Lane permutations for every byte of mask: `expand` gives lane i the rank of bit i (0x80: not
// set), `compress` gives lane j the position of the j-th set bit.
struct LanePermutations {
  uint8_t expand[256][8];
  uint8_t compress[256][8];
};
constexpr LanePermutations make_lane_permutations() {
  LanePermutations t = {};
  for (int bits = 0; bits < 256; ++bits) {
    int kept = 0;
    for (int lane = 0; lane < 8; ++lane) {
      t.expand[bits][lane] = 0x80;
      if (bits >> lane & 1) {
        t.expand[bits][lane] = uint8_t(kept);
        t.compress[bits][kept++] = uint8_t(lane);
      }
    }
  }
  return t;
}
alignas(64) static constexpr LanePermutations kLanePermutations = make_lane_permutations();

// Lane i takes the next element of `packed` where bit i is set, else 0.
RS_INLINE Vec expand_lanes(uint32_t bits, Vec packed) {
  const __m256i source =
      _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)kLanePermutations.expand[bits]));
  const __m256 dropped = _mm256_castsi256_ps(_mm256_srai_epi32(source, 31));
  return {_mm256_andnot_ps(dropped, _mm256_permutevar8x32_ps(packed.v, source))};
}
// The inverse: lanes whose bit is set, moved to the front; what follows them is unspecified.
RS_INLINE Vec compress_lanes(uint32_t bits, Vec a) {
  const __m256i source =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kLanePermutations.compress[bits]));
  return {_mm256_permutevar8x32_ps(a.v, source)};
}

#else  // portable: the explanation of the two above, and what runs everywhere else

constexpr int kLanes = 8;
struct Vec {
  float v[kLanes];
};
struct LaneMask {
  bool v[kLanes];
};

template <class F>
RS_INLINE Vec each_lane(F f) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}
RS_INLINE LaneMask first_lanes(int64_t n) {
  LaneMask m;
  for (int i = 0; i < kLanes; ++i) m.v[i] = i < n;
  return m;
}
RS_INLINE Vec zero() {
  return each_lane([](int) { return 0.0f; });
}
RS_INLINE Vec broadcast(float x) {
  return each_lane([&](int) { return x; });
}
RS_INLINE Vec operator+(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
RS_INLINE Vec operator-(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
RS_INLINE Vec operator*(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
RS_INLINE Vec operator/(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
RS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
RS_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return c - a * b; }
RS_INLINE Vec min(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
RS_INLINE Vec max(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
RS_INLINE Vec sqrt(Vec a) {
  return each_lane([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
RS_INLINE Vec round_to_int(Vec a) {
  return each_lane([&](int i) { return __builtin_rintf(a.v[i]); });
}
RS_INLINE LaneMask less(Vec a, Vec b) {
  LaneMask m;
  for (int i = 0; i < kLanes; ++i) m.v[i] = a.v[i] < b.v[i];
  return m;
}
RS_INLINE LaneMask is_nan(Vec a) {
  LaneMask m;
  for (int i = 0; i < kLanes; ++i) m.v[i] = a.v[i] != a.v[i];
  return m;
}
RS_INLINE Vec select(LaneMask m, Vec yes, Vec no) {
  return each_lane([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}
RS_INLINE bool any(LaneMask m) {
  for (int i = 0; i < kLanes; ++i)
    if (m.v[i]) return true;
  return false;
}
RS_INLINE Vec scale_by_power(Vec x, Vec n) {
  return each_lane([&](int i) { return __builtin_ldexpf(x.v[i], int(n.v[i])); });
}
RS_INLINE float sum_lanes(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
RS_INLINE float max_lanes(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
template <class T>
RS_INLINE Vec load(const T* p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
template <class T>
RS_INLINE Vec load_first(const T* p, int64_t n) {
  return each_lane([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T>
RS_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(a.v[i]);
}
template <class T>
RS_INLINE void store_first(T* p, Vec a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}

// Lane i takes the next element of `packed` where bit i is set, else 0.
RS_INLINE Vec expand_lanes(uint32_t bits, Vec packed) {
  int next = 0;
  return each_lane([&](int i) { return bits >> i & 1 ? packed.v[next++] : 0.0f; });
}
// The inverse: lanes whose bit is set, moved to the front; what follows them is unspecified.
RS_INLINE Vec compress_lanes(uint32_t bits, Vec a) {
  Vec out = zero();
  int next = 0;
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) out.v[next++] = a.v[i];
  return out;
}

#endif

}  // namespace RS_ISA
}  // namespace recsparse
