// The op for many tokens on sm_90a, bf16 and fp16, up to 176 concepts.
//
// A block owns 128 tokens and streams their columns, 128 bytes at a time, through a ring of stages in shared memory. Its
// warpgroups do different work, and meet at two barriers a stage, `landed` and `freed`:
//   bringers   one thread: boxes of the tokens, of the residual and of the readers, by the copy engine
//   streamers  the squares, and x + delta back to global memory for tokens that only add
//   products   two warpgroups, 64 tokens each: tokens times readers (wgmma)
// When the columns are through, the ring's memory takes the projections. A products warp has all of those of its 16 tokens, so from
// there on it works alone: writes their scores, and for tokens with a gate or rules chooses the row, solves the rules, reads x once
// more and writes it.
//
// A projection is summed in the same order wherever its token lies: over the columns in fp32, of partial sums over the 128 bytes
// of a stage. The partial sums are short because tensor cores truncate what they add.
//
// Who writes what, and what orders it:
//   x in global memory   a streamer writes only what has landed from there; a products warp only tokens that streamers leave alone
//   stages               the copy engine; after all twelve warps that read a stage have arrived at its `freed`
//   projections          a products warp its own tokens', after every stage has been freed for the last time
#include <cuda_runtime.h>

#include "forms.h"
#include "launch.cuh"
#include "steering.cuh"
#include "warpgroup.cuh"

namespace ev {
namespace {

enum : int {
  kGroup = 128,  // threads of a warpgroup
  kTokens = 128,
  kGroupTokens = 64,  // of a products warpgroup
  kWarpTokens = 16,   // of a products warp
  kThreads = 4 * kGroup,
  kReaders = 3 * kGroup / 32,  // warps that read a stage
  kColumns = kBoxBytes / 2,
  kTokenBytes = kTokens * kBoxBytes,
  kReaderBytes = kProductConcepts * kBoxBytes,
  kMaxStages = 5,
  kPitch = kProductConcepts + 4,                    // of the projections, in floats
  kCoefficients = kTokens * kPitch * 4,             // byte offset; the projections are at 0
  kAfter = kCoefficients + kTokens * EV_MAX_RULES * 4,
  kAlignment = 1024,  // of a box
  kLanes = 8,         // that share a token's 128 bytes
  kBatch = 4,         // vectors that a streamer has in flight
  kRounds = kTokens * kLanes / kGroup,
  kVectors = 8,       // of 16 bytes, that a thread steers at a time
  // Registers of a thread; the warpgroups have 512 between them.
  kBringerRegisters = 24,
  kStreamerRegisters = 88,
  kProductRegisters = 200,
};

struct Matrices {
  Matrix x, residual, readers;
};

struct Ring {
  int stages, bytes;  // bytes of a stage: tokens, readers, residual
};

template <class T>
class Stream {
 public:
  __device__ __forceinline__ Stream(const ev_args& a, const Matrices& matrices, const Ring& ring, char* shared, Barrier* landed, Barrier* freed,
                                    Tokens<kTokens>& tokens, int64_t first)
      : a(a),
        matrices(matrices),
        ring(ring),
        shared(shared),
        landed(landed),
        freed(freed),
        tokens(tokens),
        first(first),
        steps(static_cast<int>((a.d + kColumns - 1) / kColumns)) {}

  __device__ __forceinline__ void bring() const {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int slot = step % ring.stages, use = step / ring.stages;
      if (use > 0) wait(freed + slot, (use - 1) & 1);
      char* stage = shared + slot * ring.bytes;
      announce(landed + slot, ring.bytes);
      copy_box(stage, matrices.x, step * kColumns, static_cast<int>(first), landed + slot);
      copy_box(stage + kTokenBytes, matrices.readers, step * kColumns, 0, landed + slot);
      if (a.residual) copy_box(stage + kTokenBytes + kReaderBytes, matrices.residual, step * kColumns, static_cast<int>(first), landed + slot);
    }
  }

  // Eight lanes a token, so that a warp reads and writes whole lines.
  __device__ __forceinline__ void stream() const {
    float square[kRounds] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int slot = step % ring.stages;
      wait(landed + slot, step / ring.stages & 1);
      const char* stage = shared + slot * ring.bytes;
      const int64_t at = static_cast<int64_t>(step) * kColumns + lane() % kLanes * V::kSize;
      add_squares(square, stage);
      if (a.table.delta && at < a.d) {
#pragma unroll 1
        for (int round = 0; round < kRounds; round += kBatch) add(round, stage, at);
      }
      release(slot);
    }
    if (!a.sqnorm) return;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float sum = square[round];
      for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      const int t = token_of(round);
      if (lane() % kLanes == 0 && t < count()) a.sqnorm[first + t] = sum;
    }
  }

  // The projections of the tokens of products warpgroup `group`, and what follows from them.
  __device__ __forceinline__ void project(int group) const {
    float sum[kProductValues] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int slot = step % ring.stages;
      const uint32_t stage = shared_address(shared + slot * ring.bytes), readers = stage + kTokenBytes, residual = readers + kReaderBytes;
      const uint32_t own = group * kGroupTokens * kBoxBytes;
      wait(landed + slot, step / ring.stages & 1);
      __syncwarp();
#pragma unroll 1
      for (int source = 0; source < (a.residual ? 2 : 1); ++source) {
        const uint32_t rows = (source == 0 ? stage : residual) + own;
        float part[kProductValues];
        begin_products();
#pragma unroll
        for (int offset = 0; offset < kBoxBytes; offset += 32) multiply<T>(part, matrix_at(rows + offset), matrix_at(readers + offset), offset > 0);
        finish_products(part);
#pragma unroll
        for (int i = 0; i < kProductValues; ++i) sum[i] += part[i];
      }
      release(slot);
    }
