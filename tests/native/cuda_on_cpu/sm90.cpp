#include "sm90.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "machine_parts.h"

namespace cuda_on_cpu {
namespace {

constexpr int kGroup = 128;             // threads of a warpgroup
constexpr int kDepth = 32, kKept = 16;  // columns of a product's A, and those that are kept

// When a thread did something; 0: it has not.
struct Moment {
  uint32_t time = 0, epoch = 0;
};
Moment now(size_t thread) { return {clocks().now(thread), block_epoch()}; }
// Whether what `other` did then is over for `thread`.
bool known(size_t thread, size_t other, const Moment& then) {
  if (!then.time) return false;
  return thread == other || then.epoch != block_epoch() || clocks().knows(thread, other, then.time);
}

struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // that the phase still expects
  int phases = 0;     // that have ended
  int copies = 0;     // under way for it
  size_t index = 0;   // among the block's
  size_t owner = 0;
  Moment made, announced;  // initialised by the owner; and made known to bulk copies
  Clocks::Time arriving, ended;
};

struct BulkLoad {
  TensorMap map;
  size_t offset;  // in shared memory
  int column, row;
  size_t barrier;
};
struct BulkGroup {
  size_t thread;
  Moment ended;
};

// One wgmma of the warpgroup whose first thread is `first`.
struct Product {
  SparseProduct shape;
  size_t first;
  int arrived = 0;
  std::array<uint32_t, kGroup> metadata = {};
  std::array<Moment, kGroup> ended = {};  // when each thread had waited for it
  std::vector<float> a, b;                // [64][kKept], [columns][kDepth]
};

// Shared memory that something asynchronous reads.
struct Read {
  size_t begin, end;
  std::shared_ptr<BulkGroup> store;
  std::shared_ptr<Product> product;
};

struct PendingProduct {
  std::shared_ptr<Product> product;
  float* d;
};
struct ThreadState {
  uint32_t fences = 0;
  std::shared_ptr<BulkGroup> uncommitted_stores;
  std::deque<std::shared_ptr<BulkGroup>> stores;
  bool products_fenced = false;
  size_t products = 0;  // issued so far
  std::vector<PendingProduct> uncommitted;
  std::deque<std::vector<PendingProduct>> groups;
};
struct NamedBarrier {
  uint64_t generation = 0;
  int wanted = 0;
  std::vector<size_t> arrived;
};

std::map<size_t, Mbarrier> barriers;
std::vector<BulkLoad> loads;
std::vector<Read> reads;
std::vector<ThreadState> threads;
std::map<size_t, std::vector<std::shared_ptr<Product>>> products;  // by first thread, in order
std::array<NamedBarrier, 16> named;

ThreadState& mine() {
  clocks().start();
  if (threads.empty()) threads.resize(block_threads());
  return threads[self()];
}

Mbarrier& barrier_at(uint64_t* at) {
  mine();
  const auto found = is_shared(at) ? barriers.find(shared_offset(at)) : barriers.end();
  if (found == barriers.end()) fail("an mbarrier that was never initialised");
  Mbarrier& b = found->second;
  if (!known(self(), b.owner, b.made))
    fail("an mbarrier used before the thread can know that it is initialised");
  return b;
}
void end_phase(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  if (b.copies)
    fail("a phase of an mbarrier ends with copies for it under way: it expects too few bytes");
  ++b.phases;
  b.pending = b.arrivals;
  b.ended = std::exchange(b.arriving, {});
}

// The 16-byte pieces of 8 (4) rows of 128 (64) bytes are permuted by what the row is.
size_t swizzled(size_t address, int row_bytes) {
  return address ^ (address >> 3 & (row_bytes == 128 ? 0x70 : 0x30));
}

// f(offset in shared memory, global memory or null, bytes of that) for the box's 16-byte pieces.
template <class F>
void for_pieces(const TensorMap& map, size_t offset, int column, int row, F f) {
  const int row_bytes = map.box_columns * map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r)
    for (int at = 0; at < row_bytes; at += 16) {
      const size_t to = offset + size_t(r * row_bytes + at);
      const int64_t y = int64_t(row) + r, x = int64_t(column) * map.element_bytes + at;
      const int64_t left = map.columns * map.element_bytes - x;
      const bool inside = y >= 0 && y < map.rows && x >= 0 && left > 0;
      f(map.swizzle ? swizzled(to, map.swizzle) : to,
        inside ? static_cast<const std::byte*>(map.at) + y * map.row_bytes + x : nullptr,
        inside ? size_t(std::min<int64_t>(left, 16)) : 0);
    }
}
size_t check_box(const TensorMap& map, const void* shared) {
  check(map.at != nullptr, "a bulk copy by a tensor map that was never made");
  check(is_shared(shared), "a bulk copy to or from what is not shared memory");
  check_alignment(shared, map.swizzle ? size_t(8 * map.swizzle) : 128);
  return size_t(map.box_rows * map.box_columns * map.element_bytes);
}

