// Vec of the portable level: the explanation of the others, and what runs everywhere else. Part of
// vec.h, not to be included alone.
#pragma once

// Not inlined: many instructions without hardware support, and the speed of this level is not the
// point.
#define RS_CALL __attribute__((noinline, unused))

namespace recsparse {
namespace RS_ISA {

constexpr int kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));  // the compiler's own vectors: it
typedef int32_t LaneMask
    __attribute__((vector_size(4 * kLanes)));  // splits them as the machine needs
struct Vec {
  Lanes v;
};

template <class F>
RS_INLINE Vec each_lane(F f) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}
RS_INLINE LaneMask first_lanes(int64_t n) {
  const LaneMask lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return lane < int32_t(n);
}
RS_INLINE Vec broadcast(float x) { return {Lanes{x, x, x, x, x, x, x, x}}; }
RS_INLINE Vec zero() { return broadcast(0.0f); }
RS_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
RS_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
RS_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
RS_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
RS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
RS_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
// The second operand is returned when either is NaN, as the instruction does.
RS_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
RS_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
RS_INLINE Vec sqrt(Vec a) {
  return each_lane([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
RS_INLINE Vec round_to_int(Vec a) {
  return each_lane([&](int i) { return __builtin_rintf(a.v[i]); });
}
RS_INLINE LaneMask less(Vec a, Vec b) { return a.v < b.v; }
RS_INLINE LaneMask is_nan(Vec a) { return a.v != a.v; }
RS_INLINE Vec select(LaneMask m, Vec yes, Vec no) { return {m ? yes.v : no.v}; }
RS_INLINE bool any(LaneMask m) {
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= m[i];
  return bits != 0;
}
// x * 2^n for integral n held as float, saturating like ldexp.
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

RS_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
RS_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
template <class T>
RS_CALL static Vec load(const T* p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
template <class T>
RS_CALL static void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(a.v[i]);
}
// The first n lanes only, 0 <= n <= kLanes; memory past them is not touched, lanes past them are 0.
template <class T>
RS_CALL static Vec load_first(const T* p, int64_t n) {
  Vec a = zero();
  for (int64_t i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
template <class T>
RS_CALL static void store_first(T* p, Vec a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}

// lane i of the result = base[indices[i]]
template <class Index>
RS_INLINE Vec gather(const float* base, const Index* indices) {
  return each_lane([&](int i) { return base[indices[i]]; });
}

// rows[i] lane j becomes rows[j] lane i, for kLanes rows.
RS_INLINE void transpose(Vec* rows) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float upper = rows[j].v[i];
      rows[j].v[i] = rows[i].v[j];
      rows[i].v[j] = upper;
    }
}
// Lane i is the sum of the lanes of a[i].
RS_INLINE Vec sum_each(const Vec* a) {
  return each_lane([&](int i) { return sum_lanes(a[i]); });
}

// ---- 2:4: kLanes kept values stand in 2 * kLanes columns; positions: 2 bits each, low bits first

struct Picks {
  int v[kLanes];
};
// Column of each kept value.
RS_INLINE Picks kept_columns(uint32_t positions) {
  Picks columns;
  for (int i = 0; i < kLanes; ++i) columns.v[i] = i / 2 * 4 + int((positions >> (2 * i)) & 3);
  return columns;
}
// What stands at those columns of 2 * kLanes dense values.
RS_CALL static Vec pick(Picks columns, Vec low, Vec high) {
  return each_lane([&](int i) {
    return columns.v[i] < kLanes ? low.v[columns.v[i]] : high.v[columns.v[i] - kLanes];
  });
}
// kLanes kept values to their places among 2 * kLanes columns, zero elsewhere.
RS_CALL static void expand(Vec kept, uint32_t positions, Vec& low, Vec& high) {
  const Picks columns = kept_columns(positions);
  low = high = zero();
  for (int i = 0; i < kLanes; ++i)
    (columns.v[i] < kLanes ? low : high).v[columns.v[i] % kLanes] = kept.v[i];
}

// Lane i takes the next element of `packed` where bit i is set, else 0.
RS_CALL static Vec expand_lanes(uint32_t bits, Vec packed) {
  int next = 0;
  return each_lane([&](int i) { return bits >> i & 1 ? packed.v[next++] : 0.0f; });
}
// Lane i takes element n + i of the 2 kLanes elements low, high; those past the end are
// unspecified.
RS_CALL static Vec window_lanes(Vec low, Vec high, int n) {
  return each_lane([&](int i) {
    return (n + i) / kLanes % 2 ? high.v[(n + i) % kLanes] : low.v[(n + i) % kLanes];
  });
}
// The inverse: lanes whose bit is set, moved to the front; what follows them is unspecified.
RS_CALL static Vec compress_lanes(uint32_t bits, Vec a) {
  Vec out = zero();
  int next = 0;
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) out.v[next++] = a.v[i];
  return out;
}

// The four floats at p, again and again; and one of them in every lane.
RS_INLINE Vec load_quads(const float* p) {
  return each_lane([&](int i) { return p[i % 4]; });
}
template <int kPlace>
RS_INLINE Vec quad_lane(Vec quads) {
  return broadcast(quads.v[kPlace]);
}
// Past the caches, to a p that is a multiple of the vector; other threads see it after stream_end.
RS_INLINE void stream(float* p, Vec a) { store(p, a); }
RS_INLINE void stream_end() {}

}  // namespace RS_ISA
}  // namespace recsparse
