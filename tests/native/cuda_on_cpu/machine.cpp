#include "machine.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fibre.h"
#include "machine_parts.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // reserved; what a thread does not touch costs nothing
constexpr size_t kMaxShared = 227 << 10;   // of a block, on the largest GPU
constexpr size_t kMaxStaticShared = 48 << 10;
constexpr size_t kGap = 256;  // between shared arrays: an index past the end lands here
constexpr size_t kArena = kMaxShared + 128 * kGap;
constexpr int kWarpSize = 32;

enum class State { kReady, kAtBarrier, kAtCollective, kWaiting, kDone };

struct Copy {
  std::byte* shared;
  std::byte data[16];
  size_t bytes;
};

struct Thread {
  Fibre fibre;
  std::byte* stack = nullptr;
  State state = State::kReady;
  uint3 index = {};
  uint32_t warp_epoch = 0;  // grows with every __syncwarp; after one, equal in its lanes
  const char* waits_for = "";
  Site site;
  int result = 0;               // of the barrier it waited at
  std::function<bool()> ready;  // what it waits for
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Collective {
  uint32_t mask = 0, arrived = 0, left = 0;
  const char* name = "";
  Site site;
  size_t bytes = 0;
  alignas(16) std::byte values[kWarpSize][kMaxExchange];
};

struct Range {
  uintptr_t begin, end;
  bool writable;
  int scope;
  std::vector<uint32_t> writers;  // by byte: 1 + block of the launch; empty until written
};

struct SharedArray {
  const void* key;
  size_t offset, bytes;
};

class Machine {
 public:
  Machine()
      : arena_(static_cast<std::byte*>(std::aligned_alloc(1024, (kArena + 1023) / 1024 * 1024))) {
    shadow_.resize(kArena);
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          auto* m = static_cast<Machine*>(self);
          const auto here = reinterpret_cast<uintptr_t>(&threadIdx);
          uintptr_t low = UINTPTR_MAX, high = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_LOAD) {
              const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
              low = std::min(low, begin);
              high = std::max(high, begin + info->dlpi_phdr[i].p_memsz);
            }
          if (here < low || here >= high) return 0;
          m->image_begin_ = low, m->image_end_ = high;
          return 1;
        },
        this);
  }

  // ---- scopes and memory ----
  int open_scope() { return ++scope_; }
  void close_scope(int scope) {
    std::erase_if(ranges_, [&](const Range& r) { return r.scope >= scope; });
    scope_ = scope - 1;
    last_range_ = 0;
  }
  void register_memory(const void* p, size_t bytes, bool writable) {
    const auto begin = reinterpret_cast<uintptr_t>(p);
    if (!bytes) return;
    for (Range& r : ranges_)
      if (r.begin == begin && r.end == begin + bytes) {
        r.writable |= writable;
        return;
      }
    ranges_.push_back({begin, begin + bytes, writable, scope_, {}});
  }

  // ---- the schedule ----
  void set_order(Order order, uint64_t seed) {
    order_ = order;
    random_.seed(seed);
  }

  int architecture_ = 80;
  std::string launched_;

  void run(const Launch& launch) {
    launched_ += std::string(launch.name) + " ";
    const size_t count = size_t(launch.block[0] * launch.block[1] * launch.block[2]);
    launch_ = &launch;
    static_bytes_ = 0;
    if (launch.shared_bytes < 0 || size_t(launch.shared_bytes) > kMaxShared)
      throw std::runtime_error(std::string("cuda_on_cpu: kernel ") + launch.name + " asks for " +
                               std::to_string(launch.shared_bytes) + " bytes of shared memory");
    for (Range& r : ranges_) std::fill(r.writers.begin(), r.writers.end(), 0);
    while (threads_.size() < count) {
      threads_.push_back(std::make_unique<Thread>());
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      threads_.back()->stack = static_cast<std::byte*>(stack);
    }
    gridDim = {unsigned(launch.grid[0]), unsigned(launch.grid[1]), unsigned(launch.grid[2])};
    blockDim = {unsigned(launch.block[0]), unsigned(launch.block[1]), unsigned(launch.block[2])};
    count_ = count;
    block_ = 0;
    for (unsigned z = 0; z < gridDim.z; ++z)
      for (unsigned y = 0; y < gridDim.y; ++y)
        for (unsigned x = 0; x < gridDim.x; ++x, ++block_) {
          blockIdx = {x, y, z};
          run_block();
        }
    launch_ = nullptr;
  }

  // ---- what running threads ask for ----

  [[noreturn]] void fail(const std::string& message) {
    busy_ = true;
    if (!running_) throw std::runtime_error("cuda_on_cpu: " + message);
    error_ = "cuda_on_cpu: kernel " + std::string(launch_->name) + ", block " + place(blockIdx) +
             ", thread " + place(threadIdx) + ": " + message;
    Thread* thread = running_;
    running_ = nullptr;
    switch_fibre(thread->fibre, main_);
    std::abort();  // a failed thread is never continued
  }

  int barrier(Site site, int value, int combine) {
    Thread& self = *running_;
    if (at_barrier_ && (site.line() != barrier_site_.line() || combine != barrier_combine_))
      fail("a barrier at " + at(site) + " while others wait at the one at " + at(barrier_site_));
    if (!at_barrier_) barrier_value_ = combine == 1;
    barrier_site_ = site;
    barrier_combine_ = combine;
    if (combine == 0) barrier_value_ += value != 0;
    if (combine == 1) barrier_value_ &= value != 0;
    if (combine == 2) barrier_value_ |= value != 0;
    ++at_barrier_;
    self.state = State::kAtBarrier;
    self.site = site;
    self.waits_for = "__syncthreads";
    release_barrier();
    if (self.state != State::kReady) yield();
    return self.result;
  }

  void exchange(uint32_t mask, const char* name, Site site, const void* value, size_t bytes,
                void* all) {
    const int lane = this->lane(), warp = int(linear() / kWarpSize);
    if (bytes > kMaxExchange) fail("an exchange of too many bytes");
    if (!(mask >> lane & 1))
      fail(std::string(name) + " at " + at(site) + ": the lane is not in its own mask");
    Collective* joined = nullptr;
    for (auto& c : collectives_[size_t(warp)]) {
      if (c->arrived == c->mask) continue;  // complete, some lanes have yet to read
      if (!(c->mask & mask)) continue;
      if (c->mask != mask || std::strcmp(c->name, name) || c->site.line() != site.line())
        fail(std::string("divergent warp: ") + name + " at " + at(site) +
             " while lanes of it wait in " + c->name + " at " + at(c->site));
      joined = c.get();
    }
    if (!joined) {
      auto& list = collectives_[size_t(warp)];
      auto spare = std::find_if(list.begin(), list.end(), [](const auto& c) {
        return c->arrived == c->mask && c->left == c->mask;
      });
      if (spare == list.end()) spare = list.insert(list.end(), std::make_unique<Collective>());
      joined = spare->get();
      joined->mask = mask, joined->arrived = joined->left = 0;
      joined->name = name, joined->site = site, joined->bytes = bytes;
    }
    if (bytes) std::memcpy(joined->values[lane], value, bytes);
    joined->arrived |= 1u << lane;
    Thread& self = *running_;
    if (joined->arrived != mask) {
      check_lanes_live(*joined, warp);
      self.state = State::kAtCollective;
      self.site = site;
      self.waits_for = name;
      yield();
    } else {
      uint32_t epoch = 0;
      for (int l = 0; l < kWarpSize; ++l)
        if (mask >> l & 1)
          epoch = std::max(epoch, threads_[size_t(warp * kWarpSize + l)]->warp_epoch);
      for (int l = 0; l < kWarpSize; ++l)
        if (mask >> l & 1) {
          Thread& t = *threads_[size_t(warp * kWarpSize + l)];
          if (!bytes)
            t.warp_epoch = epoch + 1;  // shuffles and votes order no memory, __syncwarp does
          t.state = State::kReady;
        }
      if (!bytes && clocks_.on()) {
        std::vector<size_t> lanes;
        for (int l = 0; l < kWarpSize; ++l)
          if (mask >> l & 1) lanes.push_back(size_t(warp * kWarpSize + l));
        clocks_.meet(lanes);
      }
    }
    if (all)
      for (int l = 0; l < kWarpSize; ++l)
        if (mask >> l & 1)
          std::memcpy(static_cast<std::byte*>(all) + size_t(l) * bytes, joined->values[l], bytes);
    joined->left |= 1u << lane;
  }

  int lane() const { return int(linear() % kWarpSize); }

  void* shared_array(const void* key, size_t bytes, size_t alignment) {
    for (const SharedArray& a : arrays_)
      if (a.key == key) return arena_ + a.offset;
    const size_t used = arrays_.empty() ? 0 : arrays_.back().offset + arrays_.back().bytes + kGap;
    const size_t offset = (used + alignment - 1) / alignment * alignment;
    if (key != this) {
      static_bytes_ += bytes;
      if (static_bytes_ > kMaxStaticShared) fail("more than 48 KB of shared arrays");
      if (static_bytes_ + size_t(launch_->shared_bytes) >
          (architecture_ == 90 ? kMaxShared : size_t(99) << 10))
        fail("shared arrays and dynamic shared memory are together more than a block has");
    }
    if (offset + bytes + kGap > kArena) fail("out of shared memory");
    arrays_.push_back({key, offset, bytes});
    std::memset(arena_ + offset, 0xff, bytes);  // NaN
    for (size_t i = 0; i < bytes; ++i) shadow_[offset + i] = {.state = Shadow::kUninitialised};
    return arena_ + offset;
  }

  void* dynamic_shared(size_t byte) {
    if (byte > size_t(launch_->shared_bytes))
      fail("dynamic shared memory past what the launch gave");
    return static_cast<std::byte*>(shared_array(this, size_t(launch_->shared_bytes), 128)) + byte;
  }

  bool is_shared(const void* p) const { return p >= arena_ && p < arena_ + kArena; }

  // ---- every access of a kernel ----

  void access(const void* p, size_t bytes, Access access, const void* from = nullptr) {
    Thread* self = running_;
    if (!self) return;  // host code of the same file
    const auto a = reinterpret_cast<uintptr_t>(p);
    const auto stack = reinterpret_cast<uintptr_t>(self->stack);
    if (a - stack < kStackBytes) {
      if (sm90_is_sum(a, bytes))
        fail("touches the sums of a wgmma under way: wgmma_wait comes first" + code(from));
      return;
    }
    if (is_shared(p)) return access_shared(p, bytes, access, from);
    if (last_range_ < ranges_.size() && access_range(ranges_[last_range_], a, bytes, access))
      return;
    for (size_t i = 0; i < ranges_.size(); ++i)
      if (access_range(ranges_[i], a, bytes, access)) {
        last_range_ = i;
        return;
      }
    if (access == Access::kRead) {
      if (a >= image_begin_ && a + bytes <= image_end_) return;  // constants, threadIdx
      const auto arguments = reinterpret_cast<uintptr_t>(launch_->arguments);
      if (a >= arguments && a + bytes <= arguments + launch_->arguments_bytes) return;
    }
    const char* verb = access == Access::kRead ? "reads " : "writes ";
    for (const Range& r : ranges_)
      if (a >= r.begin && a + bytes <= r.end)
        fail(verb + std::to_string(bytes) + " bytes of an array that is only to be read" +
             code(from));
    std::string near;
    uintptr_t nearest = 4096;  // further off it is no array's edge
    for (const Range& r : ranges_) {
      const std::string size = " an array of " + std::to_string(r.end - r.begin) + " bytes";
      if (a < r.end && a + bytes > r.end) nearest = 0, near = ", over the end of" + size;
      if (a >= r.end && a - r.end < nearest)
        nearest = a - r.end, near = ", " + std::to_string(nearest) + " past the end of" + size;
      if (a < r.begin && r.begin - a < nearest)
        nearest = r.begin - a, near = ", " + std::to_string(nearest) + " before" + size;
    }
    fail(std::string(verb) + std::to_string(bytes) + " bytes out of bounds" + near + code(from));
  }

  void check_alignment(const void* p, size_t bytes, const void* from = nullptr) {
    if (running_ && reinterpret_cast<uintptr_t>(p) % bytes)
      fail("misaligned access of " + std::to_string(bytes) + " bytes" + code(from));
  }

  // ---- cp.async ----

  void copy_async(void* shared, const void* global, size_t bytes, size_t valid) {
    if (!is_shared(shared)) fail("cp.async to what is not shared memory");
    check_alignment(shared, bytes);
    Copy copy = {static_cast<std::byte*>(shared), {}, bytes};
    if (valid) {
      check_alignment(global, bytes);
      access(global, valid, Access::kRead);
      std::memcpy(copy.data, global, valid);
    }
    access(shared, bytes, Access::kWrite);  // nobody may still be reading what was there
    const size_t offset = size_t(copy.shared - arena_);
    for (size_t i = 0; i < bytes; ++i) shadow_[offset + i].state = Shadow::kCopyPending;
    running_->uncommitted.push_back(copy);
  }
  void copy_commit() { running_->groups.push_back(std::exchange(running_->uncommitted, {})); }
  void copy_wait(int pending) {
    while (running_->groups.size() > size_t(pending)) {
      for (const Copy& copy : running_->groups.front()) {
        const size_t offset = size_t(copy.shared - arena_);
        for (size_t i = 0; i < copy.bytes; ++i) shadow_[offset + i].state = Shadow::kInitialised;
        std::memcpy(copy.shared, copy.data, copy.bytes);
        access(copy.shared, copy.bytes, Access::kWrite);
      }
      running_->groups.pop_front();
    }
  }

  // ---- for sm90.cpp ----

  Clocks& clocks() { return clocks_; }
  size_t self() const { return linear(); }
  size_t block_threads() const { return count_; }
  uint32_t block_epoch() const { return epoch_; }
  void wait_until(Site site, const char* what, std::function<bool()> ready) {
    if (ready()) return;
    Thread& self = *running_;
    self.state = State::kWaiting;
    self.site = site;
    self.waits_for = what;
    self.ready = std::move(ready);
    yield();
  }
  size_t shared_offset(const void* p) const {
    return size_t(static_cast<const std::byte*>(p) - arena_);
  }
  std::byte* shared_at(size_t offset) const { return arena_ + offset; }
  Shadow& shadow_at(size_t offset) { return shadow_[offset]; }

  static void thread_main();

  // The linker may give our calls of the standard library's templates the kernels' instrumented
  // copies: what the machine itself accesses is not checked.
  bool busy_ = false;

 private:
  static std::string place(const uint3& p) {
    return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) +
           ")";
  }
  static std::string at(const Site& site) {
    const char* name = std::strrchr(site.file_name(), '/');
    return std::string(name ? name + 1 : site.file_name()) + ":" + std::to_string(site.line());
  }
  // For addr2line -e tests/native/_cuda_on_cpu.so.
  std::string code(const void* from) const {
    if (!from) return "";
    char text[64];
    std::snprintf(text, sizeof text, " (code at %#zx)",
                  size_t(reinterpret_cast<uintptr_t>(from) - image_begin_));
    return text;
  }

  size_t linear() const {
    return (size_t(threadIdx.z) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  }

  void run_block() {
    for (const SharedArray& a : arrays_)
      for (size_t i = 0; i < a.bytes; ++i) shadow_[a.offset + i] = {};
    arrays_.clear();
    static_bytes_ = 0;
    epoch_ = 1;
    at_barrier_ = 0;
    live_ = count_;
    clocks_.reset(count_);
    sm90_begin_block();
    collectives_.resize((count_ + kWarpSize - 1) / kWarpSize);
    for (auto& list : collectives_) list.clear();
    schedule_.resize(count_);
    for (size_t i = 0; i < count_; ++i) {
      Thread& t = *threads_[i];
      t.state = State::kReady;
      t.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                 unsigned(i / blockDim.x / blockDim.y)};
      t.warp_epoch = 0;
      t.uncommitted.clear();
      t.groups.clear();
      t.fibre.prepare(t.stack, kStackBytes, &thread_main);
      schedule_[i] = order_ == Order::kReversed ? count_ - 1 - i : i;
    }
    while (live_) {
      if (order_ == Order::kRandom) std::shuffle(schedule_.begin(), schedule_.end(), random_);
      bool any = false;
      for (const size_t i : schedule_) {
        Thread& t = *threads_[i];
        if (t.state == State::kWaiting && t.ready()) t.state = State::kReady;
        if (t.state != State::kReady) continue;
        any = true;
        running_ = &t;
        threadIdx = t.index;
        switch_fibre(main_, t.fibre);
        running_ = nullptr;
        if (!error_.empty()) throw std::runtime_error(std::exchange(error_, {}));
      }
      // copies end as late as they can
      if (!any && !sm90_deliver(order_ == Order::kRandom ? random_() : 0))
        throw std::runtime_error(deadlock());
    }
  }

  std::string deadlock() const {
    std::string text = "cuda_on_cpu: kernel " + std::string(launch_->name) + ", block " +
                       place(blockIdx) + ": no thread can go on:";
    size_t told = 0;
    for (size_t i = 0; i < count_ && told < 4; ++i) {
      const Thread& t = *threads_[i];
      const bool same =
          i && t.state == threads_[i - 1]->state && t.site.line() == threads_[i - 1]->site.line();
      if (same) continue;
      ++told;
      text += " from thread " + std::to_string(i) + " on: " +
              (t.state == State::kDone ? std::string("ended")
                                       : "in " + std::string(t.waits_for) + " at " + at(t.site)) +
              ";";
    }
    return text;
  }

  void yield() {
    Thread& self = *running_;
    switch_fibre(self.fibre, main_);
    busy_ = true;  // as it was: threads yield in the machine only
  }

  void release_barrier() {
    if (!at_barrier_ || at_barrier_ != live_) return;
    at_barrier_ = 0;
    ++epoch_;
    std::vector<size_t> met;
    for (size_t i = 0; i < count_; ++i) {
      Thread& t = *threads_[i];
      if (t.state != State::kAtBarrier) continue;
      met.push_back(i);
      t.state = State::kReady;
      t.result = barrier_value_;
    }
    clocks_.meet(met);
  }

  void check_lanes_live(const Collective& c, int warp) {
    for (int l = 0; l < kWarpSize; ++l) {
      if (!(c.mask >> l & 1)) continue;
      const size_t i = size_t(warp * kWarpSize + l);
      if (i >= count_ || threads_[i]->state == State::kDone)
        fail(std::string("divergent warp: ") + c.name + " at " + at(c.site) + " waits for lane " +
             std::to_string(l) + ", which has ended or never was");
    }
  }

  void end_thread() {
    Thread& self = *running_;
    if (!self.uncommitted.empty() || std::any_of(self.groups.begin(), self.groups.end(),
                                                 [](const auto& group) { return !group.empty(); }))
      fail("the kernel ended with cp.async under way");
    if (const char* why = sm90_end_thread(live_ == 1)) fail(why);
    self.state = State::kDone;
    --live_;
    const int warp = int(linear() / kWarpSize);
    for (auto& c : collectives_[size_t(warp)])
      if (c->arrived != c->mask && (c->mask >> lane() & 1)) check_lanes_live(*c, warp);
    release_barrier();
    switch_fibre(self.fibre, main_);
    std::abort();
  }

  bool access_range(Range& r, uintptr_t a, size_t bytes, Access access) {
    if (a < r.begin || a + bytes > r.end) return false;
    if (access == Access::kRead) return true;
    if (!r.writable) return false;
    if (r.writers.empty()) r.writers.resize(r.end - r.begin);
    const uint32_t atomics = UINT32_MAX;
    const uint32_t me = access == Access::kAtomic ? atomics : uint32_t(block_ + 1);
    for (size_t i = a - r.begin; i < a - r.begin + bytes; ++i) {
      if (r.writers[i] && r.writers[i] != me && me != atomics && r.writers[i] != atomics)
        fail("writes what block " + std::to_string(r.writers[i] - 1) + " has written too (byte " +
             std::to_string(i) + " of an array of " + std::to_string(r.end - r.begin) + ")");
      r.writers[i] = me;
    }
    return true;
  }

  void access_shared(const void* p, size_t bytes, Access access, const void* from) {
    const size_t offset = size_t(static_cast<const std::byte*>(p) - arena_);
    const auto me = int16_t(linear());
    const auto warp = int16_t(me / kWarpSize);
    const uint32_t now = running_->warp_epoch;
    if (access != Access::kRead && sm90_reads()) sm90_check_write(offset, bytes);
    for (size_t i = offset; i < offset + bytes; ++i) {
      Shadow& s = shadow_[i];
      if (s.state == Shadow::kBulkPending)
        fail("shared memory that a bulk copy has yet to fill" + code(from));
      if (s.state == Shadow::kBarrier) fail("an ordinary access to an mbarrier" + code(from));
      if (s.state == Shadow::kGapByte) fail("out of bounds of a shared array" + code(from));
      if (s.state == Shadow::kCopyPending)
        fail("shared memory that a cp.async has yet to fill" + code(from));
      if (s.state == Shadow::kUninitialised && access != Access::kWrite)
        fail("reads shared memory that nobody has written" + code(from));
      const bool atomic = access == Access::kAtomic;
      // the last write by another thread, with nothing between it and now that orders them
      if (s.writer == Shadow::kCopy &&
          !clocks_.knows(size_t(me), clocks_.phases_of(s.barrier), s.write_time))
        fail("race: shared memory that a bulk copy filled, without a wait for its mbarrier" +
             code(from));
      if (s.writer != Shadow::kNobody && s.writer != Shadow::kCopy && s.writer != me &&
          s.write_epoch == epoch_ && !(atomic && s.writer == Shadow::kAtomics) &&
          !(s.writer >= 0 && s.writer / kWarpSize == warp && s.write_warp_epoch < now) &&
          !(s.writer >= 0 && clocks_.knows(size_t(me), size_t(s.writer), s.write_time)))
        fail("race: shared memory that thread " + std::to_string(s.writer) +
             " wrote since the last barrier" + code(from));
      if (access == Access::kRead) {
        const bool ordered =
            (s.reader != Shadow::kMany && s.reader_warp == warp &&
             s.read_warp_epoch < now) ||  // a __syncwarp since the last reader
            (s.reader >= 0 && clocks_.knows(size_t(me), size_t(s.reader), s.read_time));
        if (s.read_epoch != epoch_ || s.reader == Shadow::kNobody || ordered) {
          s.reader = me;
        } else if (s.reader != me) {
          s.reader = s.reader != Shadow::kMany && s.reader_warp == warp ? Shadow::kManyInAWarp
                                                                        : Shadow::kMany;
        }
        s.read_epoch = epoch_;
        s.reader_warp = warp;
        s.read_warp_epoch = now;
        s.read_time = clocks_.now(size_t(me));
        continue;
      }
      if (s.reader != Shadow::kNobody && s.reader != me && s.read_epoch == epoch_ &&
          !(s.reader != Shadow::kMany && s.reader_warp == warp && s.read_warp_epoch < now) &&
          !(s.reader >= 0 && clocks_.knows(size_t(me), size_t(s.reader), s.read_time)))
        fail("race: writes shared memory that " +
             (s.reader >= 0 ? "thread " + std::to_string(s.reader) + " has"
                            : std::string("other threads have")) +
             " read since the last barrier" + code(from));
      s.state = Shadow::kInitialised;
      s.writer = atomic ? Shadow::kAtomics : me;
      s.write_epoch = epoch_;
      s.write_warp_epoch = now;
      s.write_time = clocks_.now(size_t(me));
      s.write_fences = sm90_fences(size_t(me));
    }
  }

  // the launch
  const Launch* launch_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  size_t count_ = 0, live_ = 0;
  int64_t block_ = 0;
  Fibre main_;
  Thread* running_ = nullptr;
  std::string error_;
  Order order_ = Order::kForward;
  std::mt19937_64 random_;
  std::vector<size_t> schedule_;

  // synchronisation
  uint32_t epoch_ = 1;  // grows with every barrier of the block
  Clocks clocks_;
  size_t at_barrier_ = 0;
  Site barrier_site_;
  int barrier_value_ = 0, barrier_combine_ = 0;
  std::vector<std::vector<std::unique_ptr<Collective>>> collectives_;  // by warp

  // memory
  std::byte* arena_;
  std::vector<Shadow> shadow_;
  std::vector<SharedArray> arrays_;
  size_t static_bytes_ = 0;
  std::vector<Range> ranges_;
  size_t last_range_ = 0;
  int scope_ = 0;
  uintptr_t image_begin_ = 0, image_end_ = 0;
};

