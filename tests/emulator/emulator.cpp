// The portable CUDA kernel, on the emulator.
#define EV_EMULATE 1
#include "../../kernels/cuda/portable.cu"

extern "C" __attribute__((visibility("default"))) int ev_emulated_apply(const ev_args* args, int multiprocessors, int shared_bytes) {
  return ev::apply_portable(*args, ev::Device{multiprocessors, shared_bytes, 80}, nullptr);
}
