// The two passes of stream_sm90 over its tile's tokens: stage by stage, their squares, and the writing of those that only add; and the
// writing of those that had to wait.
#pragma once
#include "stream_block.cuh"

namespace ev {

enum : int {
  kLanes = 8,            // that share a token's 128 bytes, so that a warp reads and writes whole lines
  kApart = 32 / kLanes,  // a streamer has so many tokens at a time, so a lane's are so far apart
  kRounds = kTokens / kApart / kStreamers,
  kFewRules = 4,  // whose directions a lane has in flight
};
// Columns of a token that a warp has a vector a lane of.
template <class T>
constexpr int kSpan = 32 * Vector<T>::kSize;

class StreamPass : public StreamBlock {
 public:
  using StreamBlock::StreamBlock;

 protected:
  // A streamer's lane's first token.
  __device__ __forceinline__ int token() const { return (threadIdx.x - kGroup) / 32 * kRounds * kApart + lane() / kLanes; }

  // By streamers: squares, and x + delta back to x for tokens that only add. A lane has a vector of kRounds tokens of every stage.
  template <class T, bool RESIDUAL, bool ADDS>
  __device__ __forceinline__ void stream(float (&square)[kRounds]) const {
    using V = Vector<T>;
    constexpr int few = RESIDUAL ? 2 : 4;  // tokens at a time
    const int t = token(), vector = lane() % kLanes;
    const int place = t * kBoxBytes + ((vector ^ (t & 7)) << 4);  // in a stage
    int at = slice() * cut.steps * kColumns + vector * V::kSize;
    T* out = static_cast<T*>(a.x) + (first() + t) * a.x_stride + at;
    Turn turn;
#pragma unroll 1
    for (int step = 0; step < steps(); ++step, at += kColumns, out += kColumns) {
      const char* const stage = shared() + turn.slot * kTokenBytes;
#pragma unroll
      for (int begin = 0; begin < kRounds; begin += few) {
        float delta[few][V::kSize];
        bool writes[few];
        if constexpr (ADDS) {
#pragma unroll
          for (int i = 0; i < few; ++i) {
            const int32_t j = tokens().add[t + (begin + i) * kApart];
            writes[i] = j >= 0 && at < static_cast<int>(a.d);
            if (writes[i]) load_floats(delta[i], a.table.delta + (uint64_t{static_cast<uint32_t>(j)} * static_cast<uint32_t>(a.d) + at), true);
          }
        }
        if (begin == 0) wait(rings().tokens.landed + turn.slot, turn.phase);
#pragma unroll
        for (int i = 0; i < few; ++i) {
          const int round = begin + i;
          // Every other round's tokens are 4 further in their eight rows.
          const char* from = stage + (place ^ round % 2 * 64) + round * kApart * kBoxBytes;
          float x[V::kSize], residual[V::kSize] = {};
          V::load(from).widen(x);
          if (RESIDUAL) V::load(from + cut.token_stages * kTokenBytes).widen(residual);
#pragma unroll
          for (int e = 0; e < V::kSize; ++e) {
            const float h = RESIDUAL ? x[e] + residual[e] : x[e];
            square[round] += h * h;
          }
          if constexpr (ADDS) {
            if (!writes[i]) continue;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) x[e] += delta[i][e];
            V::rounded(x).store(out + round * kApart * a.x_stride, true);
          }
        }
      }
      release(rings().tokens.freed + turn.slot);
      turn.next(cut.token_stages);
    }
  }

