// AVX-512 BF16: as form_avx512.cpp, and bf16 x against bf16 readers by `vdpbf16ps`, at twice the fp32 rate.
#include "forms.h"
#include "tile.h"
#if !defined(EV_EMULATE_AVX512)
#include <immintrin.h>
#endif

namespace {
struct Avx512Bf16 {
  static constexpr int W = 16, ROWS = 6;
  static constexpr int VECTORS[ROWS + 1] = {0, 6, 8, 6, 4, 4, 4};
  static constexpr bool BF16_DOT = true;
  using V = Vec<W>;

  static EV_INLINE V::F dot_pairs(V::F acc, V::U a, V::U b) {
#if defined(EV_EMULATE_AVX512)  // the instruction's own order: high halves first (it also flushes denormals)
    acc += (V::F)(a & 0xffff0000u) * (V::F)(b & 0xffff0000u);
    return acc + (V::F)(a << 16) * (V::F)(b << 16);
#else
    return (V::F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
  }
};
}  // namespace

const ev_cpu_form ev_form_avx512_bf16 = form_of<Avx512Bf16>();
