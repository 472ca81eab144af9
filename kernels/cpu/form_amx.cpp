// AMX: bf16 x against bf16 readers by tiles of 16 tokens x 16 concepts, 32 columns of d at a time. A panel of packed
// readers is already laid out as such tiles want it. Everything else is done as in form_avx512_bf16.cpp.
//
// A projection is one accumulator per (token, concept), summed over d in order, whatever the other tokens are.
#include "forms.h"
#include "tile.h"
#if !defined(EV_EMULATE_AVX512)
#include <immintrin.h>
#endif

namespace {

struct Avx512 {
  static constexpr int W = 16;
};

enum : int64_t {
  EV_AMX_ROWS = 16,
  EV_AMX_STEP = 32,      // columns of d in a tile
  EV_AMX_BLOCK = 512,    // columns staged: 32 tokens of them are 32 KB, most of an L1
  EV_AMX_GROUP = 32,     // tokens taken together: two tiles, so that a tile of readers from L2 is used twice
  EV_AMX_PANEL = EV_AMX_STEP / 2 * EV_LANES,  // pairs of a panel's tile
};

#if defined(EV_EMULATE_AVX512)
struct Tile {
  int rows;
  uint32_t at[EV_AMX_ROWS][EV_LANES];
};
thread_local Tile tiles[8];
#define EV_LOAD(t, from, stride) \
  for (int r = 0; r < tiles[t].rows; ++r) std::memcpy(tiles[t].at[r], reinterpret_cast<const char*>(from) + r * (stride), 64)
#define EV_STORE(t, to, stride) \
  for (int r = 0; r < tiles[t].rows; ++r) std::memcpy(reinterpret_cast<char*>(to) + r * (stride), tiles[t].at[r], 64)
#define EV_ZERO(t) std::memset(tiles[t].at, 0, sizeof tiles[t].at)
#define EV_DOT(c, a, b) emulated_dot(tiles[c], tiles[a], tiles[b])
void emulated_dot(Tile& c, const Tile& a, const Tile& b) {
  for (int r = 0; r < c.rows; ++r)
    for (int i = 0; i < EV_AMX_ROWS; ++i)
      for (int k = 0; k < EV_LANES; ++k) {
        float sum;
        std::memcpy(&sum, &c.at[r][k], 4);
        sum += widen(bf16{static_cast<uint16_t>(a.at[r][i])}) * widen(bf16{static_cast<uint16_t>(b.at[i][k])});
        sum += widen(bf16{static_cast<uint16_t>(a.at[r][i] >> 16)}) * widen(bf16{static_cast<uint16_t>(b.at[i][k] >> 16)});
        std::memcpy(&c.at[r][k], &sum, 4);
      }
}
#else
#define EV_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define EV_STORE(t, to, stride) _tile_stored(t, to, stride)
#define EV_ZERO(t) _tile_zero(t)
#define EV_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

// Tiles 0 to 3 are sums, then come x and readers. `second`: tokens of the second tile, 0 if there is none.
void configure(int64_t first, int64_t second) {
  alignas(64) uint8_t palette[64] = {1};
  for (int t = 0; t < 8; ++t) {
    const bool of_second = second > 0 && (t == 2 || t == 3 || t == 5);
    const bool readers = t > 5 || (t == 5 && second == 0);
    palette[16 + 2 * t] = 64;  // bytes a row
    palette[48 + t] = static_cast<uint8_t>(readers ? EV_AMX_ROWS : of_second ? second : first);
#if defined(EV_EMULATE_AVX512)
    tiles[t].rows = palette[48 + t];
#endif
  }
#if !defined(EV_EMULATE_AVX512)
  _tile_loadconfig(palette);
#endif
}

// Where the sums of one tile are kept, a row for each token.
struct Sums {
  float* at;
  int64_t bytes;  // from one row to the next
};

// Tiles 0 to 3: from nothing, or from where they are kept; and back.
void begin(const Sums* p, bool first) {
  if (first) {
    EV_ZERO(0);
    EV_ZERO(1);
    EV_ZERO(2);
    EV_ZERO(3);
  } else {
    EV_LOAD(0, p[0].at, p[0].bytes);
    EV_LOAD(1, p[1].at, p[1].bytes);
    EV_LOAD(2, p[2].at, p[2].bytes);
    EV_LOAD(3, p[3].at, p[3].bytes);
  }
}

void end(const Sums* p) {
  EV_STORE(0, p[0].at, p[0].bytes);
  EV_STORE(1, p[1].at, p[1].bytes);
  EV_STORE(2, p[2].at, p[2].bytes);
  EV_STORE(3, p[3].at, p[3].bytes);
}

// 17 to 32 tokens against two panels.
void two_by_two(const bf16* x, const uint32_t* const* v, int64_t columns) {
  const int64_t x_bytes = EV_AMX_BLOCK * 2;
  for (int64_t i = 0; i < columns; i += EV_AMX_STEP) {
    const int64_t at = i / EV_AMX_STEP * EV_AMX_PANEL;
    EV_LOAD(6, v[0] + at, 64);
    EV_LOAD(4, x + i, x_bytes);
    EV_DOT(0, 4, 6);
    EV_LOAD(5, x + EV_AMX_ROWS * EV_AMX_BLOCK + i, x_bytes);
    EV_DOT(2, 5, 6);
    EV_LOAD(7, v[1] + at, 64);
    EV_DOT(1, 4, 7);
    EV_DOT(3, 5, 7);
  }
}

// Up to 16 tokens against four panels: a sum takes three times as long as the next may start.
void one_by_four(const bf16* x, const uint32_t* const* v, int64_t columns) {
  const int64_t x_bytes = EV_AMX_BLOCK * 2;
  for (int64_t i = 0; i < columns; i += EV_AMX_STEP) {
    const int64_t at = i / EV_AMX_STEP * EV_AMX_PANEL;
    EV_LOAD(4, x + i, x_bytes);
    EV_LOAD(5, v[0] + at, 64);
    EV_DOT(0, 4, 5);
    EV_LOAD(6, v[1] + at, 64);
    EV_DOT(1, 4, 6);
    EV_LOAD(7, v[2] + at, 64);
    EV_DOT(2, 4, 7);
    EV_LOAD(5, v[3] + at, 64);
    EV_DOT(3, 4, 5);
  }
}

// One block of a group's x against all panels, some at a time; the last ones may be fewer, and what takes the missing
// ones' place goes to `spare`.
void all_panels(int64_t tokens, int64_t panels, const bf16* x, Panels<uint32_t> v, int64_t columns, float* p, int64_t p_stride, bool first) {
  alignas(64) float spare[EV_AMX_GROUP * EV_LANES] = {};
  const bool two = tokens > EV_AMX_ROWS;
  const int64_t together = two ? 2 : 4;
  for (int64_t z = 0; z < panels; z += together) {
    const uint32_t* readers[4];
    Sums sums[4];
    for (int64_t i = 0; i < 4; ++i) {  // two by two: tiles 2 and 3 are the second tokens of panels 0 and 1
      const int64_t panel = z + i % together, below = i / together * EV_AMX_ROWS;
      const bool there = panel < panels;
      readers[i] = v.at + (there ? panel : z) * v.stride;
      const int64_t stride = there ? p_stride : int64_t(EV_LANES);
      sums[i] = {(there ? p + panel * EV_LANES : spare) + below * stride, stride * int64_t(sizeof(float))};
    }
    begin(sums, first);
    if (two) {
      two_by_two(x, readers, columns);
    } else {
      one_by_four(x, readers, columns);
    }
    end(sums);
  }
}

// Copy a block of x or of the residual to where no two rows share a cache set.
void copy(const bf16* x, int64_t x_stride, int64_t tokens, int64_t columns, bf16* to) {
  for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + t * EV_AMX_BLOCK, x + t * x_stride, columns * sizeof(bf16));
}

