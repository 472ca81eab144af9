#include "schedule.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/plan.h"

namespace emovec {

namespace {

// What row j adds to a token, if that is all it does. Else null, as for no row (-1).
const float* only_adds(const ev_args& a, int32_t j) { return j < 0 || ev_waits(a, j) ? nullptr : a.table.delta + j * a.d; }

// Adding alone needs no projection: only scores, gates and rules do.
bool needs_projections(const ev_args& a) {
  if (a.scores) return true;
  for (int32_t j = 0; a.table.delta && j < a.table.rows; ++j)
    if (ev_waits(a, j)) return true;
  return false;
}

// One thread takes whole tokens: project, adding where nothing else is done, then finish while the tile is in cache.
void run_tokens(const ev_args& a, const ev_cpu_form& form, ev_range tokens, ev_range concepts, int64_t tile) {
  alignas(64) float p[EV_CPU_TILE * EV_MAX_CONCEPTS];
  float sq[EV_CPU_TILE];
  const float* adds[EV_CPU_TILE];
  for (int64_t t = tokens.begin; t < tokens.end; t += tile) {
    const ev_range part{t, std::min(t + tile, tokens.end)};
    for (int64_t i = part.begin; i < part.end && a.table.delta; ++i) adds[i - t] = only_adds(a, ev_own_row(a, i));
    form.project(&a, part, concepts, p, a.k_padded, a.sqnorm ? sq : nullptr, a.table.delta ? adds : nullptr);
    form.finish(&a, part, p, a.k_padded, sq, adds);
  }
}

// Every thread fetches its own concepts. Splitting concepts rather than d keeps each sum in one piece and its order fixed.
void run_concepts(const ev_args& a, const ev_cpu_form& form) {
  alignas(64) float p[EV_DECODE_TOKENS * EV_MAX_CONCEPTS];
  float sq[EV_DECODE_TOKENS];
  const ev_range tokens{0, a.n};
  torch::stable::parallel_for(0, a.k_padded / EV_LANES, 1, [&](int64_t begin, int64_t end) {
    const ev_range concepts{begin * EV_LANES, end * EV_LANES};
    form.project(&a, tokens, concepts, p + concepts.begin, a.k_padded, a.sqnorm && begin == 0 ? sq : nullptr, nullptr);
  });
  form.finish(&a, tokens, p, a.k_padded, sq, nullptr);
}

}  // namespace

const ev_cpu_form* cpu_form(int32_t kernel) {
  if (kernel != EV_AUTO) return ev_cpu_form_for(kernel);
  static const ev_cpu_form* const fastest = ev_cpu_form_for(ev_cpu_fastest());
  return fastest;
}

void run(const ev_args& a, const ev_cpu_form& form) {
  if (a.n == 0 || (!a.table.delta && !a.scores && !a.sqnorm)) return;
  const ev_range concepts{0, needs_projections(a) ? a.k_padded : 0};
  const ev_cpu_plan plan = ev_plan_cpu(a.n, a.d, concepts.end, torch::stable::get_num_threads(), form.tile);
  if (plan.split == EV_SERIAL) return run_tokens(a, form, {0, a.n}, concepts, plan.tile);
  if (plan.split == EV_OVER_CONCEPTS) return run_concepts(a, form);
  torch::stable::parallel_for(0, a.n, EV_ROWS, [&](int64_t begin, int64_t end) { run_tokens(a, form, {begin, end}, concepts, plan.tile); });
}

}  // namespace emovec
