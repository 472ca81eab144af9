// The kernels' C ABI: raw pointers and sizes, no torch and no CUDA types. csrc/ops.cpp has checked everything before a call.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#error "emovec's kernels are built for Linux and macOS"
#endif

enum ev_dtype : int32_t { EV_F32 = 0, EV_BF16 = 1, EV_F16 = 2 };

// R rows that tokens point at; see emovec/ops.py `Table`. `delta` null: nothing is steered.
struct ev_table {
  const float* delta;           // [R, d]
  const int32_t* gate;          // [R, 2]: concept (-1: always open), row to use while closed (-1: none)
  const float* gate_threshold;  // [R], score units
  const int32_t* rule_concept;  // [R, M], -1: no rule
  const float* rule_bounds;     // [R, 3, M]: lo, hi, <delta, reader>; projections
  const float* rule_solve;      // [R, M, M]: inverse of G_S = R_S V_S^T, zero where unused
  int64_t rows, rules;          // R, M
};

// One call of the op on N tokens of width d against K concepts.
struct ev_args {
  int64_t n, d, k, k_padded;
  ev_dtype dtype;         // of x, residual and directions
  ev_dtype reader_dtype;  // of the packed readers
  int32_t reader_parts;   // 1; on a GPU also 2, [2, KP, d]: the readers rounded, and what that took from them, rounded
  ev_dtype scores_dtype;  // EV_F32 or EV_BF16
  void* x;                // [N, d], rows x_stride elements apart
  int64_t x_stride;
  const void* residual;  // [N, d] or null
  int64_t residual_stride;
  const void* readers;     // packed, see emovec/ops.py `pack`
  const void* directions;  // [K, d]
  const float* mean;       // [K]
  const float* inv_std;    // [K]
  const int32_t* row;      // [N] into the table, -1: leave alone; null: row 0 for every token
  ev_table table;
  void* scores;  // [N, K], rows scores_stride elements apart, or null
  int64_t scores_stride;
  float* sqnorm;  // [N] or null
  float* workspace;  // as many floats as the plan says; not initialised
};

// The kernels by number, as `apply_(form=)` takes them; 0 takes a CPU's fastest, a GPU's as planned.
enum ev_kernel : int32_t {
  EV_AUTO = 0,
  EV_CPU_SCALAR = 1,
  EV_CPU_AVX2 = 2,
  EV_CPU_AVX512 = 3,
  EV_CPU_AVX512_BF16 = 4,
  EV_CPU_AMX = 5,
  EV_CUDA_PORTABLE = 16,
  EV_CUDA_DECODE_SM90 = 17,
  EV_CUDA_STREAM_SM90 = 18,
  EV_CUDA_STREAM_SM90_BY_2 = 19,  // blocks share a tile of tokens
  EV_CUDA_STREAM_SM90_BY_4 = 20,
  EV_CUDA_STREAM_SM90_BY_8 = 21,
  EV_CUDA_SLICED = 22,
  EV_CUDA_DECODE_SM90_PDL = 23,  // started before the kernel in front of it is through; only when asked for
};
enum : int32_t { EV_NO_KERNEL = -1 };

// What the choice of a CUDA kernel depends on besides the call.
struct ev_cuda_device {
  int32_t multiprocessors;
  int32_t shared_bytes;        // a block can have
  int32_t capability;          // 90 for sm_90
  int32_t cluster;             // the most blocks a cluster of decode_sm90 can have, 0 where it cannot run
  int32_t stream_clusters[4];  // clusters of 1, 2, 4 and 8 blocks of stream_sm90 that can run at once; zeros where it cannot run
};

// How a GPU does a call. All but the kernel is 0 where there is nothing to do.
struct ev_cuda_plan {
  int32_t kernel;     // EV_NO_KERNEL: the one asked for, or any at all, cannot run the call on this device
  int64_t tile;       // tokens that a block, or blocks that share their columns, take at a time
  int64_t blocks;     // of the first launch
  int64_t launches;
  int64_t workspace;  // floats
  int64_t passes;     // times that x and residual are read to project
  int64_t again;      // times that x alone is read after that, to steer, taking it that rows with rules in the table have some
};

extern "C" {

// A half-open range of tokens or of padded concepts.
struct ev_range {
  int64_t begin, end;
};

// The two halves of the op on a CPU. `project` fills raw projections p[token - tokens.begin][concept] for the padded
// concepts of `concepts` (a multiple of 16 each way) and, if `sq` is not null, squared norms. `finish` takes the
// complete projections and norms of a tile, writes scores and norms out, and steers. `adds`, if not null, has for every
// token the delta [d] that `project` adds to it, after which `finish` leaves it alone, or null.
typedef void (*ev_cpu_project)(const ev_args*, ev_range tokens, ev_range concepts, float* p, int64_t p_stride, float* sq, const float* const* adds);
typedef void (*ev_cpu_finish)(const ev_args*, ev_range tokens, const float* p, int64_t p_stride, const float* sq, const float* const* adds);
struct ev_cpu_form {
  ev_cpu_project project;
  ev_cpu_finish finish;
  int64_t tile;  // tokens it likes to take at a time
};

// The form for `kernel`, or null where this processor (or this build) cannot run it.
const ev_cpu_form* ev_cpu_form_for(int32_t kernel);

// The number of the fastest form that this processor can run.
int32_t ev_cpu_fastest(void);

// A pure function, which asks no GPU: of pointers it looks at their alignment and at which are null.
ev_cuda_plan ev_plan_cuda(const ev_args* args, int32_t kernel, const ev_cuda_device* device);

// The current device. Returns a cudaError_t, which `ev_cuda_error_string` words.
int ev_cuda_describe(ev_cuda_device* device);

// Enqueue a planned call on `stream` (a cudaStream_t) of the current device, which is the one that was planned for. Returns a
// cudaError_t.
int ev_cuda_apply(const ev_args* args, const ev_cuda_device* device, const ev_cuda_plan* plan, void* stream);
const char* ev_cuda_error_string(int error);

}  // extern "C"
