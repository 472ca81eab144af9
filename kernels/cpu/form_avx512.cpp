// AVX-512: 32 registers, 6 x 4 accumulators of 16 floats; bf16 readers are widened by a shift.
#include "forms.h"
#include "tile.h"

namespace {
struct Avx512 {
  static constexpr int W = 16, ROWS = 6;
  static constexpr int VECTORS[ROWS + 1] = {0, 6, 8, 6, 4, 4, 4};
  static constexpr bool BF16_DOT = false;
};
}  // namespace

const ev_cpu_form ev_form_avx512 = form_of<Avx512>();
