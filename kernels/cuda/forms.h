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
  int stream_clusters[4];  // clusters of 1, 2, 4 and 8 blocks of stream_sm90 that can run at once
};

cudaError_t apply_portable(const ev_args& a, const Device& device, cudaStream_t stream);

// The portable kernel on slices of the columns; `a.workspace` has sliced_workspace(a) floats.
bool sliced_runs(const ev_args& a);
bool slicing_pays(const ev_args& a, const Device& device);
int64_t sliced_workspace(const ev_args& a);
cudaError_t apply_sliced(const ev_args& a, const Device& device, cudaStream_t stream);

bool decode_sm90_runs(const ev_args& a, const Device& device);
cudaError_t apply_decode_sm90(const ev_args& a, const Device& device, cudaStream_t stream);
int decode_sm90_cluster(int shared_bytes);  // for Device; asks the current device, which must be of sm_90 or sm_100

// `ranks`: how many blocks share a tile of tokens.
bool stream_sm90_runs(const ev_args& a, const Device& device, int ranks);
cudaError_t apply_stream_sm90(const ev_args& a, const Device& device, int ranks, cudaStream_t stream);
int stream_sm90_clusters(const Device& device, int ranks);  // for Device; asks the current device, which must be of sm_90

}  // namespace ev
