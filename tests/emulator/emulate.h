// A GPU's blocks on a CPU, so that the CUDA kernels' logic is tested where there is no GPU: every thread is a fiber, a warp's
// collective operation happens when its last lane arrives, and asynchronous copies land as late as the program allows. An eager
// emulator is the other way round: bulk copies land at once, and some warps run only when nobody else can, so that what is filled again
// too early shows. Warps run in another order in every cluster, so that a missing barrier often shows; compute-sanitizer
// looks for the rest. One cluster of blocks at a time.
#pragma once
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace ev {

struct EmulatedIndex {
  unsigned x = 0, y = 0;
};
inline EmulatedIndex emulated_thread, emulated_block, emulated_block_size;

struct Lane {
  const void* address = nullptr;
  float* c = nullptr;
  uint32_t a[4], b[2], out[4];
  bool adds = false;
  float value = 0, received = 0;
  int other = 0, predicate = 0;
  long round = 0;  // of the cluster's meeting that it arrived at
};

// Threads that meet: the last to arrive does the work, and nobody leaves before.
struct Meeting {
  int size = 0, arrived = 0;
  long round = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;
  void land() const {
    if (inside) std::memcpy(to, from, bytes);
    else std::memset(to, 0, bytes);
  }
};

// An mbarrier, and the bulk copies that will land on it.
struct Landing {
  int arrivals = 1, arrived = 0, phase = 0, announced = 0, bytes = 0;
  std::vector<Copy> copies;
  void bring(const Copy& copy, bool eager) {
    if (eager) copy.land();
    else copies.push_back(copy);
    bytes += copy.bytes;
  }
};

class Cluster;

struct Block {
  enum : int { kAlignment = 1024 };
  Cluster& cluster;
  int rank;
  std::vector<char> memory;
  std::vector<Lane> lanes;
  std::vector<std::deque<std::vector<Copy>>> copies;
  std::vector<Meeting> warps, groups_of_warps;
  Meeting all;
  std::map<const void*, Landing> landings;

  Block(Cluster& cluster, int rank, int threads, int shared_bytes)
      : cluster(cluster),
        rank(rank),
        memory(shared_bytes + kAlignment, static_cast<char>(0xff)),  // NaN to whoever reads what nobody wrote
        lanes(threads),
        copies(threads),
        warps(threads / 32, Meeting{32}),
        groups_of_warps(threads / 128, Meeting{128}),
        all{threads} {}

  static Block& current();
  void meet(Meeting& meeting, const std::function<void()>& work);
  void meet_warp(const std::function<void(Lane*)>& work) {
    const unsigned warp = emulated_thread.x / 32;
    meet(warps[warp], [&] { work(&lanes[warp * 32]); });
  }
  Lane& lane() { return lanes[emulated_thread.x]; }
  char* shared() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + kAlignment - 1) / kAlignment * kAlignment); }
  std::deque<std::vector<Copy>>& groups() {
    auto& groups = copies[emulated_thread.x];
    if (groups.empty()) groups.emplace_back();
    return groups;
  }
};

class Cluster {
 public:
  static Cluster*& running() {
    static Cluster* cluster = nullptr;
    return cluster;
  }

  Cluster(int blocks, int threads, int shared_bytes) : meeting{blocks * threads}, threads_(threads), fibers_(blocks * threads) {
    for (int rank = 0; rank < blocks; ++rank) this->blocks.push_back(std::make_unique<Block>(*this, rank, threads, shared_bytes));
  }

  void run(unsigned first, std::function<void()> body) {
    enum : size_t { kStack = 64 << 10 };
    running() = this;
    body_ = std::move(body);
    const int threads = static_cast<int>(fibers_.size());
    std::vector<std::unique_ptr<char[]>> stacks(threads);
    std::vector<int> order(threads / 32);
    for (int i = 0; i < threads / 32; ++i) order[i] = i;
    static std::mt19937 random(1);
    std::shuffle(order.begin(), order.end(), random);
    done_.assign(threads, false);
    for (int t = 0; t < threads; ++t) {
      stacks[t].reset(new char[kStack]);
      getcontext(&fibers_[t]);
      fibers_[t].uc_stack.ss_sp = stacks[t].get();
      fibers_[t].uc_stack.ss_size = kStack;
      fibers_[t].uc_link = &main_;
      makecontext(&fibers_[t], [] { running()->enter(); }, 0);
    }
    for (bool alive = true; alive;) {
      alive = progress = false;
      for (int i = 0; i < threads / 32; ++i) {
        const int warp = order[i];
        const bool late = eager && !stalled && i % 4 == 0;
        for (int t = warp * 32; t < warp * 32 + 32; ++t) {
          if (done_[t]) continue;
          alive = true;
          if (late) continue;
          fiber_ = t;
          emulated_thread.x = t % threads_;
          emulated_block.x = first + t / threads_;
          swapcontext(&main_, &fibers_[t]);
        }
      }
      if (progress) {
        stalled = false;
      } else if (++stalls; alive && std::exchange(stalled, true)) {
        std::fprintf(stderr, "emulator: threads wait for each other forever\n");
        std::abort();
      }
    }
  }

