// The CPU kernel: projections of a tile of tokens on all concepts, then scores, norms and steering while the tile is in
// cache. Instantiated once per instruction set (form_*.cpp) from a small description of it:
//
//   struct Isa { W: lanes; ROWS: most tokens of a register tile; VECTORS[rows]: most vectors of W concepts beside them, whole panels;
//                BF16_DOT: has `dot_pairs`, the bf16 pair product }
//
// A projection is one accumulator per (token, concept), summed over d in order. So it depends neither on the shape of
// the register tile, nor on the blocking, nor on the number of threads, nor on what else is in the batch.
#pragma once
#include "plan.h"
#include "vec.h"

#define EV_LAMBDA __attribute__((always_inline))

namespace {

enum : int64_t {
  EV_BLOCK = 256,          // columns of d at a time where they are staged: the staged tile is then 48 KB
  EV_DIRECT_BLOCK = 1024,  // and where they are not: the fewer the blocks, the less sums are stored and loaded
};

// Readers are packed in panels of 16 concepts, so that the innermost loop reads them as a few contiguous streams.
// `at` is a block's first column in the first panel; a vector of W concepts is a whole panel or a part of one.
template <class T>
struct Panels {
  const T* at;
  int64_t stride;  // from one panel to the next

  template <int W>
  EV_INLINE const T* vector(int64_t z) const {
    return at + z * W / EV_LANES * stride + z * W % EV_LANES;
  }
  EV_INLINE Panels from(int64_t row) const { return {at + row * EV_LANES, stride}; }
};

// --- where the stream comes from: staged in fp32, or bf16 pairs straight from x -------------------------------------

struct Staged {  // [tokens, EV_BLOCK] fp32
  const float* at;
  int64_t stride;
};
struct Pairs {  // x itself
  const bf16* at;
  int64_t stride;
};

// --- the register tile ----------------------------------------------------------------------------------------------

// acc[r][z] = add(acc[r][z], value(r), vector(z)), with the shorter side kept in registers.
template <int R, int Z, class F, class Value, class Vector, class Add>
EV_INLINE void outer(F (&acc)[R][Z], Value value, Vector vector, Add add) {
  if constexpr (R < Z) {
    decltype(value(0)) values[R];
    for (int r = 0; r < R; ++r) values[r] = value(r);
    for (int z = 0; z < Z; ++z) {
      const auto v = vector(z);
      for (int r = 0; r < R; ++r) acc[r][z] = add(acc[r][z], values[r], v);
    }
  } else {
    decltype(vector(0)) vectors[Z];
    for (int z = 0; z < Z; ++z) vectors[z] = vector(z);
    for (int r = 0; r < R; ++r) {
      const auto v = value(r);
      for (int z = 0; z < Z; ++z) acc[r][z] = add(acc[r][z], v, vectors[z]);
    }
  }
}

// acc[r][z] += sum over the block's columns. Readers are fp32, [d, 16] a panel ...
template <class Isa, int R, int Z, class F>
EV_INLINE void accumulate(F (&acc)[R][Z], Staged h, Panels<float> v, int64_t columns) {
  using V = Vec<Isa::W>;
  const auto multiply_add = [](F sum, F a, F b) EV_LAMBDA { return sum + a * b; };
  for (int64_t i = 0; i < columns; ++i, v.at += EV_LANES) {
    outer(acc, [&](int r) EV_LAMBDA { return V::set1(h.at[r * h.stride + i]); },
          [&](int z) EV_LAMBDA { return V::load(v.template vector<Isa::W>(z)); }, multiply_add);
  }
}

// ... or bf16 pairs, [d/2, 16, 2] a panel: a lane holds columns 2i (low half) and 2i+1 (high half) ...
template <class Isa, int R, int Z, class F>
EV_INLINE void accumulate(F (&acc)[R][Z], Staged h, Panels<uint32_t> v, int64_t columns) {
  using V = Vec<Isa::W>;
  const auto multiply_add = [](F sum, F a, F b) EV_LAMBDA { return sum + a * b; };
  const auto pairs = [&](int z) EV_LAMBDA { return V::template read<typename V::U>(v.template vector<Isa::W>(z)); };
  for (int64_t i = 0; i < columns; i += 2, v.at += EV_LANES) {
    outer(acc, [&](int r) EV_LAMBDA { return V::set1(h.at[r * h.stride + i]); },
          [&](int z) EV_LAMBDA { return (F)(pairs(z) << 16); }, multiply_add);
    outer(acc, [&](int r) EV_LAMBDA { return V::set1(h.at[r * h.stride + i + 1]); },
          [&](int z) EV_LAMBDA { return (F)(pairs(z) & 0xffff0000u); }, multiply_add);
  }
}

// ... and where the processor multiplies pairs, those meet the pairs of a bf16 x.
template <class Isa, int R, int Z, class F>
EV_INLINE void accumulate(F (&acc)[R][Z], Pairs x, Panels<uint32_t> v, int64_t columns) {
  using V = Vec<Isa::W>;
  using U = typename V::U;
  for (int64_t i = 0; i < columns; i += 2, v.at += EV_LANES) {
    outer(acc, [&](int r) EV_LAMBDA { return U{} + V::template read<uint32_t>(x.at + r * x.stride + i); },
          [&](int z) EV_LAMBDA { return V::template read<U>(v.template vector<Isa::W>(z)); },
          [](F sum, U a, U b) EV_LAMBDA { return Isa::dot_pairs(sum, a, b); });
  }
}

template <class Isa, int R, int Z, class Stream, class T>
__attribute__((noinline)) void register_tile(Stream h, Panels<T> v, int64_t columns, float* p, int64_t p_stride, bool first) {
  using V = Vec<Isa::W>;
  typename V::F acc[R][Z];
  for (int r = 0; r < R; ++r)
    for (int z = 0; z < Z; ++z) acc[r][z] = first ? typename V::F{} : V::load(p + r * p_stride + z * Isa::W);
  accumulate<Isa, R, Z>(acc, h, v, columns);
  for (int r = 0; r < R; ++r)
    for (int z = 0; z < Z; ++z) V::store(p + r * p_stride + z * Isa::W, acc[r][z]);
}

// `rows` rows, at most R, against Z vectors.
template <class Isa, int R, int Z, class Stream, class T>
EV_INLINE void some_rows(int64_t rows, Stream h, Panels<T> v, int64_t columns, float* p, int64_t p_stride, bool first) {
  if constexpr (R > 1) {
    if (rows < R) return some_rows<Isa, R - 1, Z>(rows, h, v, columns, p, p_stride, first);
  }
  register_tile<Isa, R, Z>(h, v, columns, p, p_stride, first);
}

// All rows of the tile against Z vectors, which stay in L1 meanwhile. The rows are taken in parts of much the same size: 4 and 4
// keep the multipliers busier than 6 and 2.
template <class Isa, int R, int Z, class Stream, class T>
EV_INLINE void all_rows(int64_t rows, Stream h, Panels<T> v, int64_t columns, float* p, int64_t p_stride, bool first) {
  for (int64_t parts = (rows + R - 1) / R; parts > 0; --parts) {
    const int64_t part = (rows + parts - 1) / parts;
    some_rows<Isa, R, Z>(part, h, v, columns, p, p_stride, first);
    rows -= part, h.at += part * h.stride, p += part * p_stride;
  }
}

// Up to R rows against all vectors, at most Z at a time.
template <class Isa, int R, int Z, class Stream, class T>
EV_INLINE void all_vectors(int64_t rows, int64_t vectors, Stream h, Panels<T> v, int64_t columns, float* p, int64_t p_stride, bool first) {
  if constexpr (Z > 0) {
    for (; vectors >= Z; vectors -= Z, v.at = v.template vector<Isa::W>(Z), p += Z * Isa::W)
      all_rows<Isa, R, Z>(rows, h, v, columns, p, p_stride, first);
    if (vectors > 0) all_vectors<Isa, R, Z - EV_LANES / Isa::W>(rows, vectors, h, v, columns, p, p_stride, first);
  }
}

// The fewer the rows, the more vectors beside them keep the multipliers busy.
template <class Isa, int R, class Stream, class T>
EV_INLINE void block_of_tile(int64_t rows, int64_t vectors, Stream h, Panels<T> v, int64_t columns, float* p, int64_t p_stride, bool first) {
  if constexpr (R > 1) {
    if (rows < R) return block_of_tile<Isa, R - 1>(rows, vectors, h, v, columns, p, p_stride, first);
  }
  all_vectors<Isa, R, Isa::VECTORS[R]>(rows, vectors, h, v, columns, p, p_stride, first);
}

// --- projections of a tile ------------------------------------------------------------------------------------------

// What one reading of a block of a token's columns brings: h = x + residual in fp32, zero-padded to an even number, unless `h` is
// null; the squares of that, by lanes; and, unless `delta` is null, `to` = x + delta, rounded once.
template <class Isa, class T>
void pass(const T* x, const T* residual, int64_t columns, float* h, typename Vec<Isa::W>::F& squares, const float* delta, T* to) {
  using V = Vec<Isa::W>;
  typename V::F sum = squares;
  int64_t i = 0;
  for (; i + Isa::W <= columns; i += Isa::W) {
    if (h && i * sizeof(T) % 64 == 0) __builtin_prefetch(x + columns + i, 0, 2);  // the next block, to L2
    const typename V::F own = V::load(x + i), value = residual ? own + V::load(residual + i) : own;
    if (h) V::store(h + i, value);
    sum += value * value;
    if (delta) V::store(to + i, own + V::load(delta + i));
  }
  for (; i < columns; ++i) {
    const float own = widen(x[i]), value = residual ? own + widen(residual[i]) : own;
    if (h) h[i] = value;
    sum[0] += value * value;
    if (delta) narrow(own + delta[i], to[i]);
  }
  if (h && i % 2) h[i] = 0.f;
  squares = sum;
}

// The same of every token of a tile; h is [tokens, EV_BLOCK].
template <class Isa, class T>
void pass(const ev_args& a, ev_range tokens, int64_t column, int64_t columns, float* h, typename Vec<Isa::W>::F* squares, const float* const* adds) {
  for (int64_t t = tokens.begin; t < tokens.end; ++t, h = h ? h + EV_BLOCK : h, ++squares) {
    T* x = static_cast<T*>(a.x) + t * a.x_stride + column;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + t * a.residual_stride + column : nullptr;
    const float* delta = adds ? adds[t - tokens.begin] : nullptr;
    pass<Isa, T>(x, residual, columns, h, *squares, delta ? delta + column : nullptr, x);
  }
}

template <class Isa>
void project(const ev_args* args, ev_range tokens, ev_range concepts, float* p, int64_t p_stride, float* sq, const float* const* adds) {
  using V = Vec<Isa::W>;
  const ev_args& a = *args;
  const int64_t count = tokens.end - tokens.begin, vectors = (concepts.end - concepts.begin) / Isa::W;
  const bool pairs = a.reader_dtype == EV_BF16;
  const bool direct = Isa::BF16_DOT && pairs && a.dtype == EV_BF16 && !a.residual && a.d % 2 == 0;
  alignas(64) float staged[EV_CPU_TILE * EV_BLOCK];
  float* const wanted = vectors > 0 ? staged : nullptr;
  typename V::F squares[EV_CPU_TILE] = {};
  const int64_t pair_rows = (a.d + 1) / 2;
  const Panels<float> wide{static_cast<const float*>(a.readers) + concepts.begin * a.d, a.d * EV_LANES};
  const Panels<uint32_t> paired{static_cast<const uint32_t*>(a.readers) + concepts.begin * pair_rows, pair_rows * EV_LANES};

  const int64_t most = vectors == 0 ? a.d : direct ? EV_DIRECT_BLOCK : EV_BLOCK, blocks = (a.d + most - 1) / most;
  const int64_t block = ((a.d + blocks - 1) / blocks + EV_LANES - 1) / EV_LANES * EV_LANES;  // all much the same
  for (int64_t column = 0; column < a.d; column += block) {
    const int64_t columns = std::min(block, a.d - column);
    const bool first = column == 0;
    if constexpr (Isa::BF16_DOT) {
      if (direct) {
        const Pairs x{static_cast<const bf16*>(a.x) + tokens.begin * a.x_stride + column, a.x_stride};
        block_of_tile<Isa, Isa::ROWS>(count, vectors, x, paired.from(column / 2), columns, p, p_stride, first);
        if (sq || adds) pass<Isa, bf16>(a, tokens, column, columns, nullptr, squares, adds);
        continue;
      }
    }
    if (a.dtype == EV_F32) pass<Isa, float>(a, tokens, column, columns, wanted, squares, adds);
    if (a.dtype == EV_BF16) pass<Isa, bf16>(a, tokens, column, columns, wanted, squares, adds);
    if (a.dtype == EV_F16) pass<Isa, f16>(a, tokens, column, columns, wanted, squares, adds);
    const Staged h{staged, EV_BLOCK};
    if (pairs) {
      block_of_tile<Isa, Isa::ROWS>(count, vectors, h, paired.from(column / 2), columns, p, p_stride, first);
    } else {
      block_of_tile<Isa, Isa::ROWS>(count, vectors, h, wide.from(column), columns, p, p_stride, first);
    }
  }
  if (sq)
    for (int64_t t = 0; t < count; ++t) sq[t] = V::sum(squares[t]);
}

// --- scores, norms and steering of a tile ---------------------------------------------------------------------------

// x += delta + sum_m c_m v_m, rounded once.
template <class Isa, class T>
void update(const ev_args& a, T* x, const float* delta, const T* const* vectors, const float* c, int count) {
  using V = Vec<Isa::W>;
  int64_t i = 0;
  for (; i + Isa::W <= a.d; i += Isa::W) {
    typename V::F value = V::load(x + i) + V::load(delta + i);
    for (int m = 0; m < count; ++m) value += V::load(vectors[m] + i) * c[m];
    V::store(x + i, value);
  }
  for (; i < a.d; ++i) {
    float value = widen(x[i]) + delta[i];
    for (int m = 0; m < count; ++m) value += widen(vectors[m][i]) * c[m];
    narrow(value, x[i]);
  }
}

template <class Isa, class T>
void steer(const ev_args& a, int64_t token, const float* p) {
  const int32_t j = ev_choose_row(a, token, p);
  if (j < 0) return;
  float solved[EV_MAX_RULES], c[EV_MAX_RULES];
  const T* vectors[EV_MAX_RULES];
  int count = 0;
  if (ev_solve_rules(a, j, p, solved)) {
    for (int64_t m = 0; m < a.table.rules; ++m) {
      if (solved[m] == 0.f) continue;
      c[count] = solved[m];
      vectors[count++] = static_cast<const T*>(a.directions) + a.table.rule_concept[j * a.table.rules + m] * a.d;
    }
  }
  update<Isa, T>(a, static_cast<T*>(a.x) + token * a.x_stride, a.table.delta + j * a.d, vectors, c, count);
}

// A token's scores, rounded once to the dtype they are kept in.
template <class Isa, class T>
void write_scores(const ev_args& a, const float* p, T* scores) {
  using V = Vec<Isa::W>;
  int64_t k = 0;
  for (; k + Isa::W <= a.k; k += Isa::W) V::store(scores + k, (V::load(p + k) - V::load(a.mean + k)) * V::load(a.inv_std + k));
  for (; k < a.k; ++k) narrow(ev_score(p[k], a.mean[k], a.inv_std[k]), scores[k]);
}

template <class Isa>
void finish(const ev_args* args, ev_range tokens, const float* p, int64_t p_stride, const float* sq, const float* const* adds) {
  const ev_args& a = *args;
  for (int64_t t = tokens.begin; t < tokens.end; ++t, p += p_stride) {
    if (a.sqnorm) a.sqnorm[t] = sq[t - tokens.begin];
    if (a.scores && a.scores_dtype == EV_F32) write_scores<Isa>(a, p, static_cast<float*>(a.scores) + t * a.scores_stride);
    if (a.scores && a.scores_dtype == EV_BF16) write_scores<Isa>(a, p, static_cast<bf16*>(a.scores) + t * a.scores_stride);
    if (!a.table.delta || (adds && adds[t - tokens.begin])) continue;
    if (a.dtype == EV_F32) steer<Isa, float>(a, t, p);
    if (a.dtype == EV_BF16) steer<Isa, bf16>(a, t, p);
    if (a.dtype == EV_F16) steer<Isa, f16>(a, t, p);
  }
}

template <class Isa>
constexpr ev_cpu_form form_of() {
  return {project<Isa>, finish<Isa>, 48};
}

}  // namespace
