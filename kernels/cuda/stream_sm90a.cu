// The op for many tokens on sm_90a, bf16 and fp16, up to 176 concepts.
//
// A tile of 128 tokens is streamed, 128 bytes of columns a step, through a ring of stages in shared memory. Where tiles are fewer than
// multiprocessors, the blocks of a cluster share a tile, a slice of its columns each. A block's warpgroups do different work:
//   bringers   two threads: the copy engine is told to bring boxes of the tokens (and residual), and of the readers
//   streamers  the squares, and x + delta back to global memory for tokens that only add
//   products   two warpgroups, 64 tokens each: tokens times readers (wgmma)
// When the columns are through, the ring's memory takes the projections. If blocks share a tile, each adds up the projections of
// its part of the tokens, in the order of the slices, from the blocks' shared memory. Scores are written; for tokens with a gate or
// rules the row is chosen and the rules solved. Such tokens are then read once more and written, a token at a time by a products warp.
//
// A projection is summed in the same order wherever its token lies: slices in fp32, of sums in fp32, of partial sums over 256
// columns. The partial sums are short because tensor cores truncate what they add.
//
// Who writes what, and what orders it:
//   x in global memory   a streamer writes only what has landed from there, and a token is written in one of the two passes
//   stages               the copy engine; after all warps that read it have arrived at its `freed`
//   projections          by products after the block has met; added up by the token's block after the cluster has met
//   decisions            by the token's block; read by the others after the cluster has met again
#include <cuda_runtime.h>

#include "forms.h"
#include "launch.cuh"
#include "steering.cuh"
#include "stream_pass.cuh"

namespace ev {
namespace {

enum : int {
  kGroupTokens = 64,  // of a products warpgroup
  kWarpTokens = 16,   // of a products warp
  kPartSteps = 4,     // steps whose products are summed by the tensor cores
  // Registers of a thread; the four warpgroups have 512 between them.
  kBringerRegisters = 24,
  kStreamerRegisters = 104,
  kProductRegisters = 192,
};

template <class T>
class Stream : StreamPass {
 public:
  using StreamPass::StreamPass;

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 32) {
      prefetch_matrix(matrices.x);
      prefetch_matrix(matrices.readers);
    }
    if (threadIdx.x == 0) {
      start_ring(rings().tokens, kStreamers + kProducts);
      start_ring(rings().readers, kProducts);
      before_bulk_copies();
      tokens().any_waits = false;
    }
    __syncthreads();
    if (!outputs()) {  // or else streamers sort the tokens while the ring fills
      if (threadIdx.x < kTokens) sort(static_cast<int>(threadIdx.x));
      __syncthreads();
    }
    const int group = static_cast<int>(threadIdx.x / kGroup);
    if (group == 0) {
      give_registers<kBringerRegisters>();
      bring();
    } else if (group == 1) {
      give_registers<kStreamerRegisters>();
      if (outputs()) {
        sort(static_cast<int>(threadIdx.x) - kGroup);
        meet_warpgroup();
      }
      if (projects()) {
        if (a.residual) a.table.delta ? stream_first<true, true>() : stream_first<true, false>();
        else a.table.delta ? stream_first<false, true>() : stream_first<false, false>();
        finish();
      }
    } else {
      take_registers<kProductRegisters>();
      if (projects()) {
        a.residual ? project<true>() : project<false>();
        finish();
      }
      if (again()) steer_again();
    }
    if (cut.ranks == 1 || !projects()) return;
    cluster_arrive_relaxed();  // nobody leaves while others read its memory
    cluster_wait();
  }

 private:
  __device__ __forceinline__ void sort(int t) const {
    if (!sort_token(a, first(), count(), t, tokens())) return;
    tokens().any_waits = true;  // seen by the others when they have met
    const int64_t j = ev_own_row(a, first() + t);
    const int rules = static_cast<int>(a.table.rules);
    prefetch(a.table.gate_threshold + j);
    prefetch_floats(a.table.rule_bounds + j * rules * 3, rules * 3);
    prefetch_floats(a.table.rule_solve + j * rules * rules, rules * rules);
  }

