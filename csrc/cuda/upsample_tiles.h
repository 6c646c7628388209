// Bilinear upsampling as the losses and class maps need it: a warp takes a tile of output pixels, one column per lane, and
// interpolates between low-resolution pixels class by class. Positions are computed as the framework does, in T.
#pragma once

#include <cmath>

#include "launch.h"
#include "upsample.h"

namespace atrous::cuda {

constexpr int warp_lanes = 32;
constexpr int tile_rows = 8, tile_columns = warp_lanes;

// An output position lies between `left` and its right neighbour, with weight `share` for the latter.
template <typename T>
struct UpsamplePosition {
  int left;
  T share;
};

template <typename T>
struct UpsampleAxis {
  int64_t n_in, n_out;
  T scale;
  bool align_corners;

  UpsampleAxis(int64_t in, int64_t out, bool align)
      : n_in(in), n_out(out),
        scale(!align    ? static_cast<T>(in) / static_cast<T>(out)
              : out > 1 ? static_cast<T>(in - 1) / static_cast<T>(out - 1)
                        : T(0)),
        align_corners(align) {}

  int64_t tiles(int64_t size) const { return ceil_divide(n_out, size); }

  __host__ __device__ __forceinline__ UpsamplePosition<T> at(int64_t o) const {
    // An explicit fma: kernels and host have to agree on the left neighbour, whatever a compiler contracts.
    T position = align_corners ? scale * static_cast<T>(o) : std::fma(scale, static_cast<T>(o) + T(0.5), T(-0.5));
    if (position < T(0)) position = 0;
    const int64_t whole = static_cast<int64_t>(position);
    if (whole >= n_in - 1) return {static_cast<int>(n_in - 1), T(0)};  // the last one has no right neighbour
    const T share = position - static_cast<T>(whole);
    return {static_cast<int>(whole), share < T(0) ? T(0) : share > T(1) ? T(1) : share};
  }
};

template <typename T>
struct UpsamplePlan {
  UpsampleAxis<T> h, w;
  int64_t batch, classes, tiles_h, tiles_w;
  Strides strides;  // of the logits

  UpsamplePlan(const UpsampleShape& s, const Strides& logits)
      : h(s.in_h, s.out_h, s.align_corners), w(s.in_w, s.out_w, s.align_corners), batch(s.batch), classes(s.classes),
        tiles_h(h.tiles(tile_rows)), tiles_w(w.tiles(tile_columns)), strides(logits) {}
  int64_t tiles() const { return batch * tiles_h * tiles_w; }
};

// The tile of a warp as one of its lanes sees it. Rows and columns beyond the output repeat the last one.
template <typename T>
struct UpsampleTile {
  int64_t n, y, x;  // x: of the first lane
  int rows, columns;
  UpsamplePosition<T> row[tile_rows], column;

  __device__ __forceinline__ UpsampleTile(const UpsamplePlan<T>& plan, int64_t index, int lane) {
    const int64_t line = divide(index, plan.tiles_w);
    n = divide(line, plan.tiles_h);
    y = (line - n * plan.tiles_h) * tile_rows;
    x = (index - line * plan.tiles_w) * tile_columns;
    rows = static_cast<int>(plan.h.n_out - y < tile_rows ? plan.h.n_out - y : tile_rows);
    columns = static_cast<int>(plan.w.n_out - x < tile_columns ? plan.w.n_out - x : tile_columns);
#pragma unroll
    for (int r = 0; r < tile_rows; ++r) row[r] = plan.h.at(y + (r < rows ? r : rows - 1));
    column = plan.w.at(x + (lane < columns ? lane : columns - 1));
  }
};

// The four low-resolution values around an output pixel, as a line down the output column: base + share of the row * delta.
template <typename T>
struct UpsampleLine {
  T base, delta;

  __device__ __forceinline__ void set(T upper_left, T upper_right, T lower_left, T lower_right, T share) {
    base = upper_left + (upper_right - upper_left) * share;
    delta = lower_left + (lower_right - lower_left) * share - base;
  }
};

// Calls use(class, row of the tile, logit) for the lane's column, class by class.
template <typename T, typename Use>
__device__ __forceinline__ void for_each_logit(const UpsamplePlan<T>& plan, const UpsampleTile<T>& tile,
                                               const T* __restrict__ logits, Use use) {
  const int64_t right_step = tile.column.left + 1 < plan.w.n_in ? plan.strides.w : 0;
  const T* left = logits + tile.n * plan.strides.n + tile.column.left * plan.strides.w;
  for (int64_t c = 0; c < plan.classes; ++c, left += plan.strides.c) {
    UpsampleLine<T> line{};
#pragma unroll
    for (int r = 0; r < tile_rows; ++r) {
      if (r == 0 || tile.row[r].left != tile.row[r > 0 ? r - 1 : 0].left) {
        const T* const upper = left + tile.row[r].left * plan.strides.h;
        const T* const lower = tile.row[r].left + 1 < plan.h.n_in ? upper + plan.strides.h : upper;
        line.set(upper[0], upper[right_step], lower[0], lower[right_step], tile.column.share);
      }
      use(c, r, line.base + tile.row[r].share * line.delta);
    }
  }
}

// Float for float32, double for float64: logits of other types are converted before.
template <typename Use>
void with_upsample_type(DType dtype, Use use) {
  if (dtype == DType::float64) return use(double{});
  if (dtype == DType::float32) return use(float{});
  throw std::runtime_error("upsample: expected float32 or float64");
}

}  // namespace atrous::cuda
