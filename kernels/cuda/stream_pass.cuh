// A pass of stream_sm90 over its tile's tokens, stage by stage: their squares, and the writing of those that are steered.
#pragma once
#include "stream_block.cuh"

namespace ev {

enum : int {
  kLanes = 8,            // that share a token's 128 bytes, so that a warp reads and writes whole lines
  kApart = 32 / kLanes,  // a warp has so many tokens at a time, so a lane's are so far apart
  kFewRules = 4,         // whose directions a lane has in flight
};

// Tokens of a lane in a pass.
template <bool FIRST>
constexpr int kRounds = kTokens * kLanes / 32 / (FIRST ? kStreamers : kProducts);

// What steering adds to a lane's vectors of FEW tokens.
template <class T, int FEW>
struct Change {
  bool writes[FEW];
  float delta[FEW][Vector<T>::kSize];
  float c[kFewRules][FEW];  // the first rules', in the second pass
  Vector<T> direction[kFewRules][FEW];
};

// The first pass is by streamers, the second by products. A lane has a vector of kRounds tokens of every stage, kApart apart.
class StreamPass : public StreamBlock {
 public:
  using StreamBlock::StreamBlock;

 protected:
  // The lane's first token.
  template <bool FIRST>
  __device__ __forceinline__ int token() const {
    return (threadIdx.x / 32 - (FIRST ? 1 : 2) * kGroup / 32) * kRounds<FIRST> * kApart + lane() / kLanes;
  }

  // x + delta back to x for tokens with a row in `rows`; in the first pass squares, in the second what the rules add.
  template <class T, bool FIRST, bool RESIDUAL, bool ADDS>
  __device__ __forceinline__ void stream(const int32_t* rows, int rules, float (&square)[kRounds<FIRST>]) const {
    using V = Vector<T>;
    constexpr int few = FIRST && !RESIDUAL ? 4 : 2, batches = kRounds<FIRST> / few;  // tokens at a time
    constexpr int buffers = FIRST ? 1 : 2;  // in the first pass, fetching the next change meanwhile did not pay
    static_assert(batches % buffers == 0, "changes take turns");
    const int t = token<FIRST>(), vector = lane() % kLanes;
    const int place = t * kBoxBytes + ((vector ^ (t & 7)) << 4);  // in a stage
    int at = slice() * cut.steps * kColumns + vector * V::kSize;
    T* out = static_cast<T*>(a.x) + (first() + t) * a.x_stride + at;
    Change<T, few> change[buffers];
    if (buffers == 2) fetch<FIRST>(change[0], rows, rules, t, at);
    Turn turn;
#pragma unroll 1
    for (int step = 0; step < steps(); ++step, at += kColumns, out += kColumns) {
      const char* const stage = shared() + turn.slot * kTokenBytes;
#pragma unroll
      for (int batch = 0; batch < batches; ++batch) {
        Change<T, few>& now = change[batch % buffers];
        if constexpr (buffers == 2) {
          add_rules(now, rules, t + batch * few * kApart, at);
          const int next = (batch + 1) % batches;
          fetch<FIRST>(change[(batch + 1) % 2], rows, rules, t + next * few * kApart, next == 0 ? at + kColumns : at);
        } else if (ADDS) {
          fetch<FIRST>(now, rows, rules, t + batch * few * kApart, at);
        }
        if (batch == 0) wait(rings().tokens[FIRST ? 0 : 1].landed + turn.slot, turn.phase);
#pragma unroll
        for (int i = 0; i < few; ++i) {
          const int round = batch * few + i;
          // Every other round's tokens are 4 further in their eight rows.
          const char* from = stage + (place ^ round % 2 * 64) + round * kApart * kBoxBytes;
          float x[V::kSize], residual[V::kSize] = {};
          V::load(from).widen(x);
          if (RESIDUAL) V::load(from + cut.token_stages * kTokenBytes).widen(residual);
          if constexpr (FIRST) {
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) {
              const float h = RESIDUAL ? x[e] + residual[e] : x[e];
              square[round] += h * h;
            }
          }
          if constexpr (ADDS) {
            if (!now.writes[i]) continue;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) x[e] += now.delta[i][e];
            V::rounded(x).store(out + round * kApart * a.x_stride, true);
          }
        }
      }
      release(rings().tokens[FIRST ? 0 : 1].freed + turn.slot);
      turn.next(cut.token_stages);
    }
  }

 private:
  // Tokens t, t + kApart, ...: their deltas, and the directions of their first rules.
  template <bool FIRST, class T, int FEW>
  __device__ __forceinline__ void fetch(Change<T, FEW>& change, const int32_t* rows, int rules, int t, int at) const {
#pragma unroll
    for (int i = 0; i < FEW; ++i) {
      const int32_t j = rows[t + i * kApart];
      change.writes[i] = j >= 0 && at < static_cast<int>(a.d);
      if (change.writes[i]) load_floats(change.delta[i], a.table.delta + j * a.d + at, true);
    }
    if (!FIRST) fetch_rules(change, rules, 0, t, at);
  }

  template <class T, int FEW>
  __device__ __forceinline__ void fetch_rules(Change<T, FEW>& change, int rules, int begin, int t, int at) const {
#pragma unroll
    for (int m = 0; m < kFewRules; ++m) {
#pragma unroll
      for (int i = 0; i < FEW; ++i) {
        const int entry = (t + i * kApart) * rules + begin + m;
        const float c = change.writes[i] && begin + m < rules ? coefficients()[entry] : 0.f;
        if (c != 0.f) change.direction[m][i] = Vector<T>::load(static_cast<const T*>(a.directions) + concepts()[entry] * a.d + at, true);
        change.c[m][i] = c;
      }
    }
  }

  // delta += what all rules add.
  template <class T, int FEW>
  __device__ __forceinline__ void add_rules(Change<T, FEW>& change, int rules, int t, int at) const {
#pragma unroll 1
    for (int begin = 0; begin < rules; begin += kFewRules) {
      if (begin > 0) fetch_rules(change, rules, begin, t, at);
#pragma unroll
      for (int m = 0; m < kFewRules; ++m) {
#pragma unroll
        for (int i = 0; i < FEW; ++i) {
          if (change.c[m][i] == 0.f) continue;
          float v[Vector<T>::kSize];
          change.direction[m][i].widen(v);
#pragma unroll
          for (int e = 0; e < Vector<T>::kSize; ++e) change.delta[i][e] += change.c[m][i] * v[e];
        }
      }
    }
  }
};

}  // namespace ev
