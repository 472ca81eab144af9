// The op for sm_80 and later, every dtype and shape.
//
// A block of eight warps owns a tile of tokens, so nobody else reads or writes them. Loop: stages of 128 bytes of columns,
// of the tile's tokens and of the readers, flow through a ring in shared memory (cp.async); tensor cores multiply them
// (mma.sync); and every thread takes the squares of a few elements and, for tokens that only add, writes x + delta back
// on the way. Then, for tokens with a gate or rules, the projections are complete: choose the row, solve the rules, read
// x once more (mostly from L2) and write it.
//
// Where tiles are few, slices of kSliceStages stages are projected by a block each (the "sliced" form): they leave their parts of
// the projections in a workspace, and a second kernel adds those up in the order of the slices and goes on from there.
//
// Readers in two parts take two steps for each stage of columns: one with what rounding took from them, one with the readers.
//
// A projection is summed in the same order whatever the tile: over the columns (of a slice) in fp32, of partial sums over the 128
// bytes of a stage. The partial sums are short because tensor cores truncate what they add.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "forms.h"
#include "portable_tile.cuh"
#include "steering.cuh"

namespace ev {
namespace {

enum : int {
  kFinishTokens = 4,  // of a block that adds up slices
  kFinishThreads = 512,
};

// Keep this thread's projections in `kept` if it is not null, and unless they are SLICED write them as scores.
template <class T, int MW, int MT, bool SLICED>
__device__ __forceinline__ void write_scores(const ev_args& a, int64_t first, int count, int64_t concept, float* kept, int pitch,
                                             const float (&acc)[MT][Tile<T, MW, MT>::kConceptTilesPerWarp][4]) {
  using S = Tile<T, MW, MT>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = warp % MW * MT * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < S::kConceptTilesPerWarp; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t k = concept + (warp / MW * S::kConceptTilesPerWarp + n) * 8 + lane % 4 * 2 + side;
      if (k >= a.k) continue;
      const float mean = a.mean[k], inv_std = a.inv_std[k];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int t = token + m * 16 + half * 8;
          const float p = acc[m][n][half * 2 + side];
          if (!SLICED && a.scores && t < count) {
            if constexpr (S::kScoresInFp32) write_score<float>(a, first + t, k, ev_score(p, mean, inv_std));
            else write_score(a, first + t, k, ev_score(p, mean, inv_std));
          }
          if (kept && (!SLICED || t < count)) kept[t * pitch + k] = p;
        }
      }
    }
  }
}

