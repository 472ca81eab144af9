// Launching, and what is asked of a device once.
#pragma once
#include <cuda_runtime.h>

namespace ev {

#if defined(EV_EMULATE)
#define EV_DYNAMIC_SHARED(name) char* name = ev::emulated_shared()
#else
#define EV_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

// `bytes` of dynamic shared memory; more than 48 KB have to be asked for, which costs less than remembering for which
// of the devices it was.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, cudaStream_t stream, const Parameters&... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#endif

}  // namespace ev