  template <bool RESIDUAL, bool ADDS>
  __device__ __forceinline__ void stream_first() const {
    float square[kRounds] = {};
    stream<T, RESIDUAL, ADDS>(square);
    __syncthreads();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float sum = square[round];
      for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane() % kLanes == 0) squares()[token() + round * kApart] = sum;
    }
  }

  __device__ __forceinline__ void steer_again() const {
    const bool waited = tokens().any_waits;
    const int32_t* rows = waited ? tokens().row : tokens().add;
    const int rules = waited ? static_cast<int>(a.table.rules) : 0;
    if (cut.steps * kColumns > 2 * kSpan<T>) steer<T, 4, 1>(rows, rules);
    else steer<T, 2, 2>(rows, rules);
  }

  // The projections of the tokens of this products warpgroup on this block's columns.
  template <bool RESIDUAL>
  __device__ __forceinline__ void project() const {
    const int group = static_cast<int>(threadIdx.x / kGroup) - 2;
    const uint32_t own = group * kGroupTokens * kBoxBytes;
    float sum[kProductValues] = {};
    Turn turn, reader_turn;
#pragma unroll 1
    for (int left = steps(); left > 0; left -= kPartSteps) {
      float part[kProductValues];
#pragma unroll 1
      for (int step = 0; step < kPartSteps && step < left; ++step) {
        const uint32_t stage = shared_address(shared() + turn.slot * kTokenBytes);
        const uint32_t readers = shared_address(shared() + kReaderRing + reader_turn.slot * kReaderBytes);
        wait(rings().readers.landed + reader_turn.slot, reader_turn.phase);
        wait(rings().tokens.landed + turn.slot, turn.phase);
        __syncwarp();
        begin_products();
#pragma unroll
        for (int source = 0; source < (RESIDUAL ? 2 : 1); ++source) {
          const uint32_t rows = stage + source * cut.token_stages * kTokenBytes + own;
#pragma unroll
          for (int offset = 0; offset < kBoxBytes; offset += 32)
            multiply<T>(part, matrix_at(rows + offset), matrix_at(readers + offset), offset + source + step > 0);
        }
        commit_products();
        finish_products<1>(part);
        if (step > 0) release_before(turn, reader_turn);  // whose products are complete
        turn.next(cut.token_stages);
        reader_turn.next(cut.reader_stages);
      }
      finish_products<0>(part);
      release_before(turn, reader_turn);
#pragma unroll
      for (int i = 0; i < kProductValues; ++i) sum[i] += part[i];
    }
    __syncthreads();
    float* row = projections() + (group * kGroupTokens + threadIdx.x % kGroup / 32 * kWarpTokens + lane() / 4) * kPitch + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kProductValues; i += 2) *reinterpret_cast<float2*>(row + i / 2 % 2 * 8 * kPitch + i / 4 * 8) = {sum[i], sum[i + 1]};
  }

  __device__ __forceinline__ void release_before(const Turn& turn, const Turn& reader_turn) const {
    __syncwarp();
    if (lane() != 0) return;
    arrive(rings().tokens.freed + turn.before(cut.token_stages));
    arrive(rings().readers.freed + reader_turn.before(cut.reader_stages));
  }

  // --- with the projections -------------------------------------------------------------------------------------------

  // By streamers and products.
  __device__ __forceinline__ void finish() const {
    constexpr int threads = kThreads - kGroup;
    const int thread = static_cast<int>(threadIdx.x) - kGroup, begin = own_begin();
    meet();
    if (cut.ranks > 1) {
      add_up(thread, threads);
      __syncthreads();
    }
    const bool waits = tokens().any_waits;
    if (thread < own()) {
      const int t = begin + thread;
      if (a.sqnorm && t < count()) a.sqnorm[first() + t] = sum_of_slices(squares() + t);
      if (waits) decide(t);
    }
    if (a.scores) write_scores(begin + thread / 32, begin + own() < count() ? begin + own() : count());
    if (!waits) return;
    meet();
    if (cut.ranks == 1) return;
    // What the other blocks decided.
    const int rules = static_cast<int>(a.table.rules);
#pragma unroll 1
    for (int t = thread; t < kTokens; t += threads)
      if (t / own() != slice()) tokens().row[t] = load_from(tokens().row + t, t / own());
#pragma unroll 1
    for (int i = thread; i < kTokens * rules; i += threads) {
      const int owner = i / rules / own();
      if (owner == slice()) continue;
      coefficients()[i] = load_from(coefficients() + i, owner);
      concepts()[i] = load_from(concepts() + i, owner);
    }
    __syncthreads();
  }

  // In the order of the slices.
  __device__ __forceinline__ float sum_of_slices(const float* value) const {
    if (cut.ranks == 1) return *value;
    float sum = load_from(value, 0);
#pragma unroll 1
    for (int rank = 1; rank < cut.ranks; ++rank) sum += load_from(value, rank);
    return sum;
  }

  // The projections of this block's tokens. Their rows are read by nobody else.
  __device__ __forceinline__ void add_up(int thread, int threads) const {
    constexpr int fours = kProductConcepts / 4;
#pragma unroll 1
    for (int i = thread; i < own() * fours; i += threads) {
      float* at = projections() + (own_begin() + i / fours) * kPitch + i % fours * 4;
      float4 part[kMostRanks];
#pragma unroll
      for (int rank = 0; rank < kMostRanks; ++rank)
        if (rank < cut.ranks) part[rank] = load_four_from(at, rank);
      float4 sum = part[0];
#pragma unroll
      for (int rank = 1; rank < kMostRanks; ++rank) {
        if (rank >= cut.ranks) break;
        sum.x += part[rank].x, sum.y += part[rank].y, sum.z += part[rank].z, sum.w += part[rank].w;
      }
      *reinterpret_cast<float4*>(at) = sum;
    }
  }

  // Token t's row, and what its rules add.
  __device__ __forceinline__ void decide(int t) const {
    const int rules = static_cast<int>(a.table.rules);
    decide_token(a, first(), t, tokens(), projections() + t * kPitch, coefficients() + t * rules);
    const int32_t j = tokens().row[t];
    for (int m = 0; j >= 0 && m < rules; ++m) concepts()[t * rules + m] = a.table.rule_concept[j * rules + m];
  }

  __device__ __forceinline__ void write_scores(int begin, int end) const {
#pragma unroll 1
    for (int k = lane(); k < a.k; k += 32) {
      const float mean = fixed().mean[k], inv_std = fixed().inv_std[k];
#pragma unroll 4
      for (int t = begin; t < end; t += kStreamers + kProducts)
        write_score(a, first() + t, k, ev_score(projections()[t * kPitch + k], mean, inv_std));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    stream(const __grid_constant__ ev_args a, const __grid_constant__ Matrices matrices, const __grid_constant__ StreamCut cut) {
  Stream<T>(a, matrices, cut).run();
}

int64_t rows_apart(const ev_args& a, int64_t stride) { return a.n > 1 ? stride : a.d; }

template <class T>
cudaError_t apply(const ev_args& a, const StreamCut& cut, cudaStream_t on) {
  constexpr bool bf16 = std::is_same<T, __nv_bfloat16>::value;
  Matrices matrices{};
  const bool wide = !a.table.delta || a.table.rules > 0;  // or else the same lines are written right after
  bool encoded = encode(matrices.x, bf16, a.x, a.n, a.d, rows_apart(a, a.x_stride), kTokens, wide) &&
                 encode(matrices.readers, bf16, a.readers, a.k_padded, a.d, a.d, kProductConcepts);
  if (a.residual) encoded = encoded && encode(matrices.residual, bf16, a.residual, a.n, a.d, rows_apart(a, a.residual_stride), kTokens);
  if (!encoded) return cudaErrorInvalidValue;
  return launch(stream<T>, dim3(static_cast<unsigned>(cut.blocks)), kThreads, cut.bytes, on, cut.ranks, false, a, matrices, cut);
}

// The copy engine takes rows that lie apart, at multiples of 16 bytes, less than 2^40 bytes from each other.
bool can_bring(const ev_args& a, const void* first, int64_t stride) {
  const int64_t apart = rows_apart(a, stride);
  return is_aligned(first, apart * 2) && apart >= a.d && apart * 2 < int64_t{1} << 40;
}

}  // namespace

ev_cuda_plan plan_stream_sm90(const ev_args& a, const Device& device, int log_ranks) {
  const StreamCut cut = stream_cut(a, 1 << log_ranks, device.shared_bytes);
  const bool runs = device.stream_clusters[log_ranks] > 0 && a.dtype != EV_F32 && a.reader_parts == 1 && a.k_padded <= kProductConcepts &&
                    a.d >= kColumns && a.d < 1 << 30 && a.n < 1 << 30 && cut.token_stages > 0 && can_bring(a, a.x, a.x_stride) &&
                    (!a.residual || can_bring(a, a.residual, a.residual_stride)) && is_aligned(a.readers) && is_aligned(a.directions) &&
                    is_aligned(a.table.delta);
  if (!runs) return {EV_NO_KERNEL};
  const bool rules = a.table.delta && a.table.rules > 0, projects = a.scores || a.sqnorm || rules;
  return {EV_CUDA_STREAM_SM90 + log_ranks, kTokens, cut.blocks, 1, 0, projects, rules || !projects};
}

cudaError_t apply_stream_sm90(const ev_args& a, const Device& device, int log_ranks, cudaStream_t stream) {
  const StreamCut cut = stream_cut(a, 1 << log_ranks, device.shared_bytes);
  return a.dtype == EV_BF16 ? apply<__nv_bfloat16>(a, cut, stream) : apply<__half>(a, cut, stream);
}

#if !defined(EV_EMULATE)
int stream_sm90_clusters(const Device& device, int log_ranks) {
  if (log_ranks == 0 || !can_encode_matrices()) return can_encode_matrices() ? device.multiprocessors : 0;
  ev_args a{};
  a.n = a.d = 1;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[2];
  int clusters = 0;
  auto* kernel = stream<__nv_bfloat16>;
  const StreamCut cut = stream_cut(a, 1 << log_ranks, device.shared_bytes);
  const cudaError_t error = prepare(config, attributes, kernel, dim3(cut.ranks), kThreads, cut.bytes, nullptr, cut.ranks);
  if (error == cudaSuccess && cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
  cudaGetLastError();  // what failed here is no error of the caller's
  return 0;
}
#endif

}  // namespace ev
