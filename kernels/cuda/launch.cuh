// Launching, and what is asked of a device once.
#pragma once
#include <cuda_runtime.h>

namespace ev {

#if defined(EV_EMULATE)
#define EV_DYNAMIC_SHARED(name, alignment) char* name = ev::emulated_shared()
#else
#define EV_DYNAMIC_SHARED(name, alignment) extern __shared__ __align__(alignment) char name[]

// A launch of clusters of `cluster` blocks with `bytes` of dynamic shared memory. More than 48 KB and clusters of more than
// 8 have to be asked for, which costs less than remembering for which of the devices it was. `early`: by programmatic
// dependent launch.
template <class Kernel>
cudaError_t prepare(cudaLaunchConfig_t& config, cudaLaunchAttribute (&attributes)[2], Kernel* kernel, dim3 blocks, int threads, int bytes, cudaStream_t stream,
                    int cluster, bool early = false) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && cluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return error;
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, cudaStream_t stream, int cluster, bool early,
                   const Parameters&... arguments) {
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[2];
  const cudaError_t error = prepare(config, attributes, kernel, blocks, threads, bytes, stream, cluster, early);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, arguments...) : error;
}
#endif

}  // namespace ev
