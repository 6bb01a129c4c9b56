// Vec of the AVX-512 level (F + BW + DQ + VL): part of vec.h, not to be included alone. What each
// function does is said in vec_portable.h.
#pragma once

namespace recsparse {
namespace RS_ISA {

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

// lane i of the result = base[indices[i]]
RS_INLINE Vec gather(const float* base, const int16_t* indices) {
  const __m512i wide = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)indices));
  return {_mm512_i32gather_ps(wide, base, 4)};
}
RS_INLINE Vec gather(const float* base, const int32_t* indices) {
  return {_mm512_i32gather_ps(_mm512_loadu_si512(indices), base, 4)};
}

// ---- kLanes x kLanes in registers (transposes, many sums at once)

// rows[i] lane j becomes rows[j] lane i.
RS_INLINE void transpose(Vec* rows) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: columns j, 4 + j, 8 + j, 12 + j of rows i .. i + 3
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xee);
    rows[j].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[4 + j].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    rows[8 + j].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
}
// Lane i is the sum of the lanes of a[i].
RS_INLINE Vec sum_each(const Vec* a) {
  __m512 quad[4];  // lane 4 q + i of quad[j]: a quarter (q) of the sum of a[4 j + i]
  for (int j = 0; j < 4; ++j) {
    const Vec* p = a + 4 * j;
    const __m512 s01 =
        _mm512_add_ps(_mm512_unpacklo_ps(p[0].v, p[1].v), _mm512_unpackhi_ps(p[0].v, p[1].v));
    const __m512 s23 =
        _mm512_add_ps(_mm512_unpacklo_ps(p[2].v, p[3].v), _mm512_unpackhi_ps(p[2].v, p[3].v));
    quad[j] = _mm512_add_ps(_mm512_shuffle_ps(s01, s23, 0x44), _mm512_shuffle_ps(s01, s23, 0xee));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x44),
                                   _mm512_shuffle_f32x4(quad[0], quad[1], 0xee));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x44),
                                    _mm512_shuffle_f32x4(quad[2], quad[3], 0xee));
  return {
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}

// ---- 2:4: kLanes kept values stand in 2 * kLanes columns; positions: 2 bits each, low bits first

struct Picks {
  __m512i v;
};
// Column of each kept value.
RS_INLINE Picks kept_columns(uint32_t positions) {
  const __m512i shift =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i group = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i bits = _mm512_srlv_epi32(_mm512_set1_epi32(int(positions)), shift);
  return {_mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi32(3)), group)};
}
// What stands at those columns of 2 * kLanes dense values.
RS_INLINE Vec pick(Picks columns, Vec low, Vec high) {
  return {_mm512_permutex2var_ps(low.v, columns.v, high.v)};
}
RS_INLINE __m512 expand_half(Vec kept, uint32_t positions, int first_kept) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  const __m512i group = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m512i even = _mm512_add_epi32(group, _mm512_set1_epi32(first_kept));
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i all = _mm512_set1_epi32(int(positions)), three = _mm512_set1_epi32(3);
  const __m512i at_even =
      _mm512_and_si512(_mm512_srlv_epi32(all, _mm512_slli_epi32(even, 1)), three);
  const __m512i at_odd = _mm512_and_si512(_mm512_srlv_epi32(all, _mm512_slli_epi32(odd, 1)), three);
  const __m512 out =
      _mm512_maskz_permutexvar_ps(_mm512_cmpeq_epi32_mask(at_even, lane), even, kept.v);
  return _mm512_mask_permutexvar_ps(out, _mm512_cmpeq_epi32_mask(at_odd, lane), odd, kept.v);
}
// kLanes kept values to their places among 2 * kLanes columns, zero elsewhere.
RS_INLINE void expand(Vec kept, uint32_t positions, Vec& low, Vec& high) {
  low.v = expand_half(kept, positions, 0);
  high.v = expand_half(kept, positions, 8);
}

// Lane i takes the next element of `packed` where bit i is set, else 0. In registers: expanding or
// compressing straight from or to memory is microcoded on Zen 4.
RS_INLINE Vec expand_lanes(uint32_t bits, Vec packed) {
  asm("" : "+v"(packed.v));  // or the compiler folds the load of `packed` into the expansion
  return {_mm512_maskz_expand_ps(LaneMask(bits), packed.v)};
}
// Lane i takes element n + i of the 2 kLanes elements low, high; those past the end are
// unspecified.
RS_INLINE Vec window_lanes(Vec low, Vec high, int n) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutex2var_ps(low.v, _mm512_add_epi32(lane, _mm512_set1_epi32(n)), high.v)};
}
// The inverse: lanes whose bit is set, moved to the front; what follows them is unspecified.
RS_INLINE Vec compress_lanes(uint32_t bits, Vec a) {
  return {_mm512_maskz_compress_ps(LaneMask(bits), a.v)};
}

RS_INLINE Vec load_quads(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
template <int kPlace>
RS_INLINE Vec quad_lane(Vec quads) {
  return {_mm512_permute_ps(quads.v, kPlace * 0x55)};
}
RS_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
RS_INLINE void stream_end() { _mm_sfence(); }

}  // namespace RS_ISA
}  // namespace recsparse
