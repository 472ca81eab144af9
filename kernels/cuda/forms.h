// The CUDA forms, as apply.cu chooses between them.
#pragma once
#include <cuda_runtime_api.h>

#include "../api.h"

namespace ev {

struct Device {
  int multiprocessors;
  int shared_bytes;  // a block can have
  int capability;    // 90 for sm_90
  int cluster;       // the most blocks a cluster of decode_sm90 can have, 0 where it cannot run
};

cudaError_t apply_portable(const ev_args& a, const Device& device, cudaStream_t stream);

bool decode_sm90_runs(const ev_args& a, const Device& device);
cudaError_t apply_decode_sm90(const ev_args& a, const Device& device, cudaStream_t stream);
int decode_sm90_cluster(int shared_bytes);  // for Device; asks the current device, which must be of sm_90 or sm_100

bool stream_sm90_runs(const ev_args& a, const Device& device);
cudaError_t apply_stream_sm90(const ev_args& a, const Device& device, cudaStream_t stream);

}  // namespace ev