  void yield() { swapcontext(&fibers_[fiber_], &main_); }
  Block& block() { return *blocks[fiber_ / threads_]; }

  std::vector<std::unique_ptr<Block>> blocks;
  Meeting meeting;
  bool progress = false, stalled = false;  // stalled: nobody went on in the last round
  static inline bool eager = false;
  unsigned stalls = 0;
  bool chosen(const uint64_t* barrier) const { return (reinterpret_cast<uintptr_t>(barrier) / 8 * 2654435761u + stalls * 40503u) >> 7 & 1; }

 private:
  void enter() {
    const int t = fiber_;
    body_();
    done_[t] = true;
    progress = true;
  }

  int threads_, fiber_ = 0;
  std::function<void()> body_;
  std::vector<bool> done_;
  ucontext_t main_;
  std::vector<ucontext_t> fibers_;
};

inline Block& Block::current() { return Cluster::running()->block(); }

inline void Block::meet(Meeting& meeting, const std::function<void()>& work) {
  const long round = meeting.round;
  if (++meeting.arrived == meeting.size) {
    work();
    meeting.arrived = 0;
    ++meeting.round;
    cluster.progress = true;
    return;
  }
  while (meeting.round == round) cluster.yield();
}

inline char* emulated_shared() { return Block::current().shared(); }

inline void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) std::abort();
  Block::current().groups().back().push_back({shared, global, 16, inside});
}
inline void commit_group() { Block::current().groups().emplace_back(); }
inline void wait_groups(int pending) {
  auto& groups = Block::current().groups();
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) copy.land();
    groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  Block& block = Block::current();
  block.lane().address = row;
  block.meet_warp([](Lane* lanes) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) std::memcpy(&lanes[l].out[m], static_cast<const char*>(lanes[m * 8 + l / 4].address) + l % 4 * 4, 4);
  });
  std::memcpy(r, block.lane().out, 16);
}

