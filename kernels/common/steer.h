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

// The row a token points at, or -1. Indices out of range count as -1.
EV_FN int32_t ev_own_row(const ev_args& a, int64_t token) {
  const int32_t j = a.row ? a.row[token] : 0;
  return ev_is_row(a, j) ? j : -1;
}

// Whether a token with row j waits for its projections: the row has a gate or a rule. Otherwise it only adds.
EV_FN bool ev_waits(const ev_args& a, int32_t j) {
  bool waits = ev_is_concept(a, a.table.gate[2 * j]);
  for (int64_t m = 0; m < a.table.rules; ++m) waits |= ev_is_concept(a, a.table.rule_concept[j * a.table.rules + m]);
  return waits;
}

// The row that steers a token whose projection on concept k is p[k]: its own, the one it falls back to while its gate is
// closed, or -1 for a token that must not be written. A NaN score leaves the gate closed.
template <class Projections>
EV_FN int32_t ev_choose_row(const ev_args& a, int64_t token, const Projections& p) {
  const int32_t j = ev_own_row(a, token);
  if (j < 0) return -1;
  const int32_t concept = a.table.gate[2 * j];
  if (!ev_is_concept(a, concept)) return j;
  const bool open = ev_score(p[concept], a.mean[concept], a.inv_std[concept]) > a.table.gate_threshold[j];
  if (open) return j;
  const int32_t fallback = a.table.gate[2 * j + 1];
  return ev_is_row(a, fallback) ? fallback : -1;
}

// How far rule m of row j wants its projection moved after the row's delta; 0 where there is no rule m.
template <class Projections>
EV_FN float ev_rule_wants(const ev_args& a, int32_t j, int64_t m, const Projections& p) {
  const int64_t rules = a.table.rules;
  const int32_t concept = a.table.rule_concept[j * rules + m];
  if (!ev_is_concept(a, concept)) return 0.f;
  const float* bounds = a.table.rule_bounds + j * 3 * rules + m;
  const float lo = bounds[0], hi = bounds[rules], steered = p[concept] + bounds[2 * rules];
  const float bounded = steered < lo ? lo : steered > hi ? hi : steered;
  return bounded - steered;
}

// The coefficient of rule m's direction, from what every rule of row j wants; 0 where there is no rule m.
EV_FN float ev_rule_coefficient(const ev_args& a, int32_t j, int64_t m, const float* wanted) {
  const int64_t rules = a.table.rules;
  if (!ev_is_concept(a, a.table.rule_concept[j * rules + m])) return 0.f;
  const float* solve = a.table.rule_solve + (j * rules + m) * rules;
  float sum = 0.f;
  for (int64_t i = 0; i < rules; ++i) sum += solve[i] * wanted[i];
  return sum;
}

// Coefficients c [M] such that adding sum_m c_m v_m after row j's delta brings every rule's projection into its bounds,
// and moves no rule that holds already. Returns false if all are zero.
EV_FN bool ev_solve_rules(const ev_args& a, int32_t j, const float* p, float* c) {
  float wanted[EV_MAX_RULES];
  for (int64_t m = 0; m < a.table.rules; ++m) wanted[m] = ev_rule_wants(a, j, m, p);
  bool any = false;
  for (int64_t m = 0; m < a.table.rules; ++m) {
    c[m] = ev_rule_coefficient(a, j, m, wanted);
    any |= c[m] != 0.f;
  }
  return any;
}