// Bytes that something asynchronous is going to read: written, by threads that fenced their writes,
// or by a copy, and known to `reader`s.
void check_readable(size_t begin, size_t end, size_t first_reader, size_t readers) {
  size_t last_writer = SIZE_MAX;
  Moment last;
  for (size_t i = begin; i < end; ++i) {
    const Shadow& s = shadow_at(i);
    if (s.state == Shadow::kGapByte) fail("out of bounds of a shared array");
    if (s.state == Shadow::kBulkPending) fail("shared memory that a bulk copy has yet to fill");
    if (s.state != Shadow::kInitialised) fail("reads shared memory that nobody has written");
    const bool copy = s.writer == Shadow::kCopy;
    if (!copy && s.writer < 0) fail("asynchronous reads of what atomics wrote are not modelled");
    const size_t writer = copy ? clocks().phases_of(s.barrier) : size_t(s.writer);
    // no epoch: a barrier of the block says nothing of copies
    const Moment then = {s.write_time, copy ? block_epoch() : s.write_epoch};
    if (writer == last_writer && then.time == last.time && then.epoch == last.epoch) continue;
    last_writer = writer, last = then;
    if (!copy && threads[writer].fences <= s.write_fences)
      fail("an asynchronous read of what thread " + std::to_string(writer) +
           " wrote, with no fence_proxy_async after it");
    for (size_t reader = first_reader; reader < first_reader + readers; ++reader)
      if (!known(reader, writer, then))
        fail(
            copy
                ? "shared memory that a bulk copy filled, without a wait for its mbarrier by thread " +
                      std::to_string(reader)
                : "race: an asynchronous read of what thread " + std::to_string(writer) + " wrote");
  }
}

// Whether nothing of it is still read, as far as the thread can know.
bool over(const Read& read, size_t thread) {
  if (read.store) return known(thread, read.store->thread, read.store->ended);
  const Product& p = *read.product;
  for (size_t warp = 0; warp < kGroup; warp += 32) {
    bool ended = false;
    for (size_t i = warp; i < warp + 32; ++i) ended |= known(thread, p.first + i, p.ended[i]);
    if (!ended) return false;
  }
  return true;
}

// A matrix in shared memory by its descriptor, k along rows of 128 or 64 bytes.
struct Tile {
  size_t start;  // of the rows, and how far into them
  size_t k_bytes;
  int row_bytes;
  size_t eight_rows;
};
Tile tile_of(uint64_t descriptor) {
  const auto mode = int(descriptor >> 62);
  if (mode != 1 && mode != 2) fail("wgmma: a swizzle that is not modelled");
  if (descriptor >> 49 & 7) fail("wgmma: a base offset is not modelled");
  const int row_bytes = mode == 1 ? 128 : 64;
  const size_t address = (descriptor & 0x3fff) * 16, k_bytes = address % size_t(row_bytes);
  if ((address - k_bytes) % size_t(8 * row_bytes))
    fail("wgmma: a tile that does not begin where its swizzle does");
  return {address - k_bytes, k_bytes, row_bytes, (descriptor >> 32 & 0x3fff) * 16};
}
size_t tile_row(const Tile& tile, int row) {
  return tile.start + size_t(row / 8) * tile.eight_rows + size_t(row % 8 * tile.row_bytes);
}
// rows x k elements as floats.
std::vector<float> read_tile(const std::shared_ptr<Product>& product, const Tile& tile, int rows,
                             int k) {
  if (tile.k_bytes + size_t(2 * k) > size_t(tile.row_bytes))
    fail("wgmma: columns past the end of the tile's rows");
  std::vector<float> out(size_t(rows) * size_t(k));
  for (int r = 0; r < rows; ++r) {
    const size_t row = tile_row(tile, r);
    for (int j = 0; j < k; j += 8) {
      const size_t at = swizzled(row + tile.k_bytes + size_t(2 * j), tile.row_bytes);
      check_readable(at, at + 16, product->first, kGroup);
      for (int e = 0; e < 8; ++e) {
        uint16_t bits;
        std::memcpy(&bits, shared_at(at + size_t(2 * e)), 2);
        out[size_t(r * k + j + e)] =
            product->shape.brain ? __bfloat162float({bits}) : __half2float({bits});
      }
    }
  }
  for (int r = 0; r < rows; r += 8)
    reads.push_back(
        {tile_row(tile, r), tile_row(tile, r + 7) + size_t(tile.row_bytes), {}, product});
  return out;
}

