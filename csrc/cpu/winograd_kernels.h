// The transforms of Winograd's convolution, per instruction set (tables.h). Vectors run over channels.
#pragma once

#include "tables.h"

namespace atrous::cpu {

// How an axis is cut into tiles. f2 to f4: F(m, 3), m written pixels. phase2: the at most two pixels of a whole phase, where
// all taps beyond them fall outside the image.
enum TileForm { phase2, f2, f3, f4, tile_forms };

struct TileSizes {
  int64_t written, read, points;
  int64_t shared;     // leading points that a tile needs even where its last pixel lies outside the image
  int64_t first_tap;  // under which the first written pixel reads the first one of the tile
};
constexpr TileSizes tile_sizes[tile_forms] = {{2, 2, 3, 1, 1}, {2, 4, 4, 3, 0}, {3, 5, 5, 4, 0}, {4, 6, 6, 5, 0}};
constexpr int64_t max_tile_side = 6;  // pixels read, or points

// For the algorithms A, B, G of the rows and of the columns; points, pixels and taps are numbered row by row. Steps are in
// elements.
struct WinogradTransforms {
  // u[point] = G w G^T, w[tap] at taps + tap * tap_step.
  void (*weight)(const float* taps, int64_t tap_step, int64_t vectors, float* u, int64_t point_step);
  // v[point] = B^T d B of the pixels d that the tile reads.
  void (*input)(const float* const* pixels, int64_t vectors, float* v, int64_t point_step);
  // The pixels that the tile writes = finish(A^T s A + bias) of the points' sums s.
  void (*output)(const float* sums, int64_t point_step, int64_t vectors, const float* bias, const Finish& finish,
                 float* const* pixels);
  // The transposes of output and weight: v[point] = A g A^T of the pixels g; w[tap] = G^T u G.
  void (*gradient)(const float* const* pixels, int64_t vectors, float* v, int64_t point_step);
  void (*weight_gradient)(const float* u, int64_t point_step, int64_t vectors, float* taps, int64_t tap_step);
};

struct WinogradKernels {
  int lanes;
  WinogradTransforms by[tile_forms][tile_forms];  // [rows][columns]: equal, or one of the two is phase2
};
ATROUS_DECLARE_TABLES(WinogradKernels)

}  // namespace atrous::cpu