#pragma unroll 1
    for (int step = steps > ring.stages ? steps - ring.stages : 0; step < steps; ++step) wait(freed + step % ring.stages, step / ring.stages & 1);

    const int own = group * kGroupTokens + warp() * kWarpTokens;
    float* projections = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kProductValues; ++i) projections[(own + lane() / 4 + i / 2 % 2 * 8) * kPitch + i / 4 * 8 + lane() % 4 * 2 + i % 2] = sum[i];
    __syncwarp();
    if (a.scores) write_scores(own, projections);
    steer(own, projections, reinterpret_cast<float*>(shared + kCoefficients));
  }

 private:
  using V = Vector<T>;

  // Not kept, because registers are scarce.
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x % kGroup / 32); }
  __device__ __forceinline__ int count() const { return a.n - first < kTokens ? static_cast<int>(a.n - first) : static_cast<int>(kTokens); }

  __device__ __forceinline__ void release(int slot) const {
    __syncwarp();
    if (lane() == 0) arrive(freed + slot);
  }

  __device__ __forceinline__ int token_of(int round) const { return (warp() * kRounds + round) * (32 / kLanes) + lane() / kLanes; }

  // Where the lane's vector of token t lies in a stage.
  __device__ __forceinline__ int place(int t) const { return t * kBoxBytes + ((lane() % kLanes ^ (t & 7)) << 4); }

  __device__ __forceinline__ void add_squares(float (&square)[kRounds], const char* stage) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const char* at = stage + place(token_of(round));
      const V x = *reinterpret_cast<const V*>(at);
      V other{};
      if (a.residual) other = *reinterpret_cast<const V*>(at + kTokenBytes + kReaderBytes);
#pragma unroll
      for (int e = 0; e < V::kSize; ++e) {
        const float h = to_float(x.value[e]) + to_float(other.value[e]);
        square[round] += h * h;
      }
    }
  }

  // x + delta for the tokens of a few rounds that only add.
  __device__ __forceinline__ void add(int round, const char* stage, int64_t at) const {
    Vector<float> delta[kBatch][2];
    int32_t row[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      row[i] = tokens.add[token_of(round + i)];
      if (row[i] < 0) continue;
      const float* from = a.table.delta + row[i] * a.d + at;
#pragma unroll
      for (int half = 0; half < 2; ++half) delta[i][half] = Vector<float>::load(from + half * 4, true);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row[i] < 0) continue;
      const int t = token_of(round + i);
      V x = *reinterpret_cast<const V*>(stage + place(t));
#pragma unroll
      for (int e = 0; e < V::kSize; ++e) x.value[e] = rounded<T>(to_float(x.value[e]) + delta[i][e / 4].value[e % 4]);
      x.store(static_cast<T*>(a.x) + (first + t) * a.x_stride + at, true);
    }
  }

  __device__ __forceinline__ void write_scores(int own, const float* projections) const {
#pragma unroll
    for (int k = lane(); k < kProductConcepts; k += 32) {
      if (k >= a.k) break;
      const float mean = a.mean[k], inv_std = a.inv_std[k];
#pragma unroll 4
      for (int t = own; t < own + kWarpTokens && t < count(); ++t) a.scores[(first + t) * a.scores_stride + k] = ev_score(projections[t * kPitch + k], mean, inv_std);
    }
  }

  __device__ __forceinline__ void steer(int own, const float* projections, float* coefficients) const {
    if (lane() < kWarpTokens) decide_token(a, first, own + lane(), tokens, projections, kPitch, coefficients);
    __syncwarp();
#pragma unroll 1
    for (int t = own; t < own + kWarpTokens; ++t) {
      if (t + 1 < own + kWarpTokens && tokens.row[t + 1] >= 0) prefetch_token(t + 1);
      const int32_t j = tokens.row[t];
      if (j < 0) continue;
#pragma unroll 1
      for (int64_t begin = 0; begin < a.d; begin += kSpan<T, kVectors>)
        steer_span<T, kVectors, true>(a, first + t, j, coefficients + t * EV_MAX_RULES, begin, a.d);
    }
  }

  __device__ __forceinline__ void prefetch_token(int t) const {
    const T* x = static_cast<const T*>(a.x) + (first + t) * a.x_stride;
#pragma unroll 1
    for (int64_t i = lane() * kColumns; i < a.d; i += 32 * kColumns) prefetch(x + i);
  }

  const ev_args& a;
  const Matrices& matrices;
  const Ring& ring;
  char* const shared;
  Barrier *const landed, *const freed;
  Tokens<kTokens>& tokens;
  const int64_t first;
  const int steps;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    stream(const __grid_constant__ ev_args a, const __grid_constant__ Matrices matrices, const __grid_constant__ Ring ring) {
  EV_DYNAMIC_SHARED(dynamic);
  __shared__ Tokens<kTokens> tokens;
  __shared__ Barrier landed[kMaxStages], freed[kMaxStages];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int count = a.n - first < kTokens ? static_cast<int>(a.n - first) : static_cast<int>(kTokens);
  char* shared = dynamic + (kAlignment - reinterpret_cast<uintptr_t>(dynamic) % kAlignment) % kAlignment;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < ring.stages; ++slot) {
      start(landed + slot, 1);
      start(freed + slot, kReaders);
    }
    before_bulk_copies();
  }
  const bool waits = sort_tokens(a, first, count, tokens);  // all threads meet here
  if (!waits && !a.scores && !a.sqnorm) {
    if (a.table.delta) steer_tokens<T, kTokens>(a, first, tokens.add, nullptr);
    return;
  }
  const Stream<T> work(a, matrices, ring, shared, landed, freed, tokens, first);
  const int group = threadIdx.x / kGroup;
  if (group == 0) {
    give_registers<kBringerRegisters>();
    if (threadIdx.x == 0) work.bring();
  } else if (group == 1) {
    give_registers<kStreamerRegisters>();
    work.stream();
  } else {
    take_registers<kProductRegisters>();
    work.project(group - 2);
  }
}