Machine& machine() {
  static auto* m = new Machine;
  return *m;
}
std::recursive_mutex one_op_at_a_time;  // threadIdx and the scopes are the process's
thread_local bool in_kernel = false;    // of this operating-system thread

void Machine::thread_main() {
  Machine& m = machine();
  m.busy_ = false;
  m.launch_->body(m.launch_->arguments);
  m.busy_ = true;
  m.end_thread();
}

}  // namespace

Inside::Inside() : before_(std::exchange(machine().busy_, true)) {}
Inside::~Inside() { machine().busy_ = before_; }

void run(const Launch& launch) {
  struct Flag {
    Flag() { in_kernel = true; }
    ~Flag() { in_kernel = false; }
  } flag;
  machine().run(launch);
}
int open_scope() {
  one_op_at_a_time.lock();
  return machine().open_scope();
}
void close_scope(int scope) {
  machine().close_scope(scope);
  one_op_at_a_time.unlock();
}
void register_memory(const void* begin, size_t bytes, bool writable) {
  machine().register_memory(begin, bytes, writable);
}
void set_order(Order order, uint64_t seed) {
  const std::lock_guard<std::recursive_mutex> lock(one_op_at_a_time);
  machine().set_order(order, seed);
}

void set_architecture(int architecture) { machine().architecture_ = architecture; }
int architecture() { return machine().architecture_; }
std::string launched() { return std::exchange(machine().launched_, {}); }

