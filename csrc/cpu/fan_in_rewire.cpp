// Topology update of a fixed fan-in layer, in place, CPU: drop the smallest connections, regrow as
// many at random inputs. Definition (scores, ties, random numbers): reference/fan_in.py.
//
// "The k smallest of N" is a radix select: two histograms over the score's bits (a float >= 0
// orders as its bits do), two over the random ties at the limit. Scores are computed anew in each
// pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../fan_in.h"
#include "fan_in_chunks.h"
#include "fan_in_update.h"

namespace recsparse {
namespace {

constexpr int64_t kBins = 1 << 16;     // a histogram is half a megabyte, so
constexpr int64_t kPerSlab = 1 << 20;  // a slab has at least so many connections
constexpr int64_t kMaxSlabs = 16;

struct Rewiring {  // arguments of the op
  FanInSizes size;
  Criterion criterion;
  Scope scope;
  double amount;
  float init_scale;
  bool allow_duplicates;
  uint64_t key;  // of all random numbers

  uint32_t tie(int64_t position) const {
    return uint32_t(split_mix(key - uint64_t(position) * kGolden) >> 32);
  }
  int64_t draw(int64_t position, int attempt) const {  // uniform in [0, I)
    const uint64_t bits =
        split_mix(key + uint64_t(position) * kGolden + uint64_t(attempt) * kRound);
    return int64_t(((bits >> 32) * uint64_t(size.in_features)) >> 32);
  }
  float init(int64_t element) const {
    const uint64_t bits = split_mix(~key + uint64_t(element) * kGolden);
    const float uniform = float(bits >> 40) * 0x1p-24f;
    return (2.0f * uniform - 1.0f) * init_scale;
  }
};

// Scores of index rows, one row at a time: bits of the root mean square over the group.
template <class T>
class Scores {
 public:
  Scores(const FanInSizes& size, const T* weight)
      : size_(size),
        weight_(weight),
        wide_(size.fan_in),
        squares_(size.fan_in),
        bits_(size.fan_in) {}

  const uint32_t* row(int64_t row) {
    const auto& kernels = fan_in_kernels<T>();
    const int64_t begin = row * size_.group_size;
    const int64_t end = std::min(begin + size_.group_size, size_.out_features);
    if (size_.group_size > 1) std::fill_n(squares_.get(), size_.fan_in, 0.0);
    for (int64_t label = begin; label < end; ++label) {
      kernels.widen(weight_ + label * size_.fan_in, size_.fan_in, wide_.get());
      if (size_.group_size > 1)
        for (int64_t f = 0; f < size_.fan_in; ++f) squares_[f] += double(wide_[f]) * wide_[f];
    }
    if (size_.group_size > 1)
      for (int64_t f = 0; f < size_.fan_in; ++f)
        wide_[f] = float(std::sqrt(squares_[f] / double(end - begin)));
    std::memcpy(bits_.get(), wide_.get(), size_t(size_.fan_in) * sizeof(float));
    for (int64_t f = 0; f < size_.fan_in; ++f) bits_[f] &= 0x7fffffffu;
    return bits_.get();
  }

 private:
  const FanInSizes& size_;
  const T* weight_;
  Scratch<float> wide_;
  Scratch<double> squares_;
  Scratch<uint32_t> bits_;
};

// Which connections are the `count` smallest of the layer: those before (score, tie), and the first
// `equal` in each slab of those at it.
struct Limit {
  uint64_t key = 0;            // score bits, tie
  std::vector<int64_t> equal;  // by slab
};

template <class T>
class LayerSelect {
 public:
  LayerSelect(const Rewiring& r, const T* weight) : r_(r), weight_(weight) {
    slabs_ = std::max<int64_t>(1, std::min(kMaxSlabs, r.size.rows * r.size.fan_in / kPerSlab));
  }
  int64_t slabs() const { return slabs_; }
  int64_t first_row(int64_t slab) const { return slab * r_.size.rows / slabs_; }

  Limit smallest(int64_t count) const {
    Limit limit;
    limit.equal.assign(size_t(slabs_), 0);
    if (count == 0) return limit;
    int64_t rank = count;  // of the last one dropped, among those that agree with the prefix
    for (int shift = 48; shift >= 0; shift -= 16)
      limit.key |= next_digit(limit.key, shift, &rank) << shift;
    const std::vector<int64_t> found = count_equal(limit.key);
    for (int64_t slab = 0; slab < slabs_; ++slab) {
      limit.equal[size_t(slab)] = std::min(rank, found[size_t(slab)]);
      rank -= limit.equal[size_t(slab)];
    }
    return limit;
  }