  // By products: x + delta + what `rules` rules add back to x for tokens with a row in `rows`. A warp has TOKENS of them at a time, and of
  // their columns in this slice VECTORS times 32 vectors, so that all that it loads is under way at once and is written in long pieces.
  template <class T, int VECTORS, int TOKENS>
  __device__ __forceinline__ void steer(const int32_t* rows, int rules) const {
    using V = Vector<T>;
    const int first_column = slice() * cut.steps * kColumns, left = static_cast<int>(a.d) - first_column;
    const int end = first_column + (left < cut.steps * kColumns ? left : cut.steps * kColumns);
    const int warp = static_cast<int>(threadIdx.x / 32) - 2 * kGroup / 32;
#pragma unroll 1
    for (int t = warp; t < kTokens; t += TOKENS * kProducts) {
      Steered<T> token[TOKENS];
      bool any = false;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        token[i] = steered<T>(t + i * kProducts, rows);
        any |= token[i].writes;
        prefetch_next(t + (i + TOKENS) * kProducts, rows, first_column, end);
      }
      if (!any) continue;
#pragma unroll 1
      for (int at = first_column + lane() * V::kSize; at < end; at += VECTORS * kSpan<T>) {
        V x[TOKENS][VECTORS];
        float value[TOKENS][VECTORS][V::kSize];
        Directions<T, VECTORS> directions[TOKENS];
        const auto there = [&](int i, int v) { return token[i].writes && at + v * kSpan<T> < end; };
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
#pragma unroll
          for (int v = 0; v < VECTORS; ++v) {
            if (!there(i, v)) continue;
            x[i][v] = V::load(token[i].x + at + v * kSpan<T>, true);
            load_floats(value[i][v], token[i].delta + at + v * kSpan<T>, true);
          }
          if (rules > 0) fetch(directions[i], token[i], t + i * kProducts, 0, rules, at, end);
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
#pragma unroll 1
          for (int begin = 0; begin < rules; begin += kFewRules) {
            if (begin > 0) fetch(directions[i], token[i], t + i * kProducts, begin, rules, at, end);
            add(value[i], directions[i]);
          }
#pragma unroll
          for (int v = 0; v < VECTORS; ++v) {
            if (!there(i, v)) continue;
            float number[V::kSize];
            x[i][v].widen(number);
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) number[e] += value[i][v][e];
            V::rounded(number).store(token[i].x + at + v * kSpan<T>, true);
          }
        }
      }
    }
  }

 private:
  // A token to write, and where its columns and its row's delta begin.
  template <class T>
  struct Steered {
    bool writes;
    T* x;
    const float* delta;
  };
  // A lane's vectors of the directions of a few rules, and their coefficients, the same in the whole warp.
  template <class T, int VECTORS>
  struct Directions {
    float c[kFewRules];
    Vector<T> vector[kFewRules][VECTORS];
  };

  template <class T>
  __device__ __forceinline__ Steered<T> steered(int t, const int32_t* rows) const {
    const int32_t j = t < kTokens ? rows[t] : -1;
    return {j >= 0, static_cast<T*>(a.x) + (first() + t) * a.x_stride, a.table.delta + (j < 0 ? 0 : int64_t{j} * a.d)};
  }

  // Into L2, while the token before is written.
  __device__ __forceinline__ void prefetch_next(int t, const int32_t* rows, int begin, int end) const {
    if (t >= kTokens || rows[t] < 0) return;
    const char* x = static_cast<const char*>(a.x) + (first() + t) * a.x_stride * 2;
#pragma unroll 1
    for (int at = begin + lane() * kColumns; at < end; at += 32 * kColumns) prefetch(x + at * 2);
  }

  template <class T, int VECTORS>
  __device__ __forceinline__ void fetch(Directions<T, VECTORS>& directions, const Steered<T>& token, int t, int begin, int rules, int at, int end) const {
#pragma unroll
    for (int m = 0; m < kFewRules; ++m) {
      const int entry = t * rules + begin + m;
      directions.c[m] = token.writes && begin + m < rules ? coefficients()[entry] : 0.f;
      if (directions.c[m] == 0.f) continue;
      const T* direction = static_cast<const T*>(a.directions) + int64_t{concepts()[entry]} * a.d + at;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        if (at + v * kSpan<T> < end) directions.vector[m][v] = Vector<T>::load(direction + v * kSpan<T>, true);
    }
  }

  template <class T, int VECTORS>
  __device__ __forceinline__ void add(float (&value)[VECTORS][Vector<T>::kSize], const Directions<T, VECTORS>& directions) const {
#pragma unroll
    for (int m = 0; m < kFewRules; ++m) {
      if (directions.c[m] == 0.f) continue;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        float number[Vector<T>::kSize];
        directions.vector[m][v].widen(number);
#pragma unroll
        for (int e = 0; e < Vector<T>::kSize; ++e) value[v][e] += directions.c[m] * number[e];
      }
    }
  }
};

}  // namespace ev
