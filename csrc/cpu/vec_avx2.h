// Vec of the AVX2 level (with FMA, F16C, BMI2): part of vec.h, not to be included alone. What each
// function does is said in vec_portable.h.
#pragma once

namespace recsparse {
namespace RS_ISA {

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

RS_INLINE Vec gather(const float* base, const int16_t* indices) {
  const __m256i wide = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)indices));
  return {_mm256_i32gather_ps(base, wide, 4)};
}
RS_INLINE Vec gather(const float* base, const int32_t* indices) {
  return {_mm256_i32gather_ps(base, _mm256_loadu_si256((const __m256i*)indices), 4)};
}

RS_INLINE void transpose(Vec* rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    rows[4 + j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}
RS_INLINE Vec sum_each(const Vec* a) {
  __m256 quad[2];
  for (int j = 0; j < 2; ++j) {
    const Vec* p = a + 4 * j;
    const __m256 s01 =
        _mm256_add_ps(_mm256_unpacklo_ps(p[0].v, p[1].v), _mm256_unpackhi_ps(p[0].v, p[1].v));
    const __m256 s23 =
        _mm256_add_ps(_mm256_unpacklo_ps(p[2].v, p[3].v), _mm256_unpackhi_ps(p[2].v, p[3].v));
    quad[j] = _mm256_add_ps(_mm256_shuffle_ps(s01, s23, 0x44), _mm256_shuffle_ps(s01, s23, 0xee));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
                        _mm256_permute2f128_ps(quad[0], quad[1], 0x31))};
}

struct Picks {  // columns within the half that holds them: lanes 0-3 read low, 4-7 high
  __m256i v;
};
RS_INLINE Picks kept_columns(uint32_t positions) {
  const __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i group = _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4);
  const __m256i bits = _mm256_srlv_epi32(_mm256_set1_epi32(int(positions)), shift);
  return {_mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(3)), group)};
}
RS_INLINE Vec pick(Picks columns, Vec low, Vec high) {
  return {_mm256_blend_ps(_mm256_permutevar8x32_ps(low.v, columns.v),
                          _mm256_permutevar8x32_ps(high.v, columns.v), 0xf0)};
}
RS_INLINE __m256 expand_half(Vec kept, uint32_t positions, int first_kept) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
  const __m256i group = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
  const __m256i even = _mm256_add_epi32(group, _mm256_set1_epi32(first_kept));
  const __m256i odd = _mm256_add_epi32(even, _mm256_set1_epi32(1));
  const __m256i all = _mm256_set1_epi32(int(positions)), three = _mm256_set1_epi32(3);
  const __m256i at_even =
      _mm256_and_si256(_mm256_srlv_epi32(all, _mm256_slli_epi32(even, 1)), three);
  const __m256i at_odd = _mm256_and_si256(_mm256_srlv_epi32(all, _mm256_slli_epi32(odd, 1)), three);
  const __m256 is_even = _mm256_castsi256_ps(_mm256_cmpeq_epi32(at_even, lane));
  const __m256 is_odd = _mm256_castsi256_ps(_mm256_cmpeq_epi32(at_odd, lane));
  return _mm256_blendv_ps(_mm256_and_ps(is_even, _mm256_permutevar8x32_ps(kept.v, even)),
                          _mm256_permutevar8x32_ps(kept.v, odd), is_odd);
}
RS_INLINE void expand(Vec kept, uint32_t positions, Vec& low, Vec& high) {
  low.v = expand_half(kept, positions, 0);
  high.v = expand_half(kept, positions, 4);
}

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

// Lane i takes element n + i of the 2 kLanes elements low, high; those past the end are
// unspecified.
RS_INLINE Vec window_lanes(Vec low, Vec high, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i at = _mm256_add_epi32(lane, _mm256_set1_epi32(n));
  const __m256 from_high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(at, _mm256_set1_epi32(7)));
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low.v, at),
                           _mm256_permutevar8x32_ps(high.v, at), from_high)};
}
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

RS_INLINE Vec load_quads(const float* p) { return {_mm256_broadcast_ps((const __m128*)p)}; }
template <int kPlace>
RS_INLINE Vec quad_lane(Vec quads) {
  return {_mm256_permute_ps(quads.v, kPlace * 0x55)};
}
RS_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
RS_INLINE void stream_end() { _mm_sfence(); }

}  // namespace RS_ISA
}  // namespace recsparse