void fail(const std::string& message) { machine().fail(message); }
void check(bool good, const char* message) {
  const Inside inside;
  if (!good) machine().fail(message);
}
void check_alignment(const void* p, size_t bytes) {
  const Inside inside;
  machine().check_alignment(p, bytes);
}
int barrier(Site site, int value, int combine) {
  const Inside inside;
  return machine().barrier(site, value, combine);
}
void exchange(uint32_t mask, const char* name, Site site, const void* value, size_t bytes,
              void* all) {
  const Inside inside;
  machine().exchange(mask, name, site, value, bytes, all);
}
int lane() {
  const Inside inside;
  return machine().lane();
}
void* shared_array(const void* key, size_t bytes, size_t alignment) {
  const Inside inside;
  return machine().shared_array(key, bytes, alignment);
}
void* dynamic_shared(size_t byte) {
  const Inside inside;
  return machine().dynamic_shared(byte);
}
bool is_shared(const void* p) {
  const Inside inside;
  return machine().is_shared(p);
}
void check_access(const void* p, size_t bytes, Access access) {
  const Inside inside;
  machine().access(p, bytes, access);
}

Clocks& clocks() { return machine().clocks(); }
size_t self() { return machine().self(); }
size_t block_threads() { return machine().block_threads(); }
uint32_t block_epoch() { return machine().block_epoch(); }
void wait_until(Site site, const char* what, std::function<bool()> ready) {
  machine().wait_until(site, what, std::move(ready));
}
size_t shared_offset(const void* shared) { return machine().shared_offset(shared); }
std::byte* shared_at(size_t offset) { return machine().shared_at(offset); }
Shadow& shadow_at(size_t offset) { return machine().shadow_at(offset); }

