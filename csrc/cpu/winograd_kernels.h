// The transforms of Winograd's convolution, per instruction set (tables.h). Vectors run over channels.
#pragma once

#include "tables.h"

namespace atrous::cpu {

constexpr int max_winograd_tile = 4;

// For tiles of m x m written pixels, side = m + 2 source pixels or points per axis. Steps are in elements.
struct WinogradTransforms {
  // u[point] = G w G^T, w[tap] at taps + tap * tap_step.
  void (*weight)(const float* taps, int64_t tap_step, int64_t vectors, float* u, int64_t point_step);
  // v[point] = B^T d B of the pixels d[side][side].
  void (*input)(const float* const* pixels, int64_t vectors, float* v, int64_t point_step);
  // pixels[m][m] = A^T s A + bias of the points' sums s.
  void (*output)(const float* sums, int64_t point_step, int64_t vectors, const float* bias, float* const* pixels);
  // The transposes of output and weight: v[point] = A g A^T of the pixels g[m][m]; w[tap] = G^T u G.
  void (*gradient)(const float* const* pixels, int64_t vectors, float* v, int64_t point_step);
  void (*weight_gradient)(const float* u, int64_t point_step, int64_t vectors, float* taps, int64_t tap_step);
};

struct WinogradKernels {
  int lanes;
  WinogradTransforms tile[max_winograd_tile + 1];  // [2] to [4]
};
ATROUS_DECLARE_TABLES(WinogradKernels)

}  // namespace atrous::cpu
