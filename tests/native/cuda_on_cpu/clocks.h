// Which events of a block's threads each thread knows to be over: vector clocks. Barriers of the
// whole block and __syncwarp need none of this; named barriers and mbarriers do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_on_cpu {

class Clocks {
 public:
  // By thread; after the threads, for each mbarrier how many of its phases have been waited for.
  using Time = std::vector<uint32_t>;
  static constexpr size_t kMaxBarriers = 64;

  void reset(size_t threads) {
    threads_ = threads;
    times_.clear();
  }
  // Nothing is kept before a kernel asks for it: every thread's time is 1 until then.
  void start() {
    if (on()) return;
    times_.assign(threads_, zero());
    for (size_t i = 0; i < threads_; ++i) times_[i][i] = 1;
  }
  bool on() const { return !times_.empty(); }
  Time zero() const { return Time(threads_ + kMaxBarriers, 0); }
  size_t phases_of(size_t barrier) const { return threads_ + barrier; }  // its entry

  uint32_t now(size_t thread) const { return on() ? times_[thread][thread] : 1; }
  bool knows(size_t thread, size_t other, uint32_t time) const {
    return on() && times_[thread][other] >= time;
  }
  // What a thread gives to those that wait for it; what it does from now on is later.
  Time release(size_t thread) {
    Time all = times_[thread];
    ++times_[thread][thread];
    return all;
  }
  void acquire(size_t thread, const Time& from) { join(times_[thread], from); }
  // All of them wait for each other.
  void meet(const std::vector<size_t>& threads) {
    if (!on()) return;
    Time all;
    for (const size_t t : threads) join(all, release(t));
    for (const size_t t : threads) join(times_[t], all);
  }

  static void join(Time& to, const Time& from) {
    if (to.size() < from.size()) to.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); ++i)
      if (from[i] > to[i]) to[i] = from[i];
  }

 private:
  size_t threads_ = 0;
  std::vector<Time> times_;
};

}  // namespace cuda_on_cpu
