// Which tokens of a tile are steered how, the writing of those that had to wait for their projections, and of scores.
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
  int32_t any_waits;     // of stream_sm90
};

// Whether token t of the tile only adds, waits or is left alone. True if it waits.
template <int TOKENS>
__device__ __forceinline__ bool sort_token(const ev_args& a, int64_t first, int count, int t, Tokens<TOKENS>& tokens) {
  const int32_t j = a.table.delta && t < count ? ev_own_row(a, first + t) : -1;
  const bool wait = j >= 0 && ev_waits(a, j);
  tokens.add[t] = wait ? -1 : j;
  tokens.wait[t] = wait;
  return wait;
}

// The same for every token of the tile, a thread each. True in every thread of the block if any waits.
template <int TOKENS>
__device__ __forceinline__ bool sort_tokens(const ev_args& a, int64_t first, int count, Tokens<TOKENS>& tokens) {
  const int t = static_cast<int>(threadIdx.x);
  return __syncthreads_or(t < TOKENS && sort_token(a, first, count, t, tokens));
}

// Choose the row of token t of the tile if it waited, and solve its rules: its projections p [K], coefficients c [rules].
template <int TOKENS>
__device__ __forceinline__ void decide_token(const ev_args& a, int64_t first, int t, Tokens<TOKENS>& tokens, const float* p, float* c) {
  int32_t j = -1;
  if (tokens.wait[t]) {
    j = ev_choose_row(a, first + t, p);
    if (j >= 0) ev_solve_rules(a, j, p, c);
  }
  tokens.row[t] = j;
}

// The same for every token of the tile, a thread each; p [TOKENS, pitch] and coefficients [TOKENS, EV_MAX_RULES] are in shared memory.
template <int TOKENS>
__device__ __forceinline__ void decide(const ev_args& a, int64_t first, Tokens<TOKENS>& tokens, const float* p, int pitch, float* coefficients) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < TOKENS) decide_token(a, first, t, tokens, p + t * pitch, coefficients + t * EV_MAX_RULES);
}

// A token's score of concept k to where it belongs, rounded once to what scores are kept in.
template <class Score>
__device__ __forceinline__ void write_score(const ev_args& a, int64_t token, int64_t k, float score) {
  static_cast<Score*>(a.scores)[token * a.scores_stride + k] = static_cast<Score>(score);
}
__device__ __forceinline__ void write_score(const ev_args& a, int64_t token, int64_t k, float score) {
  a.scores_dtype == EV_F32 ? write_score<float>(a, token, k, score) : write_score<__nv_bfloat16>(a, token, k, score);
}

// A vector of a token's columns to steer by row j: x += delta_j + sum_m c_m v_m, rounded once; j < 0: left alone. c null: no rules.
struct Spot {
  int64_t token, at;
  int32_t j;
  const float* c;
};

// COUNT of them by one thread, `spot(i)` each, so that their loads overlap.
template <class T, int COUNT, class Spots>
__device__ __forceinline__ void steer_spots(const ev_args& a, const Spots& spot) {
  using V = Vector<T>;
  const T* directions = static_cast<const T*>(a.directions);
  const bool x_aligned = is_aligned(a.x, a.x_stride * sizeof(T));
  const bool delta_aligned = is_aligned(a.table.delta);
  const bool directions_aligned = is_aligned(a.directions);
  const auto x = [&](const Spot& s) { return static_cast<T*>(a.x) + s.token * a.x_stride + s.at; };
  float value[COUNT][V::kSize];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Spot s = spot(i);
    if (s.j < 0) continue;
    V::load(x(s), x_aligned).widen(value[i]);
    add_floats(value[i], a.table.delta + s.j * a.d + s.at, delta_aligned);
  }
#pragma unroll 1
  for (int m = 0; m < a.table.rules; ++m) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Spot s = spot(i);
      const float c = s.j < 0 || !s.c ? 0.f : s.c[m];
      if (c == 0.f) continue;
      float direction[V::kSize];
      V::load(directions + a.table.rule_concept[s.j * a.table.rules + m] * a.d + s.at, directions_aligned).widen(direction);
#pragma unroll
      for (int e = 0; e < V::kSize; ++e) value[i][e] += c * direction[e];
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Spot s = spot(i);
    if (s.j >= 0) V::rounded(value[i]).store(x(s), x_aligned);
  }
}

// The columns of a token from `begin` to `end`, by one warp.
template <class T, int VECTORS>
__device__ __forceinline__ void steer_columns(const ev_args& a, int64_t token, int32_t j, const float* c, int64_t begin, int64_t end) {
  constexpr int span = 32 * Vector<T>::kSize;
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x % 32 * Vector<T>::kSize; at < end; at += VECTORS * span)
    steer_spots<T, VECTORS>(a, [&](int i) { return Spot{token, at + i * span, at + i * span < end ? j : -1, c}; });
}

// The block steers those of the `count` tokens of its tile whose `row` is not -1; `coefficients` [count, EV_MAX_RULES], or null: no
// rules. A span of columns for every token, then the span before it: the rows' deltas and directions stay in L1 meanwhile, and
// what was read last of x is the likeliest to be in L2 still.
template <class T>
__device__ __forceinline__ void steer_tokens(const ev_args& a, int64_t first, int count, const int32_t* row, const float* coefficients) {
  constexpr int few = 4, span = 32 * Vector<T>::kSize;
  const int groups = (count + few - 1) / few, spans = static_cast<int>((a.d + span - 1) / span);
#pragma unroll 1
  for (int item = threadIdx.x / 32; item < groups * spans; item += blockDim.x / 32) {
    const int t = item % groups * few;
    const int64_t at = static_cast<int64_t>(spans - 1 - item / groups) * span + threadIdx.x % 32 * Vector<T>::kSize;
    if (at >= a.d) continue;
    int32_t j[few];
#pragma unroll
    for (int i = 0; i < few; ++i) j[i] = t + i < count ? row[t + i] : -1;
    steer_spots<T, few>(a, [&](int i) { return Spot{first + t + i, at, j[i], coefficients ? coefficients + (t + i) * EV_MAX_RULES : nullptr}; });
  }
}

}  // namespace ev
