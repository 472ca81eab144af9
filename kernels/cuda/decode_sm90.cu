// The op for a few tokens on sm_90 and sm_100: one launch, spread over a cluster of blocks.
//
// A cluster owns 16 tokens, and each of its blocks a slice of their columns. Two kinds of warps work side by side:
//   reader warps, 16 concepts each, bring the readers' slice into shared memory by bulk copies and multiply it with the
//   tokens (mma.sync, the readers as the m16 operand), so a block has its part of every projection;
//   token warps, two tokens each, look up the rows, prefetch what steering will need, take squares, and write the tokens
//   that only add.
// Then the cluster meets. A projection is the sum of the blocks' parts in the order of their ranks, read from their shared
// memory by whoever needs it: reader warps for scores, token warps for gates and rules. Every block finds the same bits, so
// all agree on what to do, and each writes its own slice.
//
// Who writes what, and what orders it:
//   x in global memory   a block's token warps write only the block's slice of the cluster's tokens, and only after
//                        the bulk copies of that slice have landed (tokens_landed); nobody else touches it
//   readers, tokens      bulk copies; seen after their barrier. A slot is filled again after its warp has read it
//   partial              each value by one thread of its own block; read by the cluster after the first meeting; nobody
//                        leaves before the second, to which a thread comes when it has used what it read
//   wanted, coefficients by a token's half-warp, for that warp
#include <cuda_runtime.h>

#include "cluster.cuh"
#include "decode_layout.h"
#include "forms.h"
#include "launch.cuh"
#include "steering.cuh"

namespace ev {
namespace {

enum : int {
  kTokenWarps = kTokens / 2,
  kThreads = (kReaderWarps + kTokenWarps) * 32,
  kChains = 4,   // independent sums of products, so that they overlap; short, because tensor cores truncate what they add
  kVectors = 2,  // of 16 bytes, that a thread steers at a time
};

// A token's projections, as `p[concept]`.
struct Projections {
  const float* partial;
  int ranks;
  __device__ __forceinline__ float operator[](int64_t concept) const {
    float part[kLargestCluster];
#pragma unroll
    for (int rank = 0; rank < kLargestCluster; ++rank) part[rank] = rank < ranks ? load_from(partial + concept, rank) : 0.f;
    float sum = part[0];
#pragma unroll
    for (int rank = 1; rank < kLargestCluster; ++rank) sum += part[rank];
    return sum;
  }
};

template <class T>
class Decode {
 public:
  __device__ __forceinline__ Decode(const ev_args& a, const DecodeLayout& layout, char* shared)
      : a(a),
        layout(layout),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        reader_warps(static_cast<int>(a.k_padded) / kReaderRows),
        rank(cluster_rank()),
        first(static_cast<int64_t>(blockIdx.x / layout.ranks) * kTokens),
        count(a.n - first < kTokens ? static_cast<int>(a.n - first) : static_cast<int>(kTokens)),
        column(static_cast<int64_t>(rank) * layout.slice),
        tokens_landed(reinterpret_cast<Barrier*>(shared)),
        chunk_landed(tokens_landed + 1 + warp * layout.slots),
        ring(shared + layout.ring + warp * layout.slots * kReaderRows * layout.row_bytes),
        tokens(shared + layout.tokens),
        residual(a.residual ? shared + layout.residual : nullptr),
        partial(reinterpret_cast<float*>(shared + layout.partial)),
        wanted(reinterpret_cast<float*>(shared + layout.wanted)),
        coefficients(reinterpret_cast<float*>(shared + layout.coefficients)) {}

  __device__ __forceinline__ void run() {
    if (layout.early) start_next_kernel();
    if (warp < reader_warps) {
      start_ring();  // readers never change, so they are fetched while earlier kernels run
      after_earlier_kernels();
      __syncthreads();
      const float2 scale = scale_of(first_unit());
      wait(tokens_landed, 0);
      project();
      cluster_arrive();
      cluster_wait();
      write_outputs(scale);
      cluster_arrive_relaxed();
    } else {
      after_earlier_kernels();
      if (warp == reader_warps) bring_tokens();
      __syncthreads();
      const Steering own = look_up();
      wait(tokens_landed, 0);
      squares();
      cluster_arrive();
      steer(own.waits ? -1 : own.row, nullptr);
      cluster_wait();
      const int32_t row = decide(own);
      cluster_arrive_relaxed();
      steer(row, coefficients);
    }
    cluster_wait();
  }

