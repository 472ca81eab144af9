// How decode_sm90 cuts a call, and where things lie in a block's dynamic shared memory. A pure function of shapes.
#pragma once
#include "../common/steer.h"
#include "forms.h"
#include "hardware.cuh"

namespace ev {

enum : int {
  kTokens = 16,       // of a cluster
  kReaderRows = 16,   // concepts of a reader warp
  kReaderWarps = 16,  // at most: 256 concepts
  kStep = 16,         // columns of one product
  kLargestCluster = 16,
  kSmallestCluster = 4,
  kSmallestSlice = 128,  // columns
  kChunk = 256,
  kSmallChunk = 128,
  kSize = 2,  // bytes of an element
};

struct DecodeLayout {
  int ranks, slice;            // blocks of a cluster, columns of a block
  int chunk, slots;            // columns of one bulk copy, chunks that a warp holds
  int row_bytes, token_bytes;  // pitches; 16 bytes more than multiples of 32, so that ldmatrix meets no bank conflict
  int pitch;                   // of `partial` in floats: the concepts, then the squared norm
  int ring, tokens, residual, partial, wanted, coefficients;  // byte offsets
  int bytes;
  bool early;  // started while the kernels before it run
};

// Lays out `slots` chunks a warp and says whether they fit.
inline bool place(DecodeLayout& layout, const ev_args& a, int chunk, int slots, int limit) {
  const int rows = static_cast<int>(a.k_padded), warps = rows / kReaderRows;
  layout.chunk = chunk;
  layout.slots = slots;
  layout.row_bytes = chunk * kSize + 16;
  layout.token_bytes = layout.slice * kSize + 16;
  layout.pitch = rows + 4;
  layout.ring = ((1 + warps * slots) * 8 + 127) & ~127;
  layout.tokens = layout.ring + rows * slots * layout.row_bytes;
  layout.residual = layout.tokens + kTokens * layout.token_bytes;
  layout.partial = layout.residual + (a.residual ? kTokens * layout.token_bytes : 0);
  layout.wanted = layout.partial + kTokens * layout.pitch * 4;
  layout.coefficients = layout.wanted + kTokens * EV_MAX_RULES * 4;
  layout.bytes = layout.coefficients + kTokens * EV_MAX_RULES * 4;
  return layout.bytes <= limit;
}

// The largest cluster that leaves a block at least 128 columns. All of its slice in large copies if that fits, or else
// rings of small ones. No ranks where nothing fits.
inline DecodeLayout layout_for(const ev_args& a, const Device& device) {
  const bool aligned = is_aligned(a.x, a.x_stride * kSize) && is_aligned(a.residual, a.residual_stride * kSize) && is_aligned(a.readers);
  if (a.dtype == EV_F32 || a.reader_parts > 1 || a.k_padded > kReaderWarps * kReaderRows || !aligned) return {};
  DecodeLayout layout{};
  for (int ranks = device.cluster; ranks >= kSmallestCluster; ranks /= 2) {
    if (a.d % (ranks * kStep) || a.d / ranks < kSmallestSlice) continue;
    layout.ranks = ranks;
    layout.slice = static_cast<int>(a.d / ranks);
    const int chunk = layout.slice < kChunk ? layout.slice : static_cast<int>(kChunk);
    if (place(layout, a, chunk, (layout.slice + chunk - 1) / chunk, device.shared_bytes)) return layout;
    for (int slots = layout.slice / kSmallChunk; slots >= 2; --slots) {
      if (place(layout, a, kSmallChunk, slots, device.shared_bytes)) return layout;
    }
  }
  return {};
}

}  // namespace ev
