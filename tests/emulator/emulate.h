// A GPU block on a CPU, so that the CUDA kernels' logic is tested where there is no GPU: every thread is a fiber, a warp's
// collective operation happens when its last lane arrives, and asynchronous copies land as late as the program allows.
// Warps run in another order in every block, so that a missing barrier often shows; compute-sanitizer looks for the rest. One
// block at a time.
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
#include <random>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace ev {

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex emulated_thread, emulated_block, emulated_block_size;

struct Lane {
  const void* address = nullptr;
  float* c = nullptr;
  uint32_t a[4], b[2], out[4];
  float value = 0, received = 0;
  int distance = 0, predicate = 0;
};

// Threads that meet: the last to arrive does the work, and nobody leaves before.
struct Meeting {
  int size = 0, arrived = 0;
  long round = 0;
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(int threads, int shared_bytes, std::function<void()> body) {
    threads_ = threads;
    shared_.assign(shared_bytes + 128, static_cast<char>(0xff));  // NaN to whoever reads what nobody wrote
    body_ = std::move(body);
    lanes_.assign(threads, Lane{});
    copies_.assign(threads, {});
    warps_.assign(threads / 32, Meeting{32});
    all_ = Meeting{threads};
    done_.assign(threads, false);
    fibers_.resize(threads);
    stacks_.resize(threads);
    order_.resize(threads / 32);
    for (int i = 0; i < threads / 32; ++i) order_[i] = i;
    std::shuffle(order_.begin(), order_.end(), random_);
    for (int t = 0; t < threads; ++t) {
      stacks_[t].resize(128 << 10);
      getcontext(&fibers_[t]);
      fibers_[t].uc_stack.ss_sp = stacks_[t].data();
      fibers_[t].uc_stack.ss_size = stacks_[t].size();
      fibers_[t].uc_link = &main_;
      makecontext(&fibers_[t], [] { current().enter(); }, 0);
    }
    for (;;) {
      bool alive = false;
      progress_ = false;
      for (int warp : order_) {
        for (int lane = 0; lane < 32; ++lane) {
          const int t = warp * 32 + lane;
          if (done_[t]) continue;
          alive = true;
          thread_ = t;
          emulated_thread.x = t;
          swapcontext(&main_, &fibers_[t]);
        }
      }
      if (!alive) break;
      if (!progress_) {
        std::fprintf(stderr, "emulator: threads wait for each other forever\n");
        std::abort();
      }
    }
  }

  void meet(Meeting& meeting, const std::function<void()>& work) {
    const long round = meeting.round;
    if (++meeting.arrived == meeting.size) {
      work();
      meeting.arrived = 0;
      ++meeting.round;
      progress_ = true;
      return;
    }
    while (meeting.round == round) swapcontext(&fibers_[thread_], &main_);
  }
  void meet_warp(const std::function<void(Lane*)>& work) {
    Lane* lanes = &lanes_[thread_ / 32 * 32];
    meet(warps_[thread_ / 32], [&] { work(lanes); });
  }
  void meet_all(const std::function<void()>& work) { meet(all_, work); }

  Lane& lane() { return lanes_[thread_]; }
  std::vector<Lane>& lanes() { return lanes_; }
  char* shared() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_.data()) + 127) / 128 * 128); }
  struct Copy {
    void* to;
    const void* from;
    bool inside;
  };
  std::deque<std::vector<Copy>>& groups() {
    auto& groups = copies_[thread_];
    if (groups.empty()) groups.emplace_back();
    return groups;
  }

 private:
  void enter() {
    const int t = thread_;
    body_();
    done_[t] = true;
    progress_ = true;
  }

  int threads_ = 0, thread_ = 0;
  bool progress_ = false;
  std::vector<char> shared_;
  std::function<void()> body_;
  std::vector<Lane> lanes_;
  std::vector<std::deque<std::vector<Copy>>> copies_;
  std::vector<Meeting> warps_;
  Meeting all_;
  std::vector<bool> done_;
  ucontext_t main_;
  std::vector<ucontext_t> fibers_;
  std::vector<std::vector<char>> stacks_;
  std::vector<int> order_;
  std::mt19937 random_{1};
};

inline char* emulated_shared() { return Block::current().shared(); }

inline void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) std::abort();
  Block::current().groups().back().push_back({shared, global, inside});
}
inline void commit_group() { Block::current().groups().emplace_back(); }
inline void wait_groups(int pending) {
  auto& groups = Block::current().groups();
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const auto& copy : groups.front()) {
      if (copy.inside) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
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
inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x1000u) & 0xffffe000u;
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, cudaStream_t, const Parameters&... arguments) {
  emulated_block_size.x = threads;
  for (unsigned b = 0; b < blocks.x; ++b) {
    emulated_block.x = b;
    Block::current().run(threads, bytes, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

}  // namespace ev

#define threadIdx ev::emulated_thread
#define blockIdx ev::emulated_block
#define blockDim ev::emulated_block_size

inline void __syncthreads() {
  ev::Block::current().meet_all([] {});
}
inline int __syncthreads_or(int predicate) {
  ev::Block& block = ev::Block::current();
  block.lane().predicate = predicate;
  block.meet_all([&] {
    int any = 0;
    for (auto& lane : block.lanes()) any |= lane.predicate;
    for (auto& lane : block.lanes()) lane.predicate = any;
  });
  return block.lane().predicate;
}
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  ev::Block& block = ev::Block::current();
  block.lane().value = value;
  block.lane().distance = distance;
  block.meet_warp([](ev::Lane* lanes) {
    for (int l = 0; l < 32; ++l) lanes[l].received = lanes[l ^ lanes[l].distance].value;
  });
  return block.lane().received;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