 private:
  // f(slab, key) over the connections; the tie is only worked out where the score's bits agree.
  template <class F>
  void for_each(uint64_t prefix, int shift, const F& f) const {
    parallel_for(slabs_, 1, [&](int64_t begin, int64_t end) {
      Scores<T> scores(r_.size, weight_);
      for (int64_t slab = begin; slab < end; ++slab) {
        for (int64_t row = first_row(slab); row < first_row(slab + 1); ++row) {
          const uint32_t* bits = scores.row(row);
          for (int64_t i = 0; i < r_.size.fan_in; ++i) {
            uint64_t key = uint64_t(bits[i]) << 32;
            if (shift < 32) {
              if (key >> 32 != prefix >> 32) continue;
              key |= r_.tie(row * r_.size.fan_in + i);
            }
            f(slab, key);
          }
        }
      }
    });
  }

  // The 16 bits at `shift` of the rank-th smallest key that has the prefix above them.
  uint64_t next_digit(uint64_t prefix, int shift, int64_t* rank) const {
    std::vector<int64_t> bins(size_t(slabs_ * kBins), 0);
    for_each(prefix, shift, [&](int64_t slab, uint64_t key) {
      if (shift < 48 && (key >> (shift + 16)) != (prefix >> (shift + 16))) return;
      ++bins[size_t(slab * kBins + int64_t((key >> shift) & (kBins - 1)))];
    });
    for (int64_t digit = 0;; ++digit) {
      int64_t here = 0;
      for (int64_t slab = 0; slab < slabs_; ++slab) here += bins[size_t(slab * kBins + digit)];
      if (*rank <= here) return uint64_t(digit);
      *rank -= here;
    }
  }

  std::vector<int64_t> count_equal(uint64_t wanted) const {
    std::vector<int64_t> found(size_t(slabs_), 0);
    for_each(wanted, 0, [&](int64_t slab, uint64_t key) { found[size_t(slab)] += key == wanted; });
    return found;
  }

  const Rewiring& r_;
  const T* weight_;
  int64_t slabs_;
};

// Gives the dropped connections of a row new inputs.
template <class Index>
class Regrowth {
 public:
  explicit Regrowth(const Rewiring& r) : r_(r), taken_(size_t(r.size.in_features), 0) {}

  void row(int64_t row, const std::vector<int64_t>& dropped, Index* columns) {
    const int64_t first = row * r_.size.fan_in;
    if (r_.allow_duplicates) {
      for (int64_t f : dropped) columns[f] = Index(r_.draw(first + f, 0));
      return;
    }
    for (int64_t f : dropped) columns[f] = Index(-1);
    for (int64_t f = 0; f < r_.size.fan_in; ++f)
      if (columns[f] >= 0) taken_[size_t(columns[f])] = 1;
    std::vector<int64_t> waiting(dropped.begin(), dropped.end()), still;
    for (int attempt = 0; attempt < kDrawRounds && !waiting.empty(); ++attempt) {
      still.clear();
      for (int64_t f : waiting)
        if (!take(r_.draw(first + f, attempt), columns + f)) still.push_back(f);
      waiting.swap(still);
    }
    for (int64_t f : waiting) {
      int64_t column = r_.draw(first + f, kDrawRounds - 1);
      while (!take(column, columns + f)) column = (column + 1) % r_.size.in_features;
    }
    for (int64_t f = 0; f < r_.size.fan_in; ++f) taken_[size_t(columns[f])] = 0;
  }

 private:
  bool take(int64_t column, Index* target) {
    if (taken_[size_t(column)]) return false;
    taken_[size_t(column)] = 1;
    *target = Index(column);
    return true;
  }

