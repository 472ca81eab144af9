// The CUDA forms, as apply.cu chooses between them.
#pragma once
#include <cuda_runtime_api.h>

#include "../api.h"

namespace ev {

struct Device {
  int multiprocessors;
  int shared_bytes;  // a block can have
  int capability;    // 90 for sm_90
};

cudaError_t apply_portable(const ev_args& a, const Device& device, cudaStream_t stream);

}  // namespace ev