void copy_async(void* shared, const void* global, size_t bytes, size_t valid) {
  const Inside inside;
  machine().copy_async(shared, global, bytes, valid);
}
void copy_commit() {
  const Inside inside;
  machine().copy_commit();
}
void copy_wait(int pending) {
  const Inside inside;
  machine().copy_wait(pending);
}

// What the compiler calls before each access (-fsanitize=thread).
void hook(const void* p, size_t bytes, Access access, size_t alignment, const void* from) {
  if (!in_kernel || machine().busy_) return;
  const Inside inside;
  if (alignment > 1) machine().check_alignment(p, alignment, from);
  machine().access(p, bytes, access, from);
}

}  // namespace cuda_on_cpu

#define RS_HOOKS(n)                                                                       \
  void __tsan_read##n(void* p) {                                                          \
    cuda_on_cpu::hook(p, n, cuda_on_cpu::Access::kRead, n, __builtin_return_address(0));  \
  }                                                                                       \
  void __tsan_write##n(void* p) {                                                         \
    cuda_on_cpu::hook(p, n, cuda_on_cpu::Access::kWrite, n, __builtin_return_address(0)); \
  }                                                                                       \
  void __tsan_unaligned_read##n(void* p) {                                                \
    cuda_on_cpu::hook(p, n, cuda_on_cpu::Access::kRead, 1, __builtin_return_address(0));  \
  }                                                                                       \
  void __tsan_unaligned_write##n(void* p) {                                               \
    cuda_on_cpu::hook(p, n, cuda_on_cpu::Access::kWrite, 1, __builtin_return_address(0)); \
  }
