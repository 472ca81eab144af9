// AVX2 with FMA and F16C: 16 registers, 6 x 2 accumulators of 8 floats.
#include "forms.h"
#include "tile.h"

namespace {
struct Avx2 {
  static constexpr int W = 8, ROWS = 6;
  static constexpr int VECTORS[ROWS + 1] = {0, 8, 6, 4, 2, 2, 2};
  static constexpr bool BF16_DOT = false;
};
}  // namespace

const ev_cpu_form ev_form_avx2 = form_of<Avx2>();
