// Vectors of W floats in the compiler's own vector types, and the conversions between them and the three activation
// dtypes. Everything is in an anonymous namespace: each form's file compiles its own copy with its own instruction set,
// and the linker must never share one between them.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define EV_INLINE inline __attribute__((always_inline))

namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// One value, as the ends of rows need it. The rounding is the vectors' own.
EV_INLINE float widen(float value) { return value; }
EV_INLINE float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
EV_INLINE float widen(f16 value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof half);
  return half;
}
EV_INLINE void narrow(float value, float& to) { to = value; }
EV_INLINE void narrow(float value, bf16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to.bits = static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
EV_INLINE void narrow(float value, f16& to) {
  const _Float16 half = static_cast<_Float16>(value);
  std::memcpy(&to, &half, sizeof half);
}

// GCC ignores a vector size that depends on a template's parameter, so the three widths are spelled out.
template <int W>
struct Lanes;
#define EV_LANES_OF(W)                                    \
  template <>                                             \
  struct Lanes<W> {                                       \
    typedef float F __attribute__((vector_size(4 * W)));  \
    typedef uint32_t U __attribute__((vector_size(4 * W))); \
    typedef uint16_t H __attribute__((vector_size(2 * W))); \
  };
EV_LANES_OF(4)
EV_LANES_OF(8)
EV_LANES_OF(16)
#undef EV_LANES_OF

template <int W>
struct Vec {
  using F = typename Lanes<W>::F;
  using U = typename Lanes<W>::U;
  using H = typename Lanes<W>::H;

  static EV_INLINE F set1(float value) { return value - F{}; }  // exact, also for -0: the compiler makes a broadcast of it

  template <class V>
  static EV_INLINE V read(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  static EV_INLINE F load(const float* from) { return read<F>(from); }
  static EV_INLINE F load(const bf16* from) { return (F)(__builtin_convertvector(read<H>(from), U) << 16); }
  static EV_INLINE F load(const f16* from) {
    F value;
#if defined(__F16C__)
    if constexpr (W % 8 == 0) {
      for (int i = 0; i < W; i += 8) {
        const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
        std::memcpy(reinterpret_cast<float*>(&value) + i, &part, sizeof part);
      }
      return value;
    }
#endif
    for (int i = 0; i < W; ++i) value[i] = widen(from[i]);
    return value;
  }

  static EV_INLINE void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
  static EV_INLINE void store(bf16* to, F value) {  // round to nearest even; a NaN stays one
#if defined(__AVX512BF16__)
    if constexpr (W == 16) {
      if (__builtin_expect(!_mm512_fpclass_ps_mask((__m512)value, 0x20), 1)) {  // the instruction would flush denormals
        const __m256bh half = _mm512_cvtneps_pbh((__m512)value);
        std::memcpy(to, &half, sizeof half);
        return;
      }
    }
#endif
    const U bits = (U)value;
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U quiet = (bits >> 16) | 0x40u;
    const H half = __builtin_convertvector(value != value ? quiet : rounded, H);
    std::memcpy(to, &half, sizeof half);
  }
  static EV_INLINE void store(f16* to, F value) {
#if defined(__F16C__)
    if constexpr (W % 8 == 0) {
      for (int i = 0; i < W; i += 8) {
        const __m256 part = read<__m256>(reinterpret_cast<const float*>(&value) + i);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
      }
      return;
    }
#endif
    for (int i = 0; i < W; ++i) narrow(value[i], to[i]);
  }

  static EV_INLINE float sum(F value) {  // always in this order, so that a norm repeats bit for bit
    float total = 0.f;
    for (int i = 0; i < W; ++i) total += value[i];
    return total;
  }
};

}  // namespace
