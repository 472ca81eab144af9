// The arithmetic of the op for one token, once, for every C++ and CUDA kernel. emovec/reference.py says the same in torch.
#pragma once
#include "../api.h"

#if defined(__CUDACC__)
#define EV_FN __host__ __device__ __forceinline__
#else
#define EV_FN static inline
#endif

enum : int32_t { EV_MAX_RULES = 16, EV_MAX_CONCEPTS = 1024, EV_LANES = 16 };

EV_FN float ev_score(float projection, float mean, float inv_std) { return (projection - mean) * inv_std; }

EV_FN bool ev_is_concept(const ev_args& a, int32_t concept) { return concept >= 0 && concept < a.k; }
EV_FN bool ev_is_row(const ev_args& a, int32_t j) { return j >= 0 && j < a.table.rows; }

// The row that steers a token whose projections are p: its own, the one it falls back to while its gate is closed, or
// -1 for a token that must not be written. A NaN score leaves the gate closed. Indices out of range count as -1.
EV_FN int32_t ev_choose_row(const ev_args& a, int64_t token, const float* p) {
  const int32_t j = a.row ? a.row[token] : 0;
  if (!ev_is_row(a, j)) return -1;
  const int32_t concept = a.table.gate[2 * j];
  if (!ev_is_concept(a, concept)) return j;
  const bool open = ev_score(p[concept], a.mean[concept], a.inv_std[concept]) > a.table.gate_threshold[j];
  if (open) return j;
  const int32_t fallback = a.table.gate[2 * j + 1];
  return ev_is_row(a, fallback) ? fallback : -1;
}

// Coefficients c [M] such that adding sum_m c_m v_m after row j's delta brings every rule's projection into its bounds,
// and moves no rule that holds already. c_m is 0 where row j has no rule m. Returns false if all are zero.
EV_FN bool ev_solve_rules(const ev_args& a, int32_t j, const float* p, float* c) {
  const int64_t rules = a.table.rules;
  const int32_t* concept = a.table.rule_concept + j * rules;
  const float* lo = a.table.rule_bounds + j * 3 * rules;
  const float* hi = lo + rules;
  const float* shift = hi + rules;
  const float* solve = a.table.rule_solve + j * rules * rules;
  float wanted[EV_MAX_RULES];
  for (int64_t m = 0; m < rules; ++m) {
    wanted[m] = 0.f;
    if (!ev_is_concept(a, concept[m])) continue;
    const float steered = p[concept[m]] + shift[m];
    const float bounded = steered < lo[m] ? lo[m] : steered > hi[m] ? hi[m] : steered;
    wanted[m] = bounded - steered;
  }
  bool any = false;
  for (int64_t m = 0; m < rules; ++m) {
    float sum = 0.f;
    if (ev_is_concept(a, concept[m])) {
      for (int64_t i = 0; i < rules; ++i) sum += solve[m * rules + i] * wanted[i];
    }
    c[m] = sum;
    any |= sum != 0.f;
  }
  return any;
}
