// What sm_90a adds, each in one line of PTX: boxes of a matrix brought to shared memory by the copy engine, products by a
// warpgroup (four warps) of matrices that lie there, and registers handed from one warpgroup to another. With EV_EMULATE a
// C++ compiler gets the same functions from emulate.h.
//
// Both sides see shared memory in the "128-byte swizzle": a row of a box is 128 bytes, eight rows make 1024 bytes (and lie at a
// multiple of them), and 16-byte vector v of row r lies where vector v ^ (r % 8) would.
#pragma once
#include <type_traits>

#include "cluster.cuh"

#if !defined(EV_EMULATE)
#include <cuda.h>  // types alone; the driver is asked for its one function at run time
#include <cuda_runtime.h>
#endif

namespace ev {

enum : int { kBoxBytes = 128, kProductConcepts = 176, kProductValues = kProductConcepts / 2 };

// A matrix in shared memory for `multiply`: rows of 128 bytes from `address` on, which is at most 96 bytes past a multiple of 1024.
__host__ __device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
  constexpr uint64_t swizzle_128 = 1, eight_rows = 1024;
  return swizzle_128 << 62 | (eight_rows >> 4) << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

#if !defined(EV_EMULATE)

// A matrix in global memory, of which boxes of `rows` rows and 128 bytes are brought.
using Matrix = CUtensorMap;

inline auto matrix_encoder() {
  using Encoder = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                               const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encoder found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // no error of the caller's
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encoder>(function) : nullptr;
  }();
  return found;
}

inline bool can_encode_matrices() { return matrix_encoder() != nullptr; }

// [rows, columns] of a 16-bit dtype, rows `stride` elements apart. What a box has outside of it becomes zero. `wide`: what comes from
// memory comes into the L2 cache 256 bytes at a time, not 128.
inline bool encode(Matrix& matrix, bool bf16, const void* first, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                   bool wide = true) {
  const CUtensorMapL2promotion promotion = wide ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t bytes[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {kBoxBytes / 2, static_cast<cuuint32_t>(box_rows)}, each[] = {1, 1};
  return matrix_encoder()(&matrix, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(first), size, bytes,
                          box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

__device__ __forceinline__ void copy_box(void* shared, const Matrix& matrix, int column, int row, Barrier* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
               "l"(&matrix), "r"(column), "r"(row), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void prefetch_matrix(const Matrix& matrix) { asm volatile("prefetch.tensormap [%0];" ::"l"(&matrix) : "memory"); }

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The threads of one warpgroup; no other one of the block meets so.
__device__ __forceinline__ void meet_warpgroup() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

// By all warps of a warpgroup: how many registers each of its threads has from here on.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// begin_products; multiply ...; commit_products: a group. Of the groups, at most `PENDING` are not complete after finish_products;
// only after finish_products<0> may anybody touch the products.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void finish_products(float (&c)[kProductValues]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  if constexpr (PENDING == 0) {
#pragma unroll
    for (int i = 0; i < kProductValues; ++i) asm volatile("" : "+f"(c[i])::"memory");  // the compiler reads it no earlier
  }
}

// c = a b^T, or c += a b^T if `adds`: 64 rows of a, 176 of b, 32 bytes of columns. Of c, warp w of the warpgroup has rows 16 w on;
// its lane l has, as c[4 j + 2 half + side], row l / 4 + 8 half, column 8 j + l % 4 * 2 + side.
#define EV_C4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define EV_C8(c, i) EV_C4(c, i), EV_C4(c, i + 4)
#define EV_WGMMA(TYPE)                                                                                                                 \
  asm volatile(                                                                                                                        \
      "{.reg .pred adds; setp.ne.b32 adds, %90, 0;\n"                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n176k16.f32." TYPE "." TYPE                                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26," \
      " %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51,"  \
      " %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76,"  \
      " %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87}, %88, %89, adds, 1, 1, 0, 0;}"                                          \
      : EV_C8(c, 0), EV_C8(c, 8), EV_C8(c, 16), EV_C8(c, 24), EV_C8(c, 32), EV_C8(c, 40), EV_C8(c, 48), EV_C8(c, 56), EV_C8(c, 64),    \
        EV_C8(c, 72), EV_C8(c, 80)                                                                                                     \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))

template <class T>
__device__ __forceinline__ void multiply(float (&c)[kProductValues], uint64_t a, uint64_t b, bool adds) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) EV_WGMMA("bf16");
  else EV_WGMMA("f16");
}
#undef EV_WGMMA
#undef EV_C8
#undef EV_C4

#endif

}  // namespace ev
