// A block of stream_sm90: its place, its shared memory, and the rings of stages through which it reads its tile and the readers.
#pragma once
#include "stream_cut.h"

namespace ev {

struct Matrices {
  Matrix x, residual, readers;
};

// A stage of a ring, and which of its barriers' phases.
struct Turn {
  int slot = 0, phase = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++slot < stages) return;
    slot = 0;
    phase ^= 1;
  }
  __device__ __forceinline__ int before(int stages) const { return (slot == 0 ? stages : slot) - 1; }
};

template <int STAGES>
__device__ __forceinline__ void start_ring(RingBarriers<STAGES>& ring, int readers) {
#pragma unroll 1
  for (int slot = 0; slot < STAGES; ++slot) {
    start(ring.landed + slot, 1);
    start(ring.freed + slot, readers);
  }
}

// By one thread: `steps` steps from `column` on, of the tokens from `row` on or of the readers.
__device__ __forceinline__ void bring_tokens(const Matrices& matrices, bool residual, char* shared, RingBarriers<kMostTokenStages>& ring, int stages, int row,
                                             int column, int steps) {
  Turn turn;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, turn.next(stages)) {
    Barrier* landed = ring.landed + turn.slot;
    wait(ring.freed + turn.slot, turn.phase ^ 1);
    announce(landed, kTokenBytes * (residual ? 2 : 1));
    copy_box(shared + turn.slot * kTokenBytes, matrices.x, column + step * kColumns, row, landed);
    if (residual) copy_box(shared + (stages + turn.slot) * kTokenBytes, matrices.residual, column + step * kColumns, row, landed);
  }
}

__device__ __forceinline__ void bring_readers(const Matrices& matrices, char* shared, RingBarriers<kMostReaderStages>& ring, int stages, int column,
                                              int steps) {
  Turn turn;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, turn.next(stages)) {
    wait(ring.freed + turn.slot, turn.phase ^ 1);
    announce(ring.landed + turn.slot, kReaderBytes);
    copy_box(shared + turn.slot * kReaderBytes, matrices.readers, column + step * kColumns, 0, ring.landed + turn.slot);
  }
}

enum : int {
  kGroup = 128,  // threads of a warpgroup
  kThreads = 4 * kGroup,
  kStreamers = 4,  // warps
  kProducts = 8,
};

class StreamBlock {
 public:
  __device__ __forceinline__ StreamBlock(const ev_args& a, const Matrices& matrices, const StreamCut& cut) : a(a), matrices(matrices), cut(cut) {}

 protected:
  // Not kept, because registers are scarce.
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x % 32); }
  // The tile's first token, and the block's place among those that share the tile.
  __device__ __forceinline__ int64_t first() const { return static_cast<int64_t>(blockIdx.x >> cut.log_ranks) * kTokens; }
  __device__ __forceinline__ int slice() const { return static_cast<int>(blockIdx.x) & (cut.ranks - 1); }
  __device__ __forceinline__ int count() const { return a.n - first() < kTokens ? static_cast<int>(a.n - first()) : static_cast<int>(kTokens); }
  __device__ __forceinline__ bool outputs() const { return a.scores || a.sqnorm; }
  // The same in all blocks of a tile.
  __device__ __forceinline__ bool projects() const { return outputs() || tokens().any_waits; }
  __device__ __forceinline__ int steps() const {
    const int left = cut.all_steps - slice() * cut.steps;
    return left < 0 ? 0 : left < cut.steps ? left : cut.steps;
  }
  // The tokens whose projections this block completes.
  __device__ __forceinline__ int own() const { return kTokens / cut.ranks; }
  __device__ __forceinline__ int own_begin() const { return slice() * own(); }

  static __device__ __forceinline__ char* shared() {
    EV_DYNAMIC_SHARED(memory, 1024);  // as boxes need it; nothing lies before it
    return memory;
  }
  static __device__ __forceinline__ Fixed& fixed() { return *reinterpret_cast<Fixed*>(shared() + kTokenRing); }
  static __device__ __forceinline__ Rings& rings() { return fixed().rings; }
  static __device__ __forceinline__ Tokens<kTokens>& tokens() { return fixed().tokens; }
  static __device__ __forceinline__ float* projections() { return reinterpret_cast<float*>(shared()); }
  static __device__ __forceinline__ float* squares() { return reinterpret_cast<float*>(shared() + kSquares); }
  __device__ __forceinline__ float* coefficients() const { return reinterpret_cast<float*>(shared() + cut.coefficients); }  // [kTokens, rules]
  __device__ __forceinline__ int32_t* concepts() const { return reinterpret_cast<int32_t*>(shared() + cut.concepts); }      // [kTokens, rules]

  // The blocks of a tile, or the block alone: what a thread has written is seen by all.
  __device__ __forceinline__ void meet() const {
    if (cut.ranks == 1) return __syncthreads();
    cluster_arrive();
    cluster_wait();
  }

  __device__ __forceinline__ void release(Barrier* freed) const {
    __syncwarp();
    if (lane() == 0) arrive(freed);
  }

  // --- bringing -------------------------------------------------------------------------------------------------------

  // They meet the others as those do in `project`, `stream_first` and `finish`.
  __device__ __forceinline__ void bring() const {
    const int column = slice() * cut.steps * kColumns, row = static_cast<int>(first());
    if (projects()) {
      if (threadIdx.x == 0) bring_tokens(matrices, a.residual, shared(), rings().tokens, cut.token_stages, row, column, steps());
      if (threadIdx.x == 32) bring_readers(matrices, shared() + kReaderRing, rings().readers, cut.reader_stages, column, steps());
      if (threadIdx.x >= kGroup / 2) bring_scales(threadIdx.x - kGroup / 2);
      __syncwarp();
      __syncthreads();
      meet();
      if (cut.ranks > 1) __syncthreads();
      if (tokens().any_waits) {
        meet();
        if (cut.ranks > 1) __syncthreads();
      }
    }
  }

  // By half a warpgroup: the scores' means and deviations, for which everybody would wait at the end.
  __device__ __forceinline__ void bring_scales(unsigned thread) const {
#pragma unroll 1
    for (int k = static_cast<int>(thread); k < a.k; k += kGroup / 2) {
      fixed().mean[k] = a.mean[k];
      fixed().inv_std[k] = a.inv_std[k];
    }
  }

  // Whether there is a second pass: for the tokens that waited, or where nothing is projected, for those that only add.
  __device__ __forceinline__ bool again() const { return tokens().any_waits || !outputs(); }

  const ev_args& a;
  const Matrices& matrices;
  const StreamCut& cut;
};

}  // namespace ev
