// The CPU kernel: projections of a tile of tokens on all concepts, then scores, norms and steering while the tile is in
// cache. Instantiated once per instruction set (form_*.cpp) from a small description of it:
//
//   struct Isa { W: lanes; ROWS: most tokens of a register tile; VECTORS[rows]: most vectors of W concepts beside them;
//                BF16_DOT: has `dot_pairs`, the bf16 pair product }
//
// A projection is one accumulator per (token, concept), summed over d in order. So it depends neither on the shape of
// the register tile, nor on the blocking, nor on the number of threads, nor on what else is in the batch.
#pragma once
#include "../common/steer.h"
#include "vec.h"

namespace {

enum : int64_t {
  EV_BLOCK = 512,  // columns of d at a time: 512 x 176 bf16 readers are 180 KB and stay in L2 for the whole tile
  EV_TILE = 48,    // most tokens of a tile: 48 x 512 fp32 staged are 96 KB
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

// p[r][z] += sum over the block's columns; readers are fp32 [d, k_padded].
template <class Isa, int R, int Z>
EV_INLINE void accumulate(typename Vec<Isa::W>::F (&acc)[R][Z], Staged h, const float* v, int64_t pitch, int64_t columns) {
  using V = Vec<Isa::W>;
  for (int64_t i = 0; i < columns; ++i, v += pitch) {
    typename V::F vectors[Z];
    for (int z = 0; z < Z; ++z) vectors[z] = V::load(v + z * Isa::W);
    for (int r = 0; r < R; ++r) {
      const auto value = V::set1(h.at[r * h.stride + i]);
      for (int z = 0; z < Z; ++z) acc[r][z] += value * vectors[z];
    }
  }
}

// The same for readers as bf16 pairs [d/2, k_padded, 2]: a lane holds columns 2i (low half) and 2i+1 (high half).
template <class Isa, int R, int Z>
EV_INLINE void accumulate(typename Vec<Isa::W>::F (&acc)[R][Z], Staged h, const uint32_t* v, int64_t pitch, int64_t columns) {
  using V = Vec<Isa::W>;
  for (int64_t i = 0; i < columns; i += 2, v += pitch) {
    typename V::F vectors[Z];
    for (int z = 0; z < Z; ++z) vectors[z] = (typename V::F)(V::template read<typename V::U>(v + z * Isa::W) << 16);
    for (int r = 0; r < R; ++r) {
      const auto value = V::set1(h.at[r * h.stride + i]);
      for (int z = 0; z < Z; ++z) acc[r][z] += value * vectors[z];
    }
    for (int z = 0; z < Z; ++z) vectors[z] = (typename V::F)(V::template read<typename V::U>(v + z * Isa::W) & 0xffff0000u);
    for (int r = 0; r < R; ++r) {
      const auto value = V::set1(h.at[r * h.stride + i + 1]);
      for (int z = 0; z < Z; ++z) acc[r][z] += value * vectors[z];
    }
  }
}

// bf16 x against bf16 readers where the processor multiplies pairs.
template <class Isa, int R, int Z>
EV_INLINE void accumulate(typename Vec<Isa::W>::F (&acc)[R][Z], Pairs x, const uint32_t* v, int64_t pitch, int64_t columns) {
  using V = Vec<Isa::W>;
  for (int64_t i = 0; i < columns; i += 2, v += pitch) {
    typename V::U vectors[Z];
    for (int z = 0; z < Z; ++z) vectors[z] = V::template read<typename V::U>(v + z * Isa::W);
    for (int r = 0; r < R; ++r) {
      const auto pair = typename V::U{} + V::template read<uint32_t>(x.at + r * x.stride + i);
      for (int z = 0; z < Z; ++z) acc[r][z] = Isa::dot_pairs(acc[r][z], vectors[z], pair);
    }
  }
}

template <class Isa, int R, int Z, class Stream, class Reader>
void register_tile(Stream h, const Reader* v, int64_t pitch, int64_t columns, float* p, int64_t p_stride, bool first) {
  using V = Vec<Isa::W>;
  typename V::F acc[R][Z];
  for (int r = 0; r < R; ++r)
    for (int z = 0; z < Z; ++z) acc[r][z] = first ? typename V::F{} : V::load(p + r * p_stride + z * Isa::W);
  accumulate<Isa, R, Z>(acc, h, v, pitch, columns);
  for (int r = 0; r < R; ++r)
    for (int z = 0; z < Z; ++z) V::store(p + r * p_stride + z * Isa::W, acc[r][z]);
}

template <class Isa, int R, int Z, class Stream, class Reader>
EV_INLINE void vectors_of_rows(int64_t vectors, Stream h, const Reader* v, int64_t pitch, int64_t columns, float* p, int64_t ps, bool first) {
  if constexpr (Z > 0) {
    for (; vectors >= Z; vectors -= Z, v += Z * Isa::W, p += Z * Isa::W)
      register_tile<Isa, R, Z>(h, v, pitch, columns, p, ps, first);
    if (vectors > 0) vectors_of_rows<Isa, R, Z - 1>(vectors, h, v, pitch, columns, p, ps, first);
  }
}

template <class Isa, int R, class Stream, class Reader>
EV_INLINE void rows_of_tile(int64_t rows, int64_t vectors, Stream h, const Reader* v, int64_t pitch, int64_t columns, float* p, int64_t ps, bool first) {
  if constexpr (R > 0) {
    for (; rows >= R; rows -= R, h.at += R * h.stride, p += R * ps)
      vectors_of_rows<Isa, R, Isa::VECTORS[R]>(vectors, h, v, pitch, columns, p, ps, first);
    if (rows > 0) rows_of_tile<Isa, R - 1>(rows, vectors, h, v, pitch, columns, p, ps, first);
  }
}

// --- projections of a tile ------------------------------------------------------------------------------------------

// h[t] = x[t] + residual[t] in fp32 for `columns` columns, zero-padded to an even number; squares[t] += h^2 by lanes.
template <class Isa, class T>
void stage(const ev_args& a, ev_range tokens, int64_t column, int64_t columns, float* h, typename Vec<Isa::W>::F* squares) {
  using V = Vec<Isa::W>;
  for (int64_t t = tokens.begin; t < tokens.end; ++t, h += EV_BLOCK, ++squares) {
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride + column;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + t * a.residual_stride + column : nullptr;
    typename V::F square = *squares;
    int64_t i = 0;
    for (; i + Isa::W <= columns; i += Isa::W) {
      typename V::F value = V::load(x + i);
      if (residual) value += V::load(residual + i);
      V::store(h + i, value);
      square += value * value;
    }
    for (; i < columns; ++i) {
      float value = widen(x[i]);
      if (residual) value += widen(residual[i]);
      h[i] = value;
      square[0] += value * value;
    }
    if (i % 2) h[i] = 0.f;
    *squares = square;
  }
}

template <class Isa, class T>
void squares_of(const ev_args& a, ev_range tokens, int64_t column, int64_t columns, typename Vec<Isa::W>::F* squares) {
  using V = Vec<Isa::W>;
  for (int64_t t = tokens.begin; t < tokens.end; ++t, ++squares) {
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride + column;
    int64_t i = 0;
    for (; i + Isa::W <= columns; i += Isa::W) *squares += V::load(x + i) * V::load(x + i);
    for (; i < columns; ++i) (*squares)[0] += widen(x[i]) * widen(x[i]);
  }
}

template <class Isa>
void project(const ev_args* args, ev_range tokens, ev_range concepts, float* p, int64_t p_stride, float* sq) {
  using V = Vec<Isa::W>;
  const ev_args& a = *args;
  const int64_t count = tokens.end - tokens.begin, vectors = (concepts.end - concepts.begin) / Isa::W;
  const bool pairs = a.reader_dtype == EV_BF16;
  const bool direct = Isa::BF16_DOT && pairs && a.dtype == EV_BF16 && !a.residual && a.d % 2 == 0;
  alignas(64) float staged[EV_TILE * EV_BLOCK];
  typename V::F squares[EV_TILE] = {};
  const float* wide = static_cast<const float*>(a.readers) + concepts.begin;
  const uint32_t* paired = static_cast<const uint32_t*>(a.readers) + concepts.begin;

  for (int64_t column = 0; column < a.d; column += EV_BLOCK) {
    const int64_t columns = a.d - column < EV_BLOCK ? a.d - column : EV_BLOCK;
    const bool first = column == 0;
    if constexpr (Isa::BF16_DOT) {
      if (direct) {
        const Pairs x{static_cast<const bf16*>(a.x) + tokens.begin * a.x_stride + column, a.x_stride};
        rows_of_tile<Isa, Isa::ROWS>(count, vectors, x, paired + column / 2 * a.k_padded, a.k_padded, columns, p, p_stride, first);
        if (sq) squares_of<Isa, bf16>(a, tokens, column, columns, squares);
        continue;
      }
    }
    if (a.dtype == EV_F32) stage<Isa, float>(a, tokens, column, columns, staged, squares);
    if (a.dtype == EV_BF16) stage<Isa, bf16>(a, tokens, column, columns, staged, squares);
    if (a.dtype == EV_F16) stage<Isa, f16>(a, tokens, column, columns, staged, squares);
    const Staged h{staged, EV_BLOCK};
    if (pairs) {
      rows_of_tile<Isa, Isa::ROWS>(count, vectors, h, paired + column / 2 * a.k_padded, a.k_padded, columns, p, p_stride, first);
    } else {
      rows_of_tile<Isa, Isa::ROWS>(count, vectors, h, wide + column * a.k_padded, a.k_padded, columns, p, p_stride, first);
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

template <class Isa>
void finish(const ev_args* args, ev_range tokens, const float* p, int64_t p_stride, const float* sq) {
  using V = Vec<Isa::W>;
  const ev_args& a = *args;
  for (int64_t t = tokens.begin; t < tokens.end; ++t, p += p_stride) {
    if (a.sqnorm) a.sqnorm[t] = sq[t - tokens.begin];
    if (a.scores) {
      float* scores = a.scores + t * a.scores_stride;
      int64_t k = 0;
      for (; k + Isa::W <= a.k; k += Isa::W)
        V::store(scores + k, (V::load(p + k) - V::load(a.mean + k)) * V::load(a.inv_std + k));
      for (; k < a.k; ++k) scores[k] = ev_score(p[k], a.mean[k], a.inv_std[k]);
    }
    if (!a.table.delta) continue;
    if (a.dtype == EV_F32) steer<Isa, float>(a, t, p);
    if (a.dtype == EV_BF16) steer<Isa, bf16>(a, t, p);
    if (a.dtype == EV_F16) steer<Isa, f16>(a, t, p);
  }
}

template <class Isa>
constexpr ev_cpu_form form_of() {
  return {project<Isa>, finish<Isa>};
}

}  // namespace