 private:
  // --- reader warps -------------------------------------------------------------------------------------------------

  __device__ __forceinline__ int chunk_columns(int chunk) const {
    const int left = layout.slice - chunk * layout.chunk;
    return left < layout.chunk ? left : layout.chunk;
  }

  __device__ __forceinline__ void bring_chunk(int chunk) {
    Barrier* landed = chunk_landed + chunk % layout.slots;
    const int bytes = chunk_columns(chunk) * kSize;
    if (lane == 0) announce(landed, kReaderRows * bytes);
    __syncwarp();
    if (lane >= kReaderRows) return;
    const T* row = static_cast<const T*>(a.readers) + (warp * kReaderRows + lane) * a.d + column + chunk * layout.chunk;
    copy_bulk(ring + (chunk % layout.slots * kReaderRows + lane) * layout.row_bytes, row, bytes, landed);
  }

  __device__ __forceinline__ void start_ring() {
    if (lane == 0) {
#pragma unroll 1
      for (int slot = 0; slot < layout.slots; ++slot) start(chunk_landed + slot);
      before_bulk_copies();
    }
    __syncwarp();
#pragma unroll 1
    for (int chunk = 0; chunk < layout.slots; ++chunk) bring_chunk(chunk);
  }

  // acc[chain] += 16 concepts times 16 tokens over the columns of one step.
  __device__ __forceinline__ void multiply_step(float (&acc)[2][4], const char* rows, const char* columns, int step) const {
    Operand<T> reader;
    uint32_t token[4];
    reader.load(rows + lane % 16 * layout.row_bytes + lane / 16 * 16 + step * kStep * kSize);
    load_matrices(token, columns + (lane % 8 + lane / 16 * 8) * layout.token_bytes + lane / 8 % 2 * 16 + step * kStep * kSize);
    multiply(acc[0], reader, token[0], token[1]);
    multiply(acc[1], reader, token[2], token[3]);
  }

  // This block's part of the projections of this warp's concepts.
  __device__ __forceinline__ void project() {
    float acc[kChains][2][4] = {};
    const int chunks = (layout.slice + layout.chunk - 1) / layout.chunk;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait(chunk_landed + chunk % layout.slots, chunk / layout.slots & 1);
      const char* rows = ring + chunk % layout.slots * kReaderRows * layout.row_bytes;
      const int offset = chunk * layout.chunk * kSize, steps = chunk_columns(chunk) / kStep;
#pragma unroll 1
      for (const char* source = tokens; source; source = source == tokens ? residual : nullptr) {
        int step = 0;
#pragma unroll 1
        for (; step + kChains <= steps; step += kChains) {
#pragma unroll
          for (int chain = 0; chain < kChains; ++chain) multiply_step(acc[chain], rows, source + offset, step + chain);
        }
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) {
          if (step + chain < steps) multiply_step(acc[chain], rows, source + offset, step + chain);
        }
      }
      if (chunk + layout.slots < chunks) {
        before_bulk_copies();
        __syncwarp();
        bring_chunk(chunk + layout.slots);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto part = [&](int chain) { return acc[chain][i / 4][i % 4]; };
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, concept = warp * kReaderRows + lane / 4 + i / 2 % 2 * 8;
      partial[token * layout.pitch + concept] = (part(0) + part(1)) + (part(2) + part(3));
    }
  }

  // 32 values, scores of a token and its squared norm, are a unit. Units are dealt out to the blocks and their warps.
  __device__ __forceinline__ int first_unit() const { return warp * layout.ranks + rank; }

  // The mean and 1 / deviation of the lane's value, if it is a score.
  __device__ __forceinline__ float2 scale_of(int unit) const {
    const int k = (unit * 32 + lane) % layout.pitch;
    return k < a.k && a.scores ? float2{a.mean[k], a.inv_std[k]} : float2{0.f, 1.f};
  }

