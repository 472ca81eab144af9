// Which tokens of a tile are steered how, and the writing of those that had to wait for their projections.
#pragma once
#include "../common/steer.h"
#include "hardware.cuh"

namespace ev {

// A tile's tokens, in shared memory.
template <int TOKENS>
struct Tokens {
  int32_t add[TOKENS];   // the row whose delta is all that is done to the token, or -1
  int32_t wait[TOKENS];  // whether gate or rules need its projections first
  int32_t row[TOKENS];   // the row that steers a token that waited, or -1
};

// Sort the tile's tokens into those that only add, those that wait and those left alone. True in every thread of the
// block if any waits.
template <int TOKENS>
__device__ __forceinline__ bool sort_tokens(const ev_args& a, int64_t first, int count, Tokens<TOKENS>& tokens) {
  bool any = false;
  const int t = static_cast<int>(threadIdx.x);
  if (t < TOKENS) {
    const ev_table& table = a.table;
    const int32_t j = table.delta && t < count ? ev_own_row(a, first + t) : -1;
    bool wait = false;
    if (j >= 0) {
      wait = ev_is_concept(a, table.gate[2 * j]);
      for (int64_t m = 0; m < table.rules; ++m) wait |= ev_is_concept(a, table.rule_concept[j * table.rules + m]);
    }
    tokens.add[t] = wait ? -1 : j;
    tokens.wait[t] = wait;
    any = wait;
  }
  return __syncthreads_or(any);
}

// Choose the row of token t of the tile if it waited, and solve its rules; projections p [TOKENS, pitch] and coefficients
// [TOKENS, EV_MAX_RULES] are in shared memory.
template <int TOKENS>
__device__ __forceinline__ void decide_token(const ev_args& a, int64_t first, int t, Tokens<TOKENS>& tokens, const float* p, int pitch,
                                             float* coefficients) {
  int32_t j = -1;
  if (tokens.wait[t]) {
    j = ev_choose_row(a, first + t, p + t * pitch);
    if (j >= 0) ev_solve_rules(a, j, p + t * pitch, coefficients + t * EV_MAX_RULES);
  }
  tokens.row[t] = j;
}

// The same for every token of the tile, a thread each.
template <int TOKENS>
__device__ __forceinline__ void decide(const ev_args& a, int64_t first, Tokens<TOKENS>& tokens, const float* p, int pitch, float* coefficients) {
  if (threadIdx.x < TOKENS) decide_token(a, first, static_cast<int>(threadIdx.x), tokens, p, pitch, coefficients);
}

// x += delta_j + sum_m c_m v_m for the columns of a token from `begin` to `end`, at most a span, by one warp; `c` null: no
// rules. VECTORS of 16 bytes a thread make a span. ALIGNED: x, delta and directions are known to be at multiples of 16 bytes.
template <class T, int VECTORS>
constexpr int kSpan = VECTORS * 32 * Vector<T>::kSize;

template <class T, int VECTORS, bool ALIGNED = false>
__device__ __forceinline__ void steer_span(const ev_args& a, int64_t token, int64_t j, const float* c, int64_t begin, int64_t end) {
  using V = Vector<T>;
  T* x = static_cast<T*>(a.x) + token * a.x_stride;
  const float* delta = a.table.delta + j * a.d;
  const T* directions = static_cast<const T*>(a.directions);
  const bool x_aligned = ALIGNED || is_aligned(a.x, a.x_stride * sizeof(T));
  const bool delta_aligned = ALIGNED || is_aligned(a.table.delta);
  const bool directions_aligned = ALIGNED || is_aligned(a.directions);
  const int64_t column = begin + threadIdx.x % 32 * V::kSize;

  V before[VECTORS];
  float update[VECTORS][V::kSize];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int64_t at = column + i * 32 * V::kSize;
    if (at >= end) continue;
    before[i] = V::load(x + at, x_aligned);
#pragma unroll
    for (int e = 0; e < V::kSize; e += 4) {
      const Vector<float> four = Vector<float>::load(delta + at + e, delta_aligned);
      for (int s = 0; s < 4; ++s) update[i][e + s] = four.value[s];
    }
  }
  for (int64_t m = 0; c && m < a.table.rules; ++m) {
    if (c[m] == 0.f) continue;
    const T* v = directions + a.table.rule_concept[j * a.table.rules + m] * a.d;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int64_t at = column + i * 32 * V::kSize;
      if (at >= end) continue;
      const V part = V::load(v + at, directions_aligned);
#pragma unroll
      for (int e = 0; e < V::kSize; ++e) update[i][e] += c[m] * to_float(part.value[e]);
    }
  }
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int64_t at = column + i * 32 * V::kSize;
    if (at >= end) continue;
#pragma unroll
    for (int e = 0; e < V::kSize; ++e) before[i].value[e] = rounded<T>(to_float(before[i].value[e]) + update[i][e]);
    before[i].store(x + at, x_aligned);
  }
}

// The whole block steers the tile's tokens whose `row` is not -1.
template <class T, int TOKENS>
__device__ __forceinline__ void steer_tokens(const ev_args& a, int64_t first, const int32_t* row, const float* coefficients) {
  constexpr int vectors = 4, span = kSpan<T, vectors>;
  const int spans = static_cast<int>((a.d + span - 1) / span);
  for (int item = threadIdx.x / 32; item < TOKENS * spans; item += blockDim.x / 32) {
    const int t = item / spans;
    if (row[t] < 0) continue;
    const float* c = coefficients ? coefficients + t * EV_MAX_RULES : nullptr;
    steer_span<T, vectors>(a, first + t, row[t], c, static_cast<int64_t>(item % spans) * span, a.d);
  }
}

}  // namespace ev
