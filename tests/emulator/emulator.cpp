// The CUDA kernels on the emulator; they are compiled beside this file with EV_EMULATE.
#include "../../kernels/cuda/forms.h"

// `cluster`: blocks of the decode kernel's largest cluster; 0 runs the portable kernel. Returns a cudaError_t, or EV_NO_KERNEL.
extern "C" __attribute__((visibility("default"))) int ev_emulated_apply(const ev_args* args, int multiprocessors, int shared_bytes, int cluster) {
  const ev::Device device{multiprocessors, shared_bytes, cluster ? 90 : 80, cluster};
  if (!cluster) return ev::apply_portable(*args, device, nullptr);
  if (!ev::decode_sm90_runs(*args, device)) return EV_NO_KERNEL;
  return ev::apply_decode_sm90(*args, device, nullptr);
}