  // `scale` is that of the first unit, and mostly there is no other.
  __device__ __forceinline__ void write_outputs(float2 scale) const {
#pragma unroll 1
    for (int unit = first_unit(); unit * 32 < count * layout.pitch; unit += reader_warps * layout.ranks) {
      if (unit != first_unit()) scale = scale_of(unit);
      const int value = unit * 32 + lane, t = value / layout.pitch, k = value % layout.pitch;
      const bool is_score = k < a.k && a.scores, is_square = k == a.k_padded && a.sqnorm;
      if (t >= count || !(is_score || is_square)) continue;
      const float sum = Projections{partial + t * layout.pitch, layout.ranks}[k];
      if (is_score) write_score(a, first + t, k, ev_score(sum, scale.x, scale.y));
      else a.sqnorm[first + t] = sum;
    }
  }

  // --- token warps: a half-warp looks up and decides for one token, the warp steers both -------------------------------

  struct Steering {
    int32_t row;  // that the half-warp's token points at, or -1
    bool waits;   // for its projections: it has a gate or rules
  };

  __device__ __forceinline__ int token_of(int half) const { return warp - reader_warps + half * kTokenWarps; }

  __device__ __forceinline__ void bring_tokens() {
    const int bytes = layout.slice * kSize;
    if (lane == 0) {
      start(tokens_landed);
      before_bulk_copies();
      announce(tokens_landed, count * bytes * (residual ? 2 : 1));
    }
    __syncwarp();
    if (lane >= count) return;
    copy_bulk(tokens + lane * layout.token_bytes, static_cast<const T*>(a.x) + (first + lane) * a.x_stride + column, bytes, tokens_landed);
    if (!residual) return;
    copy_bulk(residual + lane * layout.token_bytes, static_cast<const T*>(a.residual) + (first + lane) * a.residual_stride + column, bytes,
              tokens_landed);
  }

  __device__ __forceinline__ Steering look_up() const {
    const ev_table& table = a.table;
    const int t = token_of(lane / 16), m = lane % 16;
    if (const int k = (threadIdx.x - reader_warps * 32) * 32; k < a.k) {
      prefetch(a.mean + k);
      prefetch(a.inv_std + k);
    }
    if (!table.delta) return {-1, false};
    const int32_t row = t < count ? ev_own_row(a, first + t) : -1;
    const bool gated = row >= 0 && ev_is_concept(a, table.gate[2 * row]);
    const bool ruled = row >= 0 && m < table.rules && ev_is_concept(a, table.rule_concept[row * table.rules + m]);
    const bool waits = __ballot_sync(~0u, gated || ruled) >> lane / 16 * 16 & 0xffff;
    if (row >= 0) prefetch_row(row, waits);
    if (gated && ev_is_row(a, table.gate[2 * row + 1])) prefetch_row(table.gate[2 * row + 1], true);
    return {row, waits};
  }

  // What steering by a row will read, by sixteen lanes.
  __device__ __forceinline__ void prefetch_row(int32_t row, bool rules) const {
    const ev_table& table = a.table;
    const int m = lane % 16;
#pragma unroll 1
    for (int i = m * 32; i < layout.slice; i += 16 * 32) prefetch(table.delta + row * a.d + column + i);
    if (!rules) return;
    if (m == 0) prefetch(table.gate_threshold + row);
    if (m * 16 < table.rules * 3) prefetch(table.rule_bounds + row * table.rules * 3 + m * 16);
    if (m * 16 < table.rules * table.rules) prefetch(table.rule_solve + row * table.rules * table.rules + m * 16);
    if (m >= table.rules) return;
    const int32_t concept = table.rule_concept[row * table.rules + m];
    if (!ev_is_concept(a, concept)) return;
#pragma unroll 1
    for (int i = 0; i < layout.slice; i += 128 / kSize) prefetch(static_cast<const T*>(a.directions) + concept * a.d + column + i);
  }

