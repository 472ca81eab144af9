// The CUDA kernels on the emulator; they are compiled beside this file with EV_EMULATE.
#include <cmath>
#include <vector>

#include "../../kernels/cuda/forms.h"

// `cluster`: blocks of the decode kernel's largest cluster. Returns a cudaError_t, or EV_NO_KERNEL.
extern "C" __attribute__((visibility("default"))) int ev_emulated_apply(const ev_args* args, int kernel, int multiprocessors, int shared_bytes, int cluster) {
  const ev::Device device{multiprocessors, shared_bytes, 90, cluster, {}};
  const int ranks = kernel >= EV_CUDA_STREAM_SM90 ? 1 << (kernel - EV_CUDA_STREAM_SM90) : 0;
  switch (kernel) {
    case EV_CUDA_PORTABLE: return ev::apply_portable(*args, device, nullptr);
    case EV_CUDA_SLICED: {
      if (!ev::sliced_runs(*args)) return EV_NO_KERNEL;
      std::vector<float> workspace(ev::sliced_workspace(*args), NAN);
      ev_args a = *args;
      a.workspace = workspace.data();
      return ev::apply_sliced(a, device, nullptr);
    }
    case EV_CUDA_DECODE_SM90: return ev::decode_sm90_runs(*args, device) ? ev::apply_decode_sm90(*args, device, nullptr) : EV_NO_KERNEL;
    case EV_CUDA_STREAM_SM90:
    case EV_CUDA_STREAM_SM90_BY_2:
    case EV_CUDA_STREAM_SM90_BY_4:
    case EV_CUDA_STREAM_SM90_BY_8:
      return ev::stream_sm90_runs(*args, device, ranks) ? ev::apply_stream_sm90(*args, device, ranks, nullptr) : EV_NO_KERNEL;
  }
  return EV_NO_KERNEL;
}