// m16n8kDEPTH: element (row, k) of A lies in lane row % 8 * 4 + k % HALF / EACH, register row / 8 + 2 * (k / HALF), and
// (k, n) of B likewise; EACH elements share a register, HALF is half the depth.
template <int EACH, class Decode>
inline void emulated_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode decode) {
  Block& block = Block::current();
  Lane& mine = block.lane();
  std::memcpy(mine.a, a, 16);
  mine.b[0] = b0;
  mine.b[1] = b1;
  mine.c = c;
  block.meet_warp([&](Lane* lanes) {
    constexpr int half = 4 * EACH;
    for (int row = 0; row < 16; ++row) {
      for (int n = 0; n < 8; ++n) {
        double sum = 0;
        for (int k = 0; k < 2 * half; ++k) {
          const uint32_t left = lanes[row % 8 * 4 + k % half / EACH].a[row / 8 + 2 * (k / half)];
          const uint32_t right = lanes[n * 4 + k % half / EACH].b[k / half];
          sum += static_cast<double>(decode(left, k % EACH)) * decode(right, k % EACH);
        }
        float& out = lanes[row % 8 * 4 + n / 2].c[row / 8 * 2 + n % 2];
        out = static_cast<float>(out + sum);
      }
    }
  });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<2>(c, a, b0, b1, [](uint32_t bits, int i) {
    const uint32_t wide = (i ? bits >> 16 : bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<2>(c, a, b0, b1, [](uint32_t bits, int i) {
    __half_raw raw;
    raw.x = static_cast<unsigned short>(i ? bits >> 16 : bits);
    return __half2float(__half(raw));
  });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<1>(c, a, b0, b1, [](uint32_t bits, int) {
    bits &= 0xffffe000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  });
}
inline void store_16(void* global, const uint32_t (&word)[4]) {
  if (reinterpret_cast<uintptr_t>(global) % 16) std::abort();
  std::memcpy(global, word, 16);
}
inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x1000u) & 0xffffe000u;
}

// --- what sm_90 adds: see cluster.cuh --------------------------------------------------------------------------------------

inline void start(uint64_t* barrier, int arrivals = 1) { Block::current().landings[barrier] = Landing{arrivals}; }
inline void before_bulk_copies() {}
inline Landing& landing(uint64_t* barrier) {
  const auto found = Block::current().landings.find(barrier);
  if (found == Block::current().landings.end()) std::abort();  // nobody has started it
  return found->second;
}
inline void announce(uint64_t* barrier, int bytes) {
  landing(barrier).announced = bytes;
  Block::current().cluster.progress = true;
}
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || bytes <= 0) std::abort();
  landing(barrier).bring({shared, global, bytes, true}, Block::current().cluster.eager);
  Block::current().cluster.progress = true;
}
// If the cluster is not eager, nothing lands before nobody can go on without; then the copies of about half of the barriers do.
inline void wait(uint64_t* barrier, int phase) {
  Cluster& cluster = Block::current().cluster;
  for (Landing& state = landing(barrier); state.phase == phase;) {
    const bool complete = (cluster.eager || cluster.stalled) && state.announced && state.bytes == state.announced;
    if (complete) cluster.progress = true;
    if (complete && (cluster.eager || cluster.chosen(barrier))) {
      for (const Copy& copy : state.copies) copy.land();
      state = Landing{state.arrivals, 0, 1 - phase, 0, 0, {}};
    } else {
      cluster.yield();
    }
  }
}
inline void start_next_kernel() {}
inline void after_earlier_kernels() {}
inline void prefetch(const void* global) { (void)*static_cast<const volatile char*>(global); }

inline int cluster_rank() { return Block::current().rank; }
inline void cluster_arrive() {
  Block& block = Block::current();
  Meeting& meeting = block.cluster.meeting;
  block.lane().round = meeting.round;
  if (++meeting.arrived < meeting.size) return;
  meeting.arrived = 0;
  ++meeting.round;
  block.cluster.progress = true;
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  Block& block = Block::current();
  while (block.cluster.meeting.round == block.lane().round) block.cluster.yield();
}
template <class V>
V load_from(const V* shared, int rank) {
  Block& block = Block::current();
  if (reinterpret_cast<uintptr_t>(shared) % sizeof(V)) std::abort();
  V value;
  std::memcpy(&value, block.cluster.blocks.at(rank)->shared() + (reinterpret_cast<const char*>(shared) - block.shared()), sizeof value);
  return value;
}
inline float4 load_four_from(const float* shared, int rank) { return load_from(reinterpret_cast<const float4*>(shared), rank); }

// --- what sm_90a adds: see warpgroup.cuh -----------------------------------------------------------------------------------

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - Block::current().shared()); }

inline void arrive(uint64_t* barrier) {
  Landing& state = landing(barrier);
  if (++state.arrived < state.arrivals) return;
  state.arrived = 0;
  state.phase = 1 - state.phase;
  Block::current().cluster.progress = true;
}

struct Matrix {
  const char* first;
  int64_t rows, row_bytes, apart;  // bytes
  int box_rows;
};
inline void prefetch_matrix(const Matrix&) {}
inline bool can_encode_matrices() { return true; }
inline bool encode(Matrix& matrix, bool, const void* first, int64_t rows, int64_t columns, int64_t stride, int box_rows, bool = true) {
  matrix = {static_cast<const char*>(first), rows, columns * 2, stride * 2, box_rows};
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && matrix.apart % 16 == 0 && matrix.row_bytes <= matrix.apart && box_rows <= 256;
}

// Byte `at` of shared memory as the swizzle of 128 bytes has it.
inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

inline void copy_box(void* shared, const Matrix& matrix, int column, int row, uint64_t* barrier) {
  const uint32_t to = shared_address(shared);
  if (to % 1024) std::abort();
  for (int r = 0; r < matrix.box_rows; ++r) {
    for (int byte = 0; byte < 128; byte += 16) {
      const int64_t offset = column * 2 + byte;
      const bool inside = row + r < matrix.rows && offset < matrix.row_bytes;
      char* target = Block::current().shared() + swizzled(to + r * 128 + byte);
      landing(barrier).bring({target, inside ? matrix.first + (row + r) * matrix.apart + offset : nullptr, 16, inside}, Block::current().cluster.eager);
    }
  }
  Block::current().cluster.progress = true;
}