template <class T, int MW, int MT, bool SLICED>
__global__ void __launch_bounds__(kThreads, 1) portable(const __grid_constant__ ev_args a, const __grid_constant__ Layout layout) {
  using S = Tile<T, MW, MT>;
  EV_DYNAMIC_SHARED(shared, 128);
  __shared__ Tokens<S::kTokens> tokens;
  float* projections = reinterpret_cast<float*>(shared + layout.projections);
  float* coefficients = reinterpret_cast<float*>(shared + layout.coefficients);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * S::kTokens;
  const int count = static_cast<int>(a.n - first < S::kTokens ? a.n - first : S::kTokens);
  const auto part = [&] { return a.workspace + (blockIdx.y * a.n + first) * layout.pitch; };  // of the slice

  const bool waits = sort_tokens(a, first, count, tokens);
  const bool projects = a.scores || waits;
  if (projects || a.sqnorm) {
    float square[S::kVectorsPerThread] = {};
    for (int64_t concept = 0; concept == 0 || (projects && concept < a.k); concept += S::kConcepts) {
      const int64_t left = projects ? a.k_padded - concept : 0;
      const int concepts = static_cast<int>(left < S::kConcepts ? left : S::kConcepts);
      const bool last = !projects || concept + S::kConcepts >= a.k;
      const bool squares = a.sqnorm && last, adds = a.table.delta && last;
      float acc[MT][S::kConceptTilesPerWarp][4] = {};
      pass<T, MW, MT, SLICED>(a, layout, shared, first, count, concept, concepts, tokens.add, acc, square, squares || adds, adds);
      float* kept = SLICED ? part() : waits ? projections : nullptr;
      if (projects) write_scores<T, MW, MT, SLICED>(a, first, count, concept, kept, layout.pitch, acc);
    }
#pragma unroll
    for (int i = 0; i < S::kVectorsPerThread; ++i) {
      float sum = square[i];
      for (int distance = 1; distance < 8; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      const int t = threadIdx.x / 8 + i * (kThreads / 8);
      if (a.sqnorm && threadIdx.x % 8 == 0 && t < count) (SLICED ? part()[t * layout.pitch + a.k_padded] : a.sqnorm[first + t]) = sum;
    }
    if (SLICED || !waits) return;
    __syncthreads();
    decide(a, first, tokens, projections, layout.pitch, coefficients);
    __syncthreads();
    steer_tokens<T>(a, first, S::kTokens, tokens.row, coefficients);
  } else if (a.table.delta && (!SLICED || blockIdx.y == 0)) {
    __syncthreads();
    steer_tokens<T>(a, first, S::kTokens, tokens.add, nullptr);
  }
}

// What follows from the slices' parts of the projections of a few tokens.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ ev_args a, int slices, int pitch) {
  EV_DYNAMIC_SHARED(shared, 128);
  __shared__ Tokens<kFinishTokens> tokens;
  __shared__ float coefficients[kFinishTokens * EV_MAX_RULES];
  float* projections = reinterpret_cast<float*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinishTokens;
  const int count = static_cast<int>(a.n - first < kFinishTokens ? a.n - first : kFinishTokens);
  const bool waits = sort_tokens(a, first, count, tokens);

  for (int i = threadIdx.x; i < count * pitch; i += blockDim.x) {
    const int t = i / pitch, k = i % pitch;
    const bool is_square = k == a.k_padded && a.sqnorm;
    if (!is_square && (k >= a.k || !(a.scores || waits))) continue;
    const float* part = a.workspace + (first + t) * pitch + k;
    float sum = part[0];
#pragma unroll 8
    for (int slice = 1; slice < slices; ++slice) sum += part[slice * a.n * pitch];
    if (is_square) {
      a.sqnorm[first + t] = sum;
    } else {
      projections[i] = sum;
      if (a.scores) write_score(a, first + t, k, ev_score(sum, a.mean[k], a.inv_std[k]));
    }
  }
  if (!waits) return;
  __syncthreads();
  decide(a, first, tokens, projections, pitch, coefficients);
  __syncthreads();
  steer_tokens<T>(a, first, kFinishTokens, tokens.row, coefficients);
}

template <class T, int MW, int MT>
Layout layout_for(const ev_args& a, int limit, bool sliced) {
  using S = Tile<T, MW, MT>;
  Layout layout{};
  layout.stage_bytes = (S::kTokens * (a.residual ? 2 : 1) + S::kConcepts) * kStageBytes;
  layout.pitch = pitch_of(a);
  const bool steers = a.table.delta && !sliced, one_pass = a.k <= S::kConcepts;
  for (layout.stages = kMaxStages; layout.stages >= 2; --layout.stages) {
    const int ring = layout.stages * layout.stage_bytes;
    layout.projections = one_pass ? 0 : ring;
    layout.coefficients = layout.projections + S::kTokens * layout.pitch * 4;
    const int after = steers ? layout.coefficients + S::kTokens * EV_MAX_RULES * 4 : 0;
    layout.bytes = ring > after ? ring : after;
    if (layout.bytes + static_cast<int>(sizeof(Tokens<S::kTokens>)) <= limit) return layout;
  }
  return Layout{};
}

// A stage's time is about that of bringing its rows and the readers' into the multiprocessor, a wave's that of a block.
struct Choice {
  cudaError_t (*launch)(const ev_args&, const Layout&, cudaStream_t) = nullptr;
  Layout layout{};
  int64_t cost = 0, tokens = 0, concepts = 0, blocks = 0;  // tokens of a block, concepts of a pass
};

template <class T, int MW, int MT>
int64_t tiles_of(const ev_args& a) {
  return (a.n + Tile<T, MW, MT>::kTokens - 1) / Tile<T, MW, MT>::kTokens;
}

template <class T, int MW, int MT, bool SLICED>
cudaError_t launch_tile(const ev_args& a, const Layout& layout, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tiles_of<T, MW, MT>(a)), SLICED ? static_cast<unsigned>(slices_of(a)) : 1);
  return launch(portable<T, MW, MT, SLICED>, blocks, kThreads, layout.bytes, stream, 1, false, a, layout);
}