// Atomics of the standard library in host code of the same files.
#define RS_ATOMICS(n, T)                                                                          \
  T __tsan_atomic##n##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); }           \
  void __tsan_atomic##n##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); }           \
  T __tsan_atomic##n##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, 5); } \
  T __tsan_atomic##n##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, 5); } \
  T __tsan_atomic##n##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, 5); } \
  T __tsan_atomic##n##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, 5); } \
  T __tsan_atomic##n##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, 5); }   \
  int __tsan_atomic##n##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {            \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                                     \
  }                                                                                               \
  int __tsan_atomic##n##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) {              \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                                     \
  }
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
RS_HOOKS(1)
RS_HOOKS(2)
RS_HOOKS(4)
RS_HOOKS(8)
RS_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  cuda_on_cpu::hook(p, bytes, cuda_on_cpu::Access::kRead, 1, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  cuda_on_cpu::hook(p, bytes, cuda_on_cpu::Access::kWrite, 1, __builtin_return_address(0));
}
RS_ATOMICS(8, unsigned char)
RS_ATOMICS(16, unsigned short)
RS_ATOMICS(32, unsigned)
RS_ATOMICS(64, unsigned long)
}

// ---- atomics of kernels ----
#define RS_DEFINE_ATOMIC(name, T, update)                                  \
  T name(T* p, T value) {                                                  \
    cuda_on_cpu::check_alignment(p, sizeof(T));                            \
    cuda_on_cpu::check_access(p, sizeof(T), cuda_on_cpu::Access::kAtomic); \
    const T old = *p;                                                      \
    *p = update;                                                           \
    return old;                                                            \
  }