void project_amx(const ev_args* args, ev_range tokens, ev_range concepts, float* p, int64_t p_stride, float* sq, const float* const* adds) {
  const ev_args& a = *args;
  if (a.dtype != EV_BF16 || a.reader_dtype != EV_BF16 || a.d % EV_AMX_STEP != 0 || concepts.begin == concepts.end)
    return ev_form_avx512_bf16.project(args, tokens, concepts, p, p_stride, sq, adds);
  const int64_t panel = a.d / 2 * EV_LANES, panels = (concepts.end - concepts.begin) / EV_LANES;
  const Panels<uint32_t> v{static_cast<const uint32_t*>(a.readers) + concepts.begin / EV_LANES * panel, panel};
  alignas(64) bf16 x[EV_AMX_GROUP * EV_AMX_BLOCK], residual[EV_AMX_GROUP * EV_AMX_BLOCK];
  for (int64_t t = tokens.begin; t < tokens.end; t += EV_AMX_GROUP, p += EV_AMX_GROUP * p_stride) {
    const int64_t count = std::min<int64_t>(EV_AMX_GROUP, tokens.end - t);
    Vec<16>::F squares[EV_AMX_GROUP] = {};
    configure(std::min<int64_t>(count, EV_AMX_ROWS), std::max<int64_t>(count - EV_AMX_ROWS, 0));
    for (int64_t column = 0; column < a.d; column += EV_AMX_BLOCK) {
      const int64_t columns = std::min<int64_t>(EV_AMX_BLOCK, a.d - column);
      bf16* of_x = static_cast<bf16*>(a.x) + t * a.x_stride + column;
      copy(of_x, a.x_stride, count, columns, x);
      all_panels(count, panels, x, v.from(column / 2), columns, p, p_stride, column == 0);
      if (a.residual) {  // <x + residual, r> as two products: the sum itself may need more than 16 bits
        copy(static_cast<const bf16*>(a.residual) + t * a.residual_stride + column, a.residual_stride, count, columns, residual);
        all_panels(count, panels, residual, v.from(column / 2), columns, p, p_stride, false);
      }
      if (!sq && !adds) continue;
      for (int64_t i = 0; i < count; ++i) {
        const float* delta = adds ? adds[t - tokens.begin + i] : nullptr;
        pass<Avx512>(x + i * EV_AMX_BLOCK, a.residual ? residual + i * EV_AMX_BLOCK : nullptr, columns, nullptr, squares[i],
                     delta ? delta + column : nullptr, of_x + i * a.x_stride);
      }
    }
    if (sq)
      for (int64_t i = 0; i < count; ++i) sq[t - tokens.begin + i] = Vec<16>::sum(squares[i]);
  }
#if !defined(EV_EMULATE_AVX512)
  _tile_release();
#endif
}

}  // namespace

const ev_cpu_form ev_form_amx = {project_amx, finish<Avx512>, 2 * EV_AMX_GROUP};
