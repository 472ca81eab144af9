// The form that runs everywhere: four lanes of whatever the baseline processor has (SSE2, NEON).
#include "forms.h"
#include "tile.h"

namespace {
struct Scalar {
  static constexpr int W = 4, ROWS = 2;
  static constexpr int VECTORS[ROWS + 1] = {0, 8, 4};
  static constexpr bool BF16_DOT = false;
};
}  // namespace

const ev_cpu_form ev_form_scalar = form_of<Scalar>();