// Where in its group of four kept value j of a row is.
int place(const Product& p, int row, int j) {
  const int lane = row % 8 * 4 + 2 * p.shape.selector + j / 8;
  return int(p.metadata[size_t(row / 16 * 32 + lane)] >> (16 * (row % 16 / 8) + 2 * (j % 8)) & 3);
}

void issue(const std::shared_ptr<Product>& p) {
  p->a = read_tile(p, tile_of(p->shape.a), 64, kKept);
  p->b = read_tile(p, tile_of(p->shape.b), p->shape.columns, kDepth);
  for (int row = 0; row < 64; ++row)
    for (int j = 0; j < kKept; j += 2)
      if (place(*p, row, j) >= place(*p, row, j + 1))
        fail("wgmma.sp: the two places of a group must ascend");
}

// The sums of the running thread: exact products, one rounding of each sum.
void add_product(const Product& p, float* d) {
  const auto thread = int(self() - p.first);
  const int g = thread % 32 / 4, t = thread % 4;
  for (int h = 0; h < 2; ++h) {
    const int row = thread / 32 * 16 + g + 8 * h;
    int k[kKept];
    for (int j = 0; j < kKept; ++j) k[j] = j / 2 * 4 + place(p, row, j);
    for (int i = 2 * h; i < p.shape.columns / 2; i += i % 2 ? 3 : 1) {
      const float* b = p.b.data() + (i / 4 * 8 + 2 * t + i % 2) * kDepth;
      double sum = d[i];
      for (int j = 0; j < kKept; ++j) sum += double(p.a[size_t(row * kKept + j)]) * double(b[k[j]]);
      d[i] = float(sum);
    }
  }
}

}  // namespace

// ---- for the machine ----

void sm90_begin_block() {
  barriers.clear(), loads.clear(), reads.clear(), threads.clear(), products.clear();
  named = {};
}
const char* sm90_end_thread(bool last) {
  if (last && !loads.empty()) return "the kernel ended with bulk copies under way";
  if (threads.empty()) return nullptr;
  const ThreadState& me = threads[self()];
  if (me.uncommitted_stores || !me.stores.empty())
    return "the thread ended with bulk stores under way";
  if (!me.uncommitted.empty() || !me.groups.empty())
    return "the thread ended with products under way";
  return nullptr;
}
uint32_t sm90_fences(size_t thread) { return threads.empty() ? 0 : threads[thread].fences; }
bool sm90_reads() { return !reads.empty(); }
void sm90_check_write(size_t offset, size_t bytes) {
  std::erase_if(reads, [&](const Read& read) {
    if (read.begin >= offset + bytes || read.end <= offset) return false;
    if (!over(read, self()))
      fail(read.store ? "race: writes shared memory that a bulk store still reads"
                      : "race: writes shared memory that a wgmma still reads");
    return read.begin >= offset && read.end <= offset + bytes;
  });
}
bool sm90_is_sum(uintptr_t p, size_t bytes) {
  if (threads.empty()) return false;
  const auto in = [&](const PendingProduct& pending) {
    const auto d = reinterpret_cast<uintptr_t>(pending.d);
    return p < d + 2 * size_t(pending.product->shape.columns) && p + bytes > d;
  };
  const ThreadState& me = threads[self()];
  if (std::any_of(me.uncommitted.begin(), me.uncommitted.end(), in)) return true;
  return std::any_of(me.groups.begin(), me.groups.end(), [&](const auto& group) {
    return std::any_of(group.begin(), group.end(), in);
  });
}
bool sm90_deliver(uint64_t which) {
  if (loads.empty()) return false;
  const auto chosen = loads.begin() + int64_t(which % loads.size());
  const BulkLoad load = *chosen;
  loads.erase(chosen);
  Mbarrier& b = barriers[load.barrier];
  const auto phase = uint32_t(b.phases + 1);
  for_pieces(load.map, load.offset, load.column, load.row,
             [&](size_t to, const std::byte* from, size_t bytes) {
               std::memset(shared_at(to), 0, 16);
               if (bytes) std::memcpy(shared_at(to), from, bytes);
               for (size_t i = to; i < to + 16; ++i) {
                 Shadow& s = shadow_at(i);
                 s.state = Shadow::kInitialised;
                 s.writer = Shadow::kCopy, s.write_time = phase, s.barrier = uint8_t(b.index);
               }
             });
  b.bytes -= load.map.box_rows * load.map.box_columns * load.map.element_bytes;
  --b.copies;
  if (b.bytes < 0) fail("a bulk copy brings more bytes than the phase of its mbarrier expects");
  Clocks::Time brought = clocks().zero();
  brought[clocks().phases_of(b.index)] = phase;
  Clocks::join(b.arriving, brought);
  end_phase(b);
  return true;
}

