#include "schedule.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/steer.h"

namespace emovec {

namespace {

constexpr int64_t kTile = 48;          // tokens; a multiple of every form's rows, and the most that `project` takes
constexpr int64_t kDecodeTokens = 8;   // up to here threads share the concepts, not the tokens
constexpr int64_t kSerialWork = 1 << 21;  // multiply-adds below which waking a thread costs more than it brings

// Adding alone needs no projection: only scores, gates and rules do.
bool needs_projections(const ev_args& a) {
  if (a.scores) return true;
  if (!a.table.delta) return false;
  if (a.table.rules > 0) return true;
  for (int64_t j = 0; j < a.table.rows; ++j)
    if (a.table.gate[2 * j] >= 0) return true;
  return false;
}

// One thread takes whole tokens: project, then finish while the tile is in cache.
void run_tokens(const ev_args& a, const ev_cpu_form& form, ev_range tokens, ev_range concepts, int64_t tile) {
  alignas(64) float p[kTile * EV_MAX_CONCEPTS];
  float sq[kTile];
  for (int64_t t = tokens.begin; t < tokens.end; t += tile) {
    const ev_range part{t, std::min(t + tile, tokens.end)};
    if (concepts.end > 0 || a.sqnorm) form.project(&a, part, concepts, p, a.k_padded, a.sqnorm ? sq : nullptr);
    form.finish(&a, part, p, a.k_padded, sq);
  }
}

// Few tokens: the time is the readers' way from memory, so every thread fetches its own concepts. Splitting concepts
// rather than d keeps each sum in one piece and its order fixed.
void run_concepts(const ev_args& a, const ev_cpu_form& form) {
  alignas(64) float p[kDecodeTokens * EV_MAX_CONCEPTS];
  float sq[kDecodeTokens];
  const ev_range tokens{0, a.n};
  torch::stable::parallel_for(0, a.k_padded / EV_LANES, 1, [&](int64_t begin, int64_t end) {
    const ev_range concepts{begin * EV_LANES, end * EV_LANES};
    form.project(&a, tokens, concepts, p + concepts.begin, a.k_padded, a.sqnorm && begin == 0 ? sq : nullptr);
  });
  form.finish(&a, tokens, p, a.k_padded, sq);
}

}  // namespace

const ev_cpu_form* cpu_form(int64_t kernel) {
  if (kernel != EV_AUTO) return ev_cpu_form_for(static_cast<int32_t>(kernel));
  static const ev_cpu_form* const fastest = [] {
    const ev_cpu_form* form = nullptr;
    for (int32_t k = EV_CPU_AVX512_BF16; k >= EV_CPU_SCALAR && !form; --k) form = ev_cpu_form_for(k);
    return form;
  }();
  return fastest;
}

void run(const ev_args& a, const ev_cpu_form& form) {
  if (a.n == 0 || (!a.table.delta && !a.scores && !a.sqnorm)) return;
  const ev_range concepts{0, needs_projections(a) ? a.k_padded : 0};
  const int64_t work = a.n * a.d * std::max<int64_t>(concepts.end, EV_LANES);
  const int64_t threads = work < kSerialWork ? 1 : torch::stable::get_num_threads();
  if (threads == 1) return run_tokens(a, form, {0, a.n}, concepts, kTile);
  if (a.n <= kDecodeTokens && concepts.end > 0) return run_concepts(a, form);
  const int64_t share = (a.n + threads - 1) / threads;
  const int64_t tile = std::min(kTile, (share + 5) / 6 * 6);
  torch::stable::parallel_for(0, (a.n + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    run_tokens(a, form, {begin * tile, std::min(end * tile, a.n)}, concepts, tile);
  });
}

}  // namespace emovec