#define RS_DEFINE_ATOMICS(T)                                               \
  RS_DEFINE_ATOMIC(atomicAdd, T, static_cast<T>(old + value))              \
  RS_DEFINE_ATOMIC(atomicExch, T, value)                                   \
  RS_DEFINE_ATOMIC(atomicMin, T, std::min(old, value))                     \
  RS_DEFINE_ATOMIC(atomicMax, T, std::max(old, value))                     \
  RS_DEFINE_ATOMIC(atomicOr, T, static_cast<T>(old | value))               \
  RS_DEFINE_ATOMIC(atomicAnd, T, static_cast<T>(old & value))              \
  RS_DEFINE_ATOMIC(atomicXor, T, static_cast<T>(old ^ value))              \
  T atomicCAS(T* p, T expected, T value) {                                 \
    cuda_on_cpu::check_alignment(p, sizeof(T));                            \
    cuda_on_cpu::check_access(p, sizeof(T), cuda_on_cpu::Access::kAtomic); \
    const T old = *p;                                                      \
    if (old == expected) *p = value;                                       \
    return old;                                                            \
  }
RS_DEFINE_ATOMICS(int)
RS_DEFINE_ATOMICS(unsigned)
RS_DEFINE_ATOMICS(unsigned long long)
RS_DEFINE_ATOMIC(atomicAdd, float, old + value)
RS_DEFINE_ATOMIC(atomicAdd, double, old + value)
RS_DEFINE_ATOMIC(atomicExch, float, value)

// What the compiler calls where an access is misaligned for its type, or an index is past the end
// of an array whose size it knows (-fsanitize=alignment,bounds).
namespace {
struct SourcePlace {
  const char* file;
  uint32_t line, column;
};
std::string told(const SourcePlace* place) {
  return std::string(place->file) + ":" + std::to_string(place->line);
}
}  // namespace
extern "C" {
void __ubsan_handle_type_mismatch_v1(const SourcePlace* place, uintptr_t p) {
  if (!cuda_on_cpu::in_kernel || cuda_on_cpu::machine().busy_) return;
  const cuda_on_cpu::Inside inside;
  cuda_on_cpu::fail("misaligned access at " + told(place) + (p ? "" : ", through a null pointer"));
}
void __ubsan_handle_out_of_bounds(const SourcePlace* place, uintptr_t index) {
  if (!cuda_on_cpu::in_kernel || cuda_on_cpu::machine().busy_) return;
  const cuda_on_cpu::Inside inside;
  cuda_on_cpu::fail("index " + std::to_string(intptr_t(index)) + " is out of bounds at " +
                    told(place));
}
}
