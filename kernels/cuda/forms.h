// The CUDA forms, as apply.cu chooses between them.
#pragma once
#include <cuda_runtime_api.h>

#include "../api.h"

namespace ev {

using Device = ev_cuda_device;

// Each form has a plan for a call, EV_NO_KERNEL where it cannot run it, and a launch for calls that it can.
ev_cuda_plan plan_portable(const ev_args& a, const Device& device);
cudaError_t apply_portable(const ev_args& a, const Device& device, cudaStream_t stream);

// The portable kernel on slices of the columns.
bool slicing_pays(const ev_args& a, const Device& device);
ev_cuda_plan plan_sliced(const ev_args& a, const Device& device);
cudaError_t apply_sliced(const ev_args& a, const Device& device, cudaStream_t stream);

// With `early` it is launched by programmatic dependent launch.
ev_cuda_plan plan_decode_sm90(const ev_args& a, const Device& device, bool early = false);
cudaError_t apply_decode_sm90(const ev_args& a, const Device& device, bool early, cudaStream_t stream);
int decode_sm90_cluster(int shared_bytes);  // for Device; asks the current device, which must be of sm_90 or sm_100

// 1 << `log_ranks` blocks share a tile of tokens.
ev_cuda_plan plan_stream_sm90(const ev_args& a, const Device& device, int log_ranks);
cudaError_t apply_stream_sm90(const ev_args& a, const Device& device, int log_ranks, cudaStream_t stream);
int stream_sm90_clusters(const Device& device, int log_ranks);  // for Device; asks the current device, which must be of sm_90

}  // namespace ev
