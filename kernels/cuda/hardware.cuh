// What the kernels ask of the hardware, each in one line of PTX: asynchronous copies, matrix loads, tensor-core products;
// and 16-byte vectors of activations. With EV_EMULATE a C++ compiler gets the same functions from emulate.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#if defined(EV_EMULATE)
#include "emulate.h"
#else

namespace ev {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or 16 zero bytes; lands with its group.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` (0 to 2) of the newest groups have not landed.
__device__ __forceinline__ void wait_groups(int pending) {
  if (pending == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  else if (pending == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  else asm volatile("cp.async.wait_group 2;" ::: "memory");
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

#define EV_MMA(NAME, SHAPE)                                                                                                          \
  __device__ __forceinline__ void NAME(float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {                              \
    asm("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                             \
  }
EV_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
EV_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
EV_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef EV_MMA

// 16 bytes to global memory at once, which compilers split. They know of no store here: who reads it back meets a barrier first.
__device__ __forceinline__ void store_16(void* global, const uint32_t (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]));
}

__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace ev
#endif

namespace ev {

// One warp's m16 operand for 32 bytes of columns (16 of a 16-bit dtype, 8 of fp32), and its product with an n8 operand.
// fp32 is split into two tf32 numbers each and three of the four products are taken: the fourth is below fp32's rounding.
template <class T>
struct Operand {
  uint32_t bits[4];
  __device__ __forceinline__ void load(const void* row) { load_matrices(bits, row); }
};
template <>
struct Operand<float> {
  uint32_t high[4], low[4];
  __device__ __forceinline__ void load(const void* row) {
    uint32_t bits[4];
    load_matrices(bits, row);
    for (int i = 0; i < 4; ++i) split(bits[i], high[i], low[i]);
  }
  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    high = to_tf32(__uint_as_float(bits));
    low = to_tf32(__uint_as_float(bits) - __uint_as_float(high));
  }
};

__device__ __forceinline__ void multiply(float (&c)[4], const Operand<__nv_bfloat16>& a, uint32_t b0, uint32_t b1) { mma_bf16(c, a.bits, b0, b1); }
__device__ __forceinline__ void multiply(float (&c)[4], const Operand<__half>& a, uint32_t b0, uint32_t b1) { mma_f16(c, a.bits, b0, b1); }
__device__ __forceinline__ void multiply(float (&c)[4], const Operand<float>& a, uint32_t b0, uint32_t b1) {
  uint32_t high0, low0, high1, low1;
  Operand<float>::split(b0, high0, low0);
  Operand<float>::split(b1, high1, low1);
  mma_tf32(c, a.low, high0, high1);
  mma_tf32(c, a.high, low0, low1);
  mma_tf32(c, a.high, high0, high1);
}

// The two elements of a word, the lower first, and the word of two rounded numbers.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) { return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)}; }
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) { return __half22float2(*reinterpret_cast<__half2*>(&word)); }
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 16 bytes of activations: as they lie in memory, and as numbers.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t word[4];

  // `aligned`: p is a multiple of 16 bytes.
  static __device__ __forceinline__ Vector load(const T* p, bool aligned) {
    if (aligned) {
      const uint4 all = *reinterpret_cast<const uint4*>(p);
      return {{all.x, all.y, all.z, all.w}};
    }
    Vector v;
    T value[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) value[i] = p[i];
    memcpy(v.word, value, sizeof value);
    return v;
  }
  static __device__ __forceinline__ Vector load(const char* shared) { return load(reinterpret_cast<const T*>(shared), true); }
  __device__ __forceinline__ void store(T* p, bool aligned) const {
    if (aligned) {
      store_16(p, word);
      return;
    }
    T value[kSize];
    memcpy(value, word, sizeof value);
#pragma unroll
    for (int i = 0; i < kSize; ++i) p[i] = value[i];
  }

  __device__ __forceinline__ void widen(float (&number)[kSize]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        number[i] = __uint_as_float(word[i]);
      } else {
        const float2 pair = unpack<T>(word[i]);
        number[2 * i] = pair.x;
        number[2 * i + 1] = pair.y;
      }
    }
  }
  static __device__ __forceinline__ Vector rounded(const float (&number)[kSize]) {
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) v.word[i] = __float_as_uint(number[i]);
      else v.word[i] = pack<T>(number[2 * i], number[2 * i + 1]);
    }
    return v;
  }
};

// A vector's worth of fp32.
template <int SIZE>
__device__ __forceinline__ void load_floats(float (&number)[SIZE], const float* p, bool aligned) {
#pragma unroll
  for (int i = 0; i < SIZE; i += 4) {
    float four[4];
    Vector<float>::load(p + i, aligned).widen(four);
#pragma unroll
    for (int s = 0; s < 4; ++s) number[i + s] = four[s];
  }
}
template <int SIZE>
__device__ __forceinline__ void add_floats(float (&number)[SIZE], const float* p, bool aligned) {
  float other[SIZE];
  load_floats(other, p, aligned);
#pragma unroll
  for (int i = 0; i < SIZE; ++i) number[i] += other[i];
}

__host__ __device__ __forceinline__ bool is_aligned(const void* p, int64_t stride_bytes = 0) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

}  // namespace ev
