// Choosing a form and the C ABI.
#include <cuda_runtime.h>

#include <atomic>

#include "forms.h"

namespace {

enum : int { kDevices = 64 };

// Asked once for each device; two threads that ask at once find the same.
cudaError_t describe(ev::Device& device) {
  static std::atomic<ev::Device*> known[kDevices];
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index < kDevices) {
    if (const ev::Device* found = known[index].load()) {
      device = *found;
      return cudaSuccess;
    }
  }
  int major = 0, minor = 0;
  if ((error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index)) != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index)) != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index)) != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index)) != cudaSuccess) return error;
  device.capability = major * 10 + minor;
  for (int log = 0; log < 4; ++log) device.stream_clusters[log] = device.capability == 90 ? ev::stream_sm90_clusters(device, 1 << log) : 0;
  device.cluster = major == 9 || major == 10 ? ev::decode_sm90_cluster(device.shared_bytes) : 0;
  if (index < kDevices) {
    ev::Device* expected = nullptr;
    ev::Device* made = new ev::Device(device);
    if (!known[index].compare_exchange_strong(expected, made)) delete made;
  }
  return cudaSuccess;
}

// Up to about here the decode kernel's small tiles are faster than streaming.
constexpr int64_t kDecodeTokens = 192;

int stream_ranks(int32_t kernel) { return 1 << (kernel - EV_CUDA_STREAM_SM90); }

int32_t fastest(const ev_args& a, const ev::Device& device) {
  if (a.n <= kDecodeTokens && ev::decode_sm90_runs(a, device)) return EV_CUDA_DECODE_SM90;
  if (!ev::stream_sm90_runs(a, device, 1)) return ev::slicing_pays(a, device) ? EV_CUDA_SLICED : EV_CUDA_PORTABLE;
  // As many blocks to a tile as run at once.
  int log = 3;
  while (log > 0 && (a.n + 127) / 128 > device.stream_clusters[log]) --log;
  return EV_CUDA_STREAM_SM90 + log;
}

}  // namespace

extern "C" int64_t ev_cuda_workspace(const ev_args* args, int32_t kernel) {
  ev::Device device{};
  if (kernel == EV_AUTO && args->n > 0 && describe(device) == cudaSuccess) kernel = fastest(*args, device);
  return kernel == EV_CUDA_SLICED ? ev::sliced_workspace(*args) : 0;
}

extern "C" int ev_cuda_apply(const ev_args* args, int32_t kernel, void* stream) {
  if (kernel != EV_AUTO && (kernel < EV_CUDA_PORTABLE || kernel > EV_CUDA_SLICED)) return EV_NO_KERNEL;
  const bool writes = args->table.delta || args->scores || args->sqnorm;
  if (args->n == 0 || !writes) return cudaSuccess;
  ev::Device device{};
  const cudaError_t error = describe(device);
  if (error != cudaSuccess) return error;
  if (kernel == EV_AUTO) kernel = fastest(*args, device);
  auto* const on = static_cast<cudaStream_t>(stream);
  switch (kernel) {
    case EV_CUDA_PORTABLE: return ev::apply_portable(*args, device, on);
    case EV_CUDA_SLICED: return ev::sliced_runs(*args) ? ev::apply_sliced(*args, device, on) : EV_NO_KERNEL;
    case EV_CUDA_DECODE_SM90: return ev::decode_sm90_runs(*args, device) ? ev::apply_decode_sm90(*args, device, on) : EV_NO_KERNEL;
    default: {
      const int ranks = stream_ranks(kernel);
      return ev::stream_sm90_runs(*args, device, ranks) ? ev::apply_stream_sm90(*args, device, ranks, on) : EV_NO_KERNEL;
    }
  }
}

extern "C" const char* ev_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