// ---- for kernels ----

TensorMap encode_tensor_map(const TensorMap& map) {
  const Inside inside;
  const auto wanted = [](bool good, const char* message) {
    if (!good) fail(std::string("a tensor map: ") + message);
  };
  wanted(reinterpret_cast<uintptr_t>(map.at) % 16 == 0, "the matrix is not aligned to 16 bytes");
  wanted(map.row_bytes % 16 == 0, "rows are not multiples of 16 bytes apart");
  wanted(map.row_bytes >= map.columns * map.element_bytes, "rows overlap");
  wanted(map.rows >= 1 && map.columns >= 1, "the matrix is empty");
  wanted(map.rows <= int64_t(1) << 32 && map.columns <= int64_t(1) << 32,
         "the matrix is too large");
  wanted(map.box_rows >= 1 && map.box_rows <= 256, "a box has 1 to 256 rows");
  wanted(map.box_columns >= 1 && map.box_columns <= 256, "a box has 1 to 256 columns");
  const int row = map.box_columns * map.element_bytes;
  wanted(row % 16 == 0, "a box's rows are multiples of 16 bytes");
  wanted(map.swizzle == 0 || map.swizzle == 64 || map.swizzle == 128, "swizzles 64 and 128");
  wanted(map.swizzle == 0 || map.swizzle == row, "a swizzle as wide as the box's rows");
  return map;
}

uint32_t shared_address(const void* shared) {
  const Inside inside;
  check(is_shared(shared), "the shared address of what is not shared memory");
  return uint32_t(shared_offset(shared));
}

void mbarrier_init(uint64_t* barrier, int arrivals) {
  const Inside inside;
  mine();
  check(is_shared(barrier), "an mbarrier that is not in shared memory");
  check_alignment(barrier, 8);
  check(arrivals >= 1, "an mbarrier of no arrivals");
  check_access(barrier, 8, Access::kWrite);
  const size_t at = shared_offset(barrier);
  for (size_t i = at; i < at + 8; ++i) shadow_at(i).state = Shadow::kBarrier;
  check(!barriers.count(at), "an mbarrier is initialised twice");
  check(barriers.size() < Clocks::kMaxBarriers, "more mbarriers than are modelled");
  Mbarrier& b = barriers[at];
  b.index = barriers.size() - 1;
  b.arrivals = b.pending = arrivals;
  b.owner = self(), b.made = now(self());
}
void fence_mbarrier_init() {
  const Inside inside;
  mine();
  for (auto& [at, b] : barriers)
    if (b.owner == self()) b.announced = now(self());
}
void mbarrier_arrive(uint64_t* barrier, int expected_bytes) {
  const Inside inside;
  Mbarrier& b = barrier_at(barrier);
  b.bytes += expected_bytes;
  check(b.bytes < 1 << 20, "an mbarrier counts up to 2^20 - 1 bytes");
  if (--b.pending < 0) fail("more arrivals at an mbarrier than its phase has");
  Clocks::join(b.arriving, clocks().release(self()));
  end_phase(b);
}
void mbarrier_wait(uint64_t* barrier, int parity, Site site) {
  const Inside inside;
  Mbarrier& b = barrier_at(barrier);
  check(parity == 0 || parity == 1, "a parity is 0 or 1");
  wait_until(site, "mbarrier_wait", [&] { return b.phases % 2 != parity; });
  clocks().acquire(self(), b.ended);
}

