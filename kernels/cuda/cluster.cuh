// What sm_90 adds, each in one line of PTX: bulk copies that land on a barrier, and clusters of blocks that read each other's
// shared memory. With EV_EMULATE a C++ compiler gets the same functions from emulate.h.
#pragma once
#include "hardware.cuh"

namespace ev {

// Counts one arrival and the bytes that are announced with it; then its phase, 0, 1, 0, ... is over.
using Barrier = uint64_t;

#if !defined(EV_EMULATE)

// A barrier whose phase is over when `arrivals` threads have arrived.
__device__ __forceinline__ void start(Barrier* barrier, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Between this thread's reads, writes and `start`s, and the bulk copies of threads that it meets afterwards.
__device__ __forceinline__ void before_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void announce(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(Barrier* barrier, int phase) {
  uint32_t over;
  do {
    asm volatile("{.reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over;}"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(phase)
                 : "memory");
  } while (!over);
}

// `bytes` from global to shared memory; both addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Every thread of the cluster arrives, and those that wait see what the others did before. A release waits until all that the
// thread has written is seen by the whole GPU; where nothing was written for the others, `relaxed` does not.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// What lies at this place of shared memory in block `rank` of the cluster: 4 bytes.
template <class V>
__device__ __forceinline__ V load_from(const V* shared, int rank) {
  static_assert(sizeof(V) == 4, "a register");
  uint32_t at, bits;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(bits) : "r"(at));
  V value;
  memcpy(&value, &bits, 4);
  return value;
}
// Four floats at once; `shared` is a multiple of 16.
__device__ __forceinline__ float4 load_four_from(const float* shared, int rank) {
  uint32_t at;
  float4 v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
  return v;
}

// Programmatic dependent launch, both nothing in an ordinary one: the stream's next kernel may start if it was launched so; and
// the kernels before this one are through, and what they wrote is seen by this thread.
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void after_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#endif

__device__ __forceinline__ void prefetch_floats(const float* global, int count) {
#pragma unroll 1
  for (int i = 0; i < count; i += 32) prefetch(global + i);
}

}  // namespace ev
