// How stream_sm90 cuts a call into blocks, and where things lie in a block's dynamic shared memory. A pure function of shapes.
#pragma once
#include "forms.h"
#include "steering.cuh"
#include "warpgroup.cuh"

namespace ev {

enum : int {
  kTokens = 128,  // of a tile
  kColumns = kBoxBytes / 2,  // of a step
  kTokenBytes = kTokens * kBoxBytes,
  kReaderBytes = kProductConcepts * kBoxBytes,
  kTokenRing = 8 * kTokenBytes,  // at 0: stages of tokens, or half as many of tokens and of residual
  kMostTokenStages = 8,
  kMostReaderStages = 4,
  kFewestReaderStages = 3,
  kPitch = kProductConcepts + 4,    // of the projections, in floats; they are at 0, where the ring was
  kSquares = kTokens * kPitch * 4,  // byte offset
  kMostRanks = 8,
};
static_assert(kTokenRing >= kSquares + kTokens * 4, "the projections take the ring's place");

// One of each for a stage: the copy engine has filled it; those who read it are through.
template <int STAGES>
struct RingBarriers {
  Barrier landed[STAGES], freed[STAGES];
};
struct Rings {
  RingBarriers<kMostTokenStages> tokens;
  RingBarriers<kMostReaderStages> readers;
};

// What follows the ring of tokens.
struct Fixed {
  Rings rings;
  Tokens<kTokens> tokens;
  float mean[kProductConcepts], inv_std[kProductConcepts];
};
enum : int { kReaderRing = kTokenRing + (static_cast<int>(sizeof(Fixed)) + 1023) / 1024 * 1024 };  // byte offset

struct StreamCut {
  int ranks, log_ranks;  // blocks that share a tile, a slice of its columns each: 1, 2, 4 or 8
  int64_t blocks;
  int all_steps, steps;             // of 128 bytes of columns: a row's, and a block's at most
  int token_stages, reader_stages;  // of the rings
  int coefficients, concepts;  // byte offsets
  int bytes;
};

// No stages where they do not fit.
inline StreamCut stream_cut(const ev_args& a, int ranks, int limit) {
  const int entries = kTokens * (a.table.delta ? static_cast<int>(a.table.rules) : 0);
  StreamCut cut{};
  cut.ranks = ranks;
  while (1 << cut.log_ranks < ranks) ++cut.log_ranks;
  cut.blocks = (a.n + kTokens - 1) / kTokens * ranks;
  cut.all_steps = static_cast<int>((a.d + kColumns - 1) / kColumns);
  cut.steps = (cut.all_steps + ranks - 1) / ranks;
  cut.token_stages = kMostTokenStages / (a.residual ? 2 : 1);
  for (cut.reader_stages = kMostReaderStages; cut.reader_stages >= kFewestReaderStages; --cut.reader_stages) {
    cut.coefficients = kReaderRing + cut.reader_stages * kReaderBytes;
    cut.concepts = cut.coefficients + entries * 4;
    cut.bytes = cut.concepts + entries * 4;
    if (cut.bytes <= limit) return cut;
  }
  cut.token_stages = cut.reader_stages = 0;
  return cut;
}

}  // namespace ev