Ring ring_for(const ev_args& a) {
  Ring ring{};
  ring.bytes = kTokenBytes * (a.residual ? 2 : 1) + kReaderBytes;
  ring.stages = a.residual ? kMaxStages - 1 : kMaxStages;
  return ring;
}

int dynamic_bytes(const Ring& ring) { return ring.stages * ring.bytes + kAlignment; }
static_assert((kMaxStages - 1) * (kTokenBytes + kReaderBytes) >= kAfter, "the projections take the ring's place");

int64_t rows_apart(const ev_args& a, int64_t stride) { return a.n > 1 ? stride : a.d; }

template <class T>
cudaError_t apply(const ev_args& a, cudaStream_t on) {
  constexpr bool bf16 = std::is_same<T, __nv_bfloat16>::value;
  Matrices matrices{};
  bool encoded = encode(matrices.x, bf16, a.x, a.n, a.d, rows_apart(a, a.x_stride), kTokens) &&
                 encode(matrices.readers, bf16, a.readers, a.k_padded, a.d, a.d, kProductConcepts);
  if (a.residual) encoded = encoded && encode(matrices.residual, bf16, a.residual, a.n, a.d, rows_apart(a, a.residual_stride), kTokens);
  if (!encoded) return cudaErrorInvalidValue;
  const Ring ring = ring_for(a);
  const int64_t blocks = (a.n + kTokens - 1) / kTokens;
  return launch(stream<T>, dim3(static_cast<unsigned>(blocks)), kThreads, dynamic_bytes(ring), on, 1, a, matrices, ring);
}

// The copy engine takes rows that lie apart, at multiples of 16 bytes, less than 2^40 bytes from each other.
bool can_bring(const ev_args& a, const void* first, int64_t stride) {
  const int64_t apart = rows_apart(a, stride);
  return is_aligned(first, apart * 2) && apart >= a.d && apart * 2 < int64_t{1} << 40;
}

}  // namespace

bool stream_sm90_runs(const ev_args& a, const Device& device) {
  const int fixed = static_cast<int>(sizeof(Tokens<kTokens>)) + 2 * kMaxStages * static_cast<int>(sizeof(Barrier));
  return device.capability == 90 && a.dtype != EV_F32 && a.reader_dtype == a.dtype && a.k_padded <= kProductConcepts && a.d >= kColumns &&
         a.d < 1 << 30 && a.n < 1 << 30 && dynamic_bytes(ring_for(a)) + fixed <= device.shared_bytes && can_bring(a, a.x, a.x_stride) &&
         (!a.residual || can_bring(a, a.residual, a.residual_stride)) && is_aligned(a.readers) && is_aligned(a.directions) &&
         is_aligned(a.table.delta) && can_encode_matrices();
}

cudaError_t apply_stream_sm90(const ev_args& a, const Device&, cudaStream_t stream) {
  return a.dtype == EV_BF16 ? apply<__nv_bfloat16>(a, stream) : apply<__half>(a, stream);
}

}  // namespace ev
