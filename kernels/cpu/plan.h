// How one call is spread over CPU threads: a pure function, which `emovec info` prints and csrc/schedule.cpp follows.
#pragma once
#include <algorithm>

#include "../common/steer.h"

enum ev_split : int32_t { EV_SERIAL = 0, EV_OVER_CONCEPTS = 1, EV_OVER_TOKENS = 2 };

struct ev_cpu_plan {
  ev_split split;
  int64_t tile;  // tokens a thread takes at a time
};

enum : int64_t {
  EV_CPU_TILE = 64,           // the most tokens that a form takes at a time
  EV_DECODE_TOKENS = 8,       // up to here the time is the readers' way from memory, so threads share the concepts
  EV_SERIAL_WORK = 1 << 21,   // multiply-adds below which waking a thread costs more than it brings
  EV_ROWS = 6,
};

// `concepts`: padded concepts to project on, 0 where nothing needs a projection. `tile`: the form's.
static inline ev_cpu_plan ev_plan_cpu(int64_t n, int64_t d, int64_t concepts, int64_t threads, int64_t tile) {
  const int64_t work = n * d * std::max<int64_t>(concepts, EV_LANES);
  if (threads == 1 || work < EV_SERIAL_WORK) return {EV_SERIAL, tile};
  if (n <= EV_DECODE_TOKENS && concepts > 0) return {EV_OVER_CONCEPTS, n};
  const int64_t share = (n + threads - 1) / threads;
  return {EV_OVER_TOKENS, std::min<int64_t>(tile, (share + EV_ROWS - 1) / EV_ROWS * EV_ROWS)};
}