template <class T, int MW, int MT, bool SLICED>
void consider(Choice& best, const ev_args& a, const Device& device) {
  using S = Tile<T, MW, MT>;
  const Layout layout = layout_for<T, MW, MT>(a, device.shared_bytes, SLICED);
  if (layout.stages == 0) return;
  const int64_t blocks = tiles_of<T, MW, MT>(a) * (SLICED ? slices_of(a) : 1);
  const int64_t stages = (SLICED ? static_cast<int64_t>(kSliceStages) : (a.d + S::kColumns - 1) / S::kColumns) * a.reader_parts;
  const int64_t cost = (blocks + device.multiprocessors - 1) / device.multiprocessors * (S::kTokens + S::kConcepts) * stages;
  if (!best.launch || cost < best.cost) best = {launch_tile<T, MW, MT, SLICED>, layout, cost, S::kTokens, S::kConcepts, blocks};
}

template <class T, bool SLICED>
Choice choose(const ev_args& a, const Device& device) {
  Choice best;
  consider<T, 1, 1, SLICED>(best, a, device);
  if constexpr (sizeof(T) == 2) {
    consider<T, 4, 1, SLICED>(best, a, device);
    if constexpr (!SLICED) {  // its registers are all in use
      if (!a.scores || a.scores_dtype == EV_F32) consider<T, 4, 2, false>(best, a, device);
    }
  } else {
    consider<T, 2, 1, SLICED>(best, a, device);  // its operands take twice the registers
  }
  return best;
}

template <bool SLICED>
Choice choose(const ev_args& a, const Device& device) {
  switch (a.dtype) {
    case EV_F32: return choose<float, SLICED>(a, device);
    case EV_BF16: return choose<__nv_bfloat16, SLICED>(a, device);
    default: return choose<__half, SLICED>(a, device);
  }
}

template <bool SLICED>
ev_cuda_plan plan(const ev_args& a, const Choice& choice) {
  if (!choice.launch || (SLICED && (slices_of(a) <= 1 || slices_of(a) > 65535))) return {EV_NO_KERNEL};
  const bool rules = a.table.delta && a.table.rules > 0;
  const int64_t passes = a.scores || rules ? (a.k + choice.concepts - 1) / choice.concepts * a.reader_parts : a.sqnorm ? 1 : 0;
  const int64_t again = rules || (a.table.delta && passes == 0) ? 1 : 0, workspace = SLICED ? slices_of(a) * a.n * pitch_of(a) : 0;
  return {SLICED ? EV_CUDA_SLICED : EV_CUDA_PORTABLE, choice.tokens, choice.blocks, SLICED ? 2 : 1, workspace, passes, again};
}

template <class T>
cudaError_t launch_finish(const ev_args& a, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((a.n + kFinishTokens - 1) / kFinishTokens));
  return launch(finish<T>, blocks, kFinishThreads, kFinishTokens * pitch_of(a) * 4, stream, 1, false, a, slices_of(a), pitch_of(a));
}

}  // namespace

ev_cuda_plan plan_portable(const ev_args& a, const Device& device) { return plan<false>(a, choose<false>(a, device)); }
ev_cuda_plan plan_sliced(const ev_args& a, const Device& device) { return plan<true>(a, choose<true>(a, device)); }
cudaError_t apply_portable(const ev_args& a, const Device& device, cudaStream_t stream) {
  const Choice choice = choose<false>(a, device);
  return choice.launch(a, choice.layout, stream);
}

// Beside its blocks, what the second kernel and the workspace's way out and back took on an H200.
bool slicing_pays(const ev_args& a, const Device& device) {
  const Choice whole = choose<false>(a, device), slices = choose<true>(a, device);
  const ev_cuda_plan sliced = plan<true>(a, slices);
  if (sliced.launches == 0 || !(a.scores || a.sqnorm || a.table.rules > 0)) return false;
  return !whole.launch || slices.cost + 600 + sliced.workspace / (6 * device.multiprocessors) < whole.cost;
}

cudaError_t apply_sliced(const ev_args& a, const Device& device, cudaStream_t stream) {
  const Choice choice = choose<true>(a, device);
  const cudaError_t error = choice.launch(a, choice.layout, stream);
  if (error != cudaSuccess) return error;
  switch (a.dtype) {
    case EV_F32: return launch_finish<float>(a, stream);
    case EV_BF16: return launch_finish<__nv_bfloat16>(a, stream);
    default: return launch_finish<__half>(a, stream);
  }
}

}  // namespace ev