inline void meet_warpgroup() {
  Block& block = Block::current();
  block.meet(block.groups_of_warps[emulated_thread.x / 128], [] {});
}
template <int COUNT>
void give_registers() {}
template <int COUNT>
void take_registers() {}

inline void begin_products() {}
inline void commit_products() {}
template <int PENDING, int VALUES>
void finish_products(float (&)[VALUES]) {}

// A row of 32 bytes of the matrix that a descriptor (PTX ISA, "Matrix Descriptor Format") says where to find.
template <class T>
void emulated_row(float (&out)[16], uint64_t descriptor, int row) {
  const uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) std::abort();  // the swizzle of 128 bytes, without a base offset
  for (int k = 0; k < 16; ++k) {
    T value;
    std::memcpy(&value, Block::current().shared() + swizzled(start + row / 8 * eight_rows + row % 8 * 128 + k * 2), 2);
    out[k] = static_cast<float>(value);
  }
}

// m64nNk16: element (row, n) lies in warp row / 16, lane row % 8 * 4 + n % 8 / 2, register n / 8 * 4 + row % 16 / 8 * 2 + n % 2.
template <class T, int VALUES>
void multiply(float (&c)[VALUES], uint64_t a, uint64_t b, bool adds) {
  Block& block = Block::current();
  const unsigned group = emulated_thread.x / 128;
  block.lane().c = c;
  block.lane().adds = adds;
  block.meet(block.groups_of_warps[group], [&] {
    Lane* lanes = &block.lanes[group * 128];
    std::vector<float[16]> right(VALUES * 2);
    for (int n = 0; n < VALUES * 2; ++n) emulated_row<T>(right[n], b, n);
    for (int row = 0; row < 64; ++row) {
      float left[16];
      emulated_row<T>(left, a, row);
      for (int n = 0; n < VALUES * 2; ++n) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[k]) * right[n][k];
        Lane& lane = lanes[row / 16 * 32 + row % 8 * 4 + n % 8 / 2];
        float& out = lane.c[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
        out = static_cast<float>((lane.adds ? out : 0.f) + sum);
      }
    }
  });
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, cudaStream_t, int cluster, bool, const Parameters&... arguments) {
  emulated_block_size.x = threads;
  for (emulated_block.y = 0; emulated_block.y < blocks.y; ++emulated_block.y)
    for (unsigned first = 0; first < blocks.x; first += cluster) Cluster(cluster, threads, bytes).run(first, [&] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace ev

#define threadIdx ev::emulated_thread
#define blockIdx ev::emulated_block
#define blockDim ev::emulated_block_size

inline void __syncthreads() {
  ev::Block& block = ev::Block::current();
  block.meet(block.all, [] {});
}
inline int __syncthreads_or(int predicate) {
  ev::Block& block = ev::Block::current();
  block.lane().predicate = predicate;
  block.meet(block.all, [&] {
    int any = 0;
    for (auto& lane : block.lanes) any |= lane.predicate;
    for (auto& lane : block.lanes) lane.predicate = any;
  });
  return block.lane().predicate;
}
inline void __syncwarp() {
  ev::Block::current().meet_warp([](ev::Lane*) {});
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  ev::Block& block = ev::Block::current();
  block.lane().predicate = predicate != 0;
  block.meet_warp([](ev::Lane* lanes) {
    unsigned votes = 0;
    for (int l = 0; l < 32; ++l) votes |= static_cast<unsigned>(lanes[l].predicate) << l;
    for (int l = 0; l < 32; ++l) lanes[l].out[0] = votes;
  });
  return block.lane().out[0];
}
inline float emulated_shuffle(float value, int from) {
  ev::Block& block = ev::Block::current();
  block.lane().value = value;
  block.lane().other = from;
  block.meet_warp([](ev::Lane* lanes) {
    for (int l = 0; l < 32; ++l) lanes[l].received = lanes[lanes[l].other].value;
  });
  return block.lane().received;
}
inline float __shfl_xor_sync(unsigned, float value, int distance) { return emulated_shuffle(value, static_cast<int>(ev::emulated_thread.x % 32) ^ distance); }
inline int __shfl_sync(unsigned, int value, int lane) {
  float bits;
  std::memcpy(&bits, &value, 4);
  bits = emulated_shuffle(bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
