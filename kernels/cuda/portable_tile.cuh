// A tile of tokens of the portable kernel: its shape, and one pass over its columns, or over a slice of them.
#pragma once
#include "hardware.cuh"
#include "../common/steer.h"

namespace ev {
namespace {

enum : int {
  kWarps = 8,
  kThreads = kWarps * 32,
  kStageBytes = 128,
  kConceptTiles = 22,
  kMaxStages = 4,
  kSliceStages = 8,
};

// MW warps along the tokens with MT tiles of 16 each, the others along the concepts. One pass takes 176 concepts or a few
// more, so that 171 need one.
template <class T, int MW, int MT>
struct Tile {
  enum : int {
    kTokens = MW * MT * 16,
    kConceptWarps = kWarps / MW,
    kConceptTilesPerWarp = (kConceptTiles + kConceptWarps - 1) / kConceptWarps,
    kConcepts = kConceptWarps * kConceptTilesPerWarp * 8,
    kColumns = kStageBytes / static_cast<int>(sizeof(T)),
    kVectors = kTokens * kStageBytes / 16,  // 16-byte vectors of x in a stage
    kVectorsPerThread = (kVectors + kThreads - 1) / kThreads,
    kScoresInFp32 = MT > 1,  // alone: the largest tile has no register left for a choice
  };
};

// Where things lie in dynamic shared memory. The projections take the ring's place when one pass makes them all.
struct Layout {
  int stages, stage_bytes;
  int projections, coefficients;  // byte offsets
  int pitch;                      // of the projections, and of the workspace [slices, n, pitch], in floats
  int bytes;
};

// In the workspace squares follow the projections.
inline int pitch_of(const ev_args& a) { return static_cast<int>(a.k_padded) + 4; }
inline int slices_of(const ev_args& a) {
  const int64_t columns = kSliceStages * kStageBytes / (a.dtype == EV_F32 ? 4 : 2);
  return static_cast<int>((a.d + columns - 1) / columns);
}

template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  bool aligned;
  __device__ __forceinline__ Rows(const void* p, int64_t stride)
      : first(static_cast<const T*>(p)), stride(stride), aligned(is_aligned(p, stride * sizeof(T))) {}
};

// Byte offset of 16-byte vector `vector` of row `row` of a stage; permuted so that ldmatrix meets no bank conflict.
__device__ __forceinline__ int place(int row, int vector) { return row * kStageBytes + ((vector ^ (row & 7)) << 4); }

// Begin to bring `rows` (at most ROWS) rows' columns from `column` on; columns from d on become zero.
template <int ROWS, class T>
__device__ __forceinline__ void fetch(char* to, const Rows<T>& from, int64_t first, int rows, int64_t column, int64_t d) {
#pragma unroll
  for (int i = 0; i < (ROWS * 8 + kThreads - 1) / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads, row = index / 8, vector = index % 8;
    if (row >= rows) break;
    const int64_t at = column + vector * Vector<T>::kSize;
    const T* source = from.first + (first + row) * from.stride + (at < d ? at : 0);
    char* target = to + place(row, vector);
    if (from.aligned) {
      copy_async(target, source, at < d);
    } else {
      Vector<T> v{};
      if (at < d) v = Vector<T>::load(source, false);
      *reinterpret_cast<Vector<T>*>(target) = v;
    }
  }
}

// acc += rows of `tokens` times rows of `readers` over one stage, for this warp's part of the tile.
template <class T, int MW, int MT>
__device__ __forceinline__ void multiply_stage(float (&acc)[MT][Tile<T, MW, MT>::kConceptTilesPerWarp][4], const char* tokens, const char* readers) {
  using S = Tile<T, MW, MT>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = warp % MW * MT * 16, concept = warp / MW * S::kConceptTilesPerWarp * 8;
  Operand<T> a[MT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int step = 0; step < 4; ++step) a[m][step].load(tokens + place(token + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
  for (int n = 0; n < S::kConceptTilesPerWarp; ++n) {
    uint32_t b[2][4];
    load_matrices(b[0], readers + place(concept + n * 8 + lane % 8, lane / 8));
    load_matrices(b[1], readers + place(concept + n * 8 + lane % 8, 4 + lane / 8));
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      float part[4] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) multiply(part, a[m][step], b[step / 2][step % 2 * 2], b[step / 2][step % 2 * 2 + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] += part[i];
    }
  }
}

// Squares of one stage's elements, and the add for the tokens that only add.
template <class T, int MW, int MT>
__device__ __forceinline__ void stream_stage(const ev_args& a, int64_t first, const int32_t* add, const char* tokens, const char* residual, int64_t column,
                                             float (&square)[Tile<T, MW, MT>::kVectorsPerThread], bool adds) {
  using S = Tile<T, MW, MT>;
  using V = Vector<T>;
#pragma unroll
  for (int i = 0; i < S::kVectorsPerThread; ++i) {
    const int index = threadIdx.x + i * kThreads, row = index / 8;
    if (index >= S::kVectors) break;
    float x[V::kSize], other[V::kSize] = {};
    V::load(tokens + place(row, index % 8)).widen(x);
    if (residual) V::load(residual + place(row, index % 8)).widen(other);
#pragma unroll
    for (int e = 0; e < V::kSize; ++e) square[i] += (x[e] + other[e]) * (x[e] + other[e]);
    const int64_t at = column + index % 8 * V::kSize, j = adds ? add[row] : -1;
    if (j < 0 || at >= a.d) continue;
    add_floats(x, a.table.delta + j * a.d + at, is_aligned(a.table.delta));
    V::rounded(x).store(static_cast<T*>(a.x) + (first + row) * a.x_stride + at, is_aligned(a.x, a.x_stride * sizeof(T)));
  }
}

// One pass over the tile's columns, SLICED: over its slice of them. Projections on `concepts` concepts from `concept` on (0: none), squares, adds.
template <class T, int MW, int MT, bool SLICED>
__device__ __forceinline__ void pass(const ev_args& a, const Layout& layout, char* ring, int64_t first, int count, int64_t concept, int concepts,
                                     const int32_t* add, float (&acc)[MT][Tile<T, MW, MT>::kConceptTilesPerWarp][4],
                                     float (&square)[Tile<T, MW, MT>::kVectorsPerThread], bool streams, bool adds) {
  using S = Tile<T, MW, MT>;
  const Rows<T> x(a.x, a.x_stride), residual(a.residual, a.residual_stride), readers(a.readers, a.d);
  const int twice = concepts > 0 && a.reader_parts > 1, slice_steps = kSliceStages << twice;  // a stage's columns come twice
  const int all_steps = static_cast<int>((a.d + S::kColumns - 1) / S::kColumns) << twice, begin = SLICED ? static_cast<int>(blockIdx.y) * slice_steps : 0;
  const int end = SLICED && begin + slice_steps < all_steps ? begin + slice_steps : all_steps;
  const auto comes_again = [&](int step) { return (step & twice) != twice; };  // the lesser part of the readers is first
  const int readers_at = S::kTokens * kStageBytes, residual_at = readers_at + S::kConcepts * kStageBytes;

  const auto bring = [&](int step) {
    if (step < end) {
      char* stage = ring + step % layout.stages * layout.stage_bytes;
      const int64_t column = static_cast<int64_t>(step >> twice) * S::kColumns;
      fetch<S::kTokens>(stage, x, first, count, column, a.d);
      if (a.residual) fetch<S::kTokens>(stage + residual_at, residual, first, count, column, a.d);
      fetch<S::kConcepts>(stage + readers_at, readers, comes_again(step) ? concept + a.k_padded : concept, concepts, column, a.d);
    }
    commit_group();  // empty ones too, so that the count of groups tells which have landed
  };

#pragma unroll 1
  for (int step = begin + 1 - layout.stages; step < end; ++step) {  // the first rounds only fill the ring
    if (step >= begin) {
      wait_groups(layout.stages - 2);
      __syncthreads();
    }
    bring(step + layout.stages - 1);
    if (step < begin) continue;
    const char* stage = ring + step % layout.stages * layout.stage_bytes;
#pragma unroll 1
    for (const char* source = stage; concepts > 0 && source; source = a.residual && source == stage ? stage + residual_at : nullptr)
      multiply_stage<T, MW, MT>(acc, source, stage + readers_at);
    if (!streams || comes_again(step)) continue;
    stream_stage<T, MW, MT>(a, first, add, stage, a.residual ? stage + residual_at : nullptr, static_cast<int64_t>(step >> twice) * S::kColumns, square, adds);
  }
  __syncthreads();
}

}  // namespace
}  // namespace ev