void load_box(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  const Inside inside;
  Mbarrier& b = barrier_at(barrier);
  if (!known(self(), b.owner, b.announced))
    fail("a bulk copy for an mbarrier with no fence_mbarrier_init");
  const size_t bytes = check_box(map, shared), at = shared_offset(shared);
  check_access(shared, bytes, Access::kWrite);  // nobody may still be reading what was there
  for (size_t i = at; i < at + bytes; ++i) shadow_at(i).state = Shadow::kBulkPending;
  for_pieces(map, at, column, row, [&](size_t, const std::byte* from, size_t count) {
    if (count) check_access(from, count, Access::kRead);
  });
  ++b.copies;
  loads.push_back({map, at, column, row, shared_offset(barrier)});
}
void store_box(const TensorMap& map, const void* shared, int column, int row) {
  const Inside inside;
  ThreadState& me = mine();
  const size_t bytes = check_box(map, shared), at = shared_offset(shared);
  check_readable(at, at + bytes, self(), 1);
  for_pieces(map, at, column, row, [&](size_t from, const std::byte* to, size_t count) {
    if (!count) return;
    check_access(to, count, Access::kWrite);
    std::memcpy(const_cast<std::byte*>(to), shared_at(from), count);
  });
  if (!me.uncommitted_stores) me.uncommitted_stores = std::make_shared<BulkGroup>(self());
  reads.push_back({at, at + bytes, me.uncommitted_stores, {}});
}
void bulk_commit() {
  const Inside inside;
  ThreadState& me = mine();
  auto group = std::exchange(me.uncommitted_stores, {});
  me.stores.push_back(group ? group : std::make_shared<BulkGroup>(self()));
}
void bulk_wait(int pending) {
  const Inside inside;
  ThreadState& me = mine();
  while (me.stores.size() > size_t(pending)) {
    me.stores.front()->ended = now(self());
    me.stores.pop_front();
  }
}
void fence_proxy_async() {
  const Inside inside;
  ++mine().fences;
}

void named_barrier_sync(int barrier, int count, Site site) {
  const Inside inside;
  mine();
  check(barrier >= 0 && barrier < 16, "named barriers are 0 to 15");
  check(count % 32 == 0 && count > 0, "a named barrier is of whole warps");
  NamedBarrier& b = named[size_t(barrier)];
  if (!b.arrived.empty() && b.wanted != count) fail("a named barrier of two sizes");
  b.wanted = count;
  b.arrived.push_back(self());
  if (int(b.arrived.size()) == count) {
    clocks().meet(std::exchange(b.arrived, {}));
    ++b.generation;
  } else {
    wait_until(site, "named_barrier_sync",
               [&b, generation = b.generation] { return b.generation != generation; });
  }
}

void wgmma_fence() {
  const Inside inside;
  mine().products_fenced = true;
}
void wgmma_sp(float* d, const SparseProduct& shape, uint32_t metadata) {
  const Inside inside;
  ThreadState& me = mine();
  check(me.products_fenced, "a product with no wgmma_fence since the last wait");
  const size_t first = self() / kGroup * kGroup;
  auto& all = products[first];
  if (me.products == all.size()) {
    all.push_back(std::make_shared<Product>());
    all.back()->shape = shape;
    all.back()->first = first;
  }
  const auto product = all[me.products++];
  if (!(product->shape == shape)) fail("threads of a warpgroup issue different products");
  product->metadata[self() - first] = metadata;
  me.uncommitted.push_back({product, d});
  if (++product->arrived == kGroup) issue(product);
}
void wgmma_commit() {
  const Inside inside;
  ThreadState& me = mine();
  me.groups.push_back(std::exchange(me.uncommitted, {}));
}
void wgmma_wait(int pending, Site site) {
  const Inside inside;
  ThreadState& me = mine();
  while (me.groups.size() > size_t(pending)) {
    const auto group = me.groups.front();
    wait_until(site, "wgmma_wait", [&] {
      return std::all_of(group.begin(), group.end(),
                         [](const auto& p) { return p.product->arrived == kGroup; });
    });
    for (const PendingProduct& p : group) {
      add_product(*p.product, p.d);
      p.product->ended[self() - p.product->first] = now(self());
    }
    me.groups.pop_front();
  }
  me.products_fenced = false;
}

}  // namespace cuda_on_cpu
