// The CUDA kernels on the emulator; they are compiled beside this file with EV_EMULATE.
#include <cmath>
#include <vector>

#include "../../kernels/cuda/hardware.cuh"
#include "../../kernels/cuda/forms.h"

// `cluster`: blocks of the decode kernel's largest cluster. `eager`: see emulate.h. Returns a cudaError_t, or EV_NO_KERNEL.
extern "C" __attribute__((visibility("default"))) int ev_emulated_apply(const ev_args* args, int kernel, int multiprocessors, int shared_bytes, int cluster,
                                                                        int eager) {
  ev::Cluster::eager = eager;
  const ev::Device device{multiprocessors, shared_bytes, 90, cluster, {1, 1, 1, 1}};
  const int log_ranks = kernel - EV_CUDA_STREAM_SM90;
  switch (kernel) {
    case EV_CUDA_PORTABLE: return ev::apply_portable(*args, device, nullptr);
    case EV_CUDA_SLICED: {
      const ev_cuda_plan plan = ev::plan_sliced(*args, device);
      if (plan.kernel == EV_NO_KERNEL) return EV_NO_KERNEL;
      std::vector<float> workspace(plan.workspace, NAN);
      ev_args a = *args;
      a.workspace = workspace.data();
      return ev::apply_sliced(a, device, nullptr);
    }
    case EV_CUDA_DECODE_SM90: return ev::plan_decode_sm90(*args, device).kernel == kernel ? ev::apply_decode_sm90(*args, device, false, nullptr) : EV_NO_KERNEL;
    case EV_CUDA_STREAM_SM90:
    case EV_CUDA_STREAM_SM90_BY_2:
    case EV_CUDA_STREAM_SM90_BY_4:
    case EV_CUDA_STREAM_SM90_BY_8:
      return ev::plan_stream_sm90(*args, device, log_ranks).kernel == kernel ? ev::apply_stream_sm90(*args, device, log_ranks, nullptr) : EV_NO_KERNEL;
  }
  return EV_NO_KERNEL;
}
