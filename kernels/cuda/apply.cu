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
  for (int log = 0; log < 4; ++log) device.stream_clusters[log] = device.capability == 90 ? ev::stream_sm90_clusters(device, log) : 0;
  device.cluster = major == 9 || major == 10 ? ev::decode_sm90_cluster(device.shared_bytes) : 0;
  if (index < kDevices) {
    ev::Device* expected = nullptr;
    ev::Device* made = new ev::Device(device);
    if (!known[index].compare_exchange_strong(expected, made)) delete made;
  }
  return cudaSuccess;
}

// From about here streaming reads faster than the decode kernel; at 256 tokens that still steers faster.
constexpr int64_t kDecodeTokens = 192;

ev_cuda_plan fastest(const ev_args& a, const ev::Device& device) {
  if (a.n <= kDecodeTokens) {
    const ev_cuda_plan decode = ev::plan_decode_sm90(a, device);
    if (decode.kernel != EV_NO_KERNEL) return decode;
  }
  // As many blocks to a tile as run at once.
  for (int log = 3; log >= 0; --log) {
    const ev_cuda_plan stream = ev::plan_stream_sm90(a, device, log);
    if (stream.kernel != EV_NO_KERNEL && (log == 0 || stream.blocks >> log <= device.stream_clusters[log])) return stream;
  }
  return ev::slicing_pays(a, device) ? ev::plan_sliced(a, device) : ev::plan_portable(a, device);
}

ev_cuda_plan plan_of(const ev_args& a, int32_t kernel, const ev::Device& device) {
  if (kernel != EV_AUTO && (kernel < EV_CUDA_PORTABLE || kernel > EV_CUDA_DECODE_SM90_PDL)) return {EV_NO_KERNEL};
  const bool writes = a.table.delta || a.scores || a.sqnorm;
  if (a.n == 0 || !writes) return {kernel};
  switch (kernel) {
    case EV_AUTO: return fastest(a, device);
    case EV_CUDA_PORTABLE: return ev::plan_portable(a, device);
    case EV_CUDA_SLICED: return ev::plan_sliced(a, device);
    case EV_CUDA_DECODE_SM90: return ev::plan_decode_sm90(a, device);
    case EV_CUDA_DECODE_SM90_PDL: return ev::plan_decode_sm90(a, device, true);
    default: return ev::plan_stream_sm90(a, device, kernel - EV_CUDA_STREAM_SM90);
  }
}

}  // namespace

extern "C" ev_cuda_plan ev_plan_cuda(const ev_args* args, int32_t kernel, const ev_cuda_device* device) { return plan_of(*args, kernel, *device); }

extern "C" int ev_cuda_describe(ev_cuda_device* device) { return describe(*device); }

extern "C" int ev_cuda_apply(const ev_args* args, const ev_cuda_device* device, const ev_cuda_plan* plan, void* stream) {
  if (plan->launches == 0) return cudaSuccess;
  auto* const on = static_cast<cudaStream_t>(stream);
  switch (plan->kernel) {
    case EV_CUDA_PORTABLE: return ev::apply_portable(*args, *device, on);
    case EV_CUDA_SLICED: return ev::apply_sliced(*args, *device, on);
    case EV_CUDA_DECODE_SM90: return ev::apply_decode_sm90(*args, *device, false, on);
    case EV_CUDA_DECODE_SM90_PDL: return ev::apply_decode_sm90(*args, *device, true, on);
    default: return ev::apply_stream_sm90(*args, *device, plan->kernel - EV_CUDA_STREAM_SM90, on);
  }
}

extern "C" const char* ev_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