  __device__ __forceinline__ void squares() {
    using V = Vector<T>;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int t = token_of(half);
      if (t >= count) break;
      float sum = 0.f;
#pragma unroll 1
      for (int i = lane; i * V::kSize < layout.slice; i += 32) {
        float h[V::kSize], other[V::kSize] = {};
        V::load(tokens + t * layout.token_bytes + i * sizeof(V)).widen(h);
        if (residual) V::load(residual + t * layout.token_bytes + i * sizeof(V)).widen(other);
#pragma unroll
        for (int e = 0; e < V::kSize; ++e) sum += (h[e] + other[e]) * (h[e] + other[e]);
      }
      for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane == 0) partial[t * layout.pitch + a.k_padded] = sum;
    }
  }

  // The row that steers the half-warp's token, if it waited; its coefficients go to shared memory, one lane a rule.
  __device__ __forceinline__ int32_t decide(const Steering& own) {
    const int t = token_of(lane / 16), m = lane % 16;
    const Projections p{partial + t * layout.pitch, layout.ranks};
    const int32_t row = own.waits ? ev_choose_row(a, first + t, p) : -1;
    const bool has_rule = row >= 0 && m < a.table.rules;
    if (has_rule) wanted[t * EV_MAX_RULES + m] = ev_rule_wants(a, row, m, p);
    __syncwarp();
    if (has_rule) coefficients[t * EV_MAX_RULES + m] = ev_rule_coefficient(a, row, m, wanted + t * EV_MAX_RULES);
    __syncwarp();
    return row;
  }

  // The warp steers its two tokens by their half-warps' rows.
  __device__ __forceinline__ void steer(int32_t row, const float* c) const {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int32_t j = __shfl_sync(~0u, row, half * 16);
      const int t = token_of(half);
      if (j < 0) continue;
      const float* solved = c ? c + t * EV_MAX_RULES : nullptr;
      steer_columns<T, kVectors>(a, first + t, j, solved, column, column + layout.slice);
    }
  }

  const ev_args& a;
  const DecodeLayout& layout;
  const int warp, lane, reader_warps, rank;
  const int64_t first;  // of the cluster's tokens
  const int count;
  const int64_t column;  // the first of the block's slice
  Barrier* const tokens_landed;
  Barrier* const chunk_landed;  // one for each slot of the warp's ring
  char* const ring;
  char* const tokens;
  char* const residual;  // or null
  float* const partial;  // [kTokens, pitch]
  float *const wanted, *const coefficients;  // [kTokens, EV_MAX_RULES]
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) decode(const __grid_constant__ ev_args a, const __grid_constant__ DecodeLayout layout) {
  EV_DYNAMIC_SHARED(shared, 128);
  Decode<T>(a, layout, shared).run();
}

int64_t clusters_of(const ev_args& a) { return (a.n + kTokens - 1) / kTokens; }

template <class T>
cudaError_t apply(const ev_args& a, const DecodeLayout& layout, cudaStream_t stream) {
  const int threads = (static_cast<int>(a.k_padded) / kReaderRows + kTokenWarps) * 32;
  return launch(decode<T>, dim3(static_cast<unsigned>(clusters_of(a) * layout.ranks)), threads, layout.bytes, stream, layout.ranks, layout.early, a, layout);
}

}  // namespace

ev_cuda_plan plan_decode_sm90(const ev_args& a, const Device& device, bool early) {
  const DecodeLayout layout = layout_for(a, device);
  if (layout.ranks == 0) return {EV_NO_KERNEL};
  return {early ? EV_CUDA_DECODE_SM90_PDL : EV_CUDA_DECODE_SM90, kTokens, clusters_of(a) * layout.ranks, 1, 0, 1, a.table.delta ? 1 : 0};
}

cudaError_t apply_decode_sm90(const ev_args& a, const Device& device, bool early, cudaStream_t stream) {
  DecodeLayout layout = layout_for(a, device);
  layout.early = early;
  return a.dtype == EV_BF16 ? apply<__nv_bfloat16>(a, layout, stream) : apply<__half>(a, layout, stream);
}

#if !defined(EV_EMULATE)
int decode_sm90_cluster(int shared_bytes) {
  auto* kernel = decode<__nv_bfloat16>;
  for (int ranks = kLargestCluster; ranks >= kSmallestCluster; ranks /= 2) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
    int clusters = 0;
    if (prepare(config, attributes, kernel, dim3(ranks), kThreads, shared_bytes, nullptr, ranks) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0)
      return ranks;
  }
  cudaGetLastError();  // what failed here is no error of the caller's
  return 0;
}
#endif

}  // namespace ev