  const Rewiring& r_;
  std::vector<uint8_t> taken_;  // of the row at hand
};

struct StateSlots {
  char* data;
  int64_t element;
};

template <class T, class Index>
int64_t rewire(const Rewiring& r, T* weight, Index* indices, const std::vector<StateSlots>& state) {
  const FanInSizes& size = r.size;
  const auto& kernels = fan_in_kernels<T>();
  const LayerSelect<T> select(r, weight);
  Limit limit;
  const bool by_layer = r.criterion == kFraction && r.scope == kLayer;
  if (by_layer) limit = select.smallest(int64_t(r.amount * double(size.rows * size.fan_in) + 0.5));
  const int64_t per_row = int64_t(r.amount * double(size.fan_in) + 0.5);
  const float threshold = float(r.amount);
  std::vector<int64_t> changed(size_t(select.slabs()), 0);
  parallel_for(select.slabs(), 1, [&](int64_t begin, int64_t end) {
    Scores<T> scores(size, weight);
    Regrowth<Index> regrowth(r);
    std::vector<int64_t> dropped;
    std::vector<std::pair<uint64_t, int64_t>> order;
    for (int64_t slab = begin; slab < end; ++slab) {
      int64_t equal = by_layer ? limit.equal[size_t(slab)] : 0;
      for (int64_t row = select.first_row(slab); row < select.first_row(slab + 1); ++row) {
        const uint32_t* bits = scores.row(row);
        const auto key_of = [&](int64_t f) {
          return uint64_t(bits[f]) << 32 | r.tie(row * size.fan_in + f);
        };
        dropped.clear();
        if (r.criterion == kThreshold) {
          for (int64_t f = 0; f < size.fan_in; ++f) {
            float score;
            std::memcpy(&score, bits + f, sizeof(score));
            if (score < threshold) dropped.push_back(f);
          }
        } else if (by_layer) {
          for (int64_t f = 0; f < size.fan_in; ++f) {
            if (bits[f] > uint32_t(limit.key >> 32)) continue;
            const uint64_t key = key_of(f);
            if (key < limit.key || (key == limit.key && equal-- > 0)) dropped.push_back(f);
          }
        } else {
          order.clear();
          for (int64_t f = 0; f < size.fan_in; ++f) order.emplace_back(key_of(f), f);
          std::partial_sort(order.begin(), order.begin() + per_row, order.end());
          for (int64_t i = 0; i < per_row; ++i) dropped.push_back(order[size_t(i)].second);
          std::sort(dropped.begin(), dropped.end());
        }
        if (dropped.empty()) continue;
        changed[size_t(slab)] += int64_t(dropped.size());
        regrowth.row(row, dropped, indices + row * size.fan_in);
        const int64_t label_end = std::min((row + 1) * size.group_size, size.out_features);
        for (int64_t label = row * size.group_size; label < label_end; ++label) {
          for (int64_t f : dropped) {
            const int64_t element = label * size.fan_in + f;
            const float value = r.init_scale == 0.0f ? 0.0f : r.init(element);
            kernels.narrow(&value, 1, weight + element);
            for (const StateSlots& slots : state)
              std::memset(slots.data + element * slots.element, 0, size_t(slots.element));
          }
        }
      }
    }
  });
  int64_t total = 0;
  for (int64_t part : changed) total += part;
  return total;
}

Tensor fan_in_rewire(const Tensor& weight, const Tensor& indices, const std::vector<Tensor>& state,
                     int64_t in_features, int64_t group_size, int64_t criterion, int64_t scope,
                     double amount, double init_scale, bool allow_duplicates, int64_t seed) {
  const FanInSizes size = check_fan_in_rewire(weight, indices, state, in_features, group_size,
                                              criterion, scope, amount, allow_duplicates);
  std::vector<StateSlots> slots;
  for (const Tensor& moments : state) {
    slots.push_back({mutable_data<char>(moments), int64_t(moments.element_size())});
  }
  Tensor count = torch::stable::new_empty(weight, std::vector<int64_t>{}, ScalarType::Long);
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    check_index_range<T>(size, indices);
    const Rewiring r{size,
                     Criterion(criterion),
                     Scope(scope),
                     amount,
                     float(init_scale),
                     allow_duplicates,
                     split_mix(uint64_t(seed))};
    T* values = mutable_data<T>(weight);
    *mutable_data<int64_t>(count) = indices.scalar_type() == ScalarType::Short
                                        ? rewire(r, values, mutable_data<int16_t>(indices), slots)
                                        : rewire(r, values, mutable_data<int32_t>(indices), slots);
  });
  return count;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) { m.impl("fan_in_rewire", TORCH_BOX(&fan_in_rewire)); }

}  // namespace recsparse
