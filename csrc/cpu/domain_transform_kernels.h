// The inner loops of the domain transform, as a table per instruction set (tables.h).
//
// A tile holds `length` positions of `width` sequences side by side: [length][width], width a multiple of transform_lanes.
#pragma once

#include "tables.h"

namespace atrous::cpu {

constexpr int64_t transform_lanes = 16;

template <class T> struct TransformTile {
  int64_t length, width;
  const T* weights;  // [length + 1][width], of the step between a position and the one before; 0 at both ends
  T* values;         // filtered in place; the gradient leaves differences of neighbours here
  T* grad;           // of the result; becomes that of the values
  T* grad_weights;   // [length + 1][width], added to
  T* scratch;        // one tile
};

template <class T> struct TransformKernels {
  void (*weights)(int64_t size, T rate, T slope, T* edge);  // exp(-rate - slope * edge), in place
  void (*filter)(const TransformTile<T>&);                  // forwards and backwards; without gradients
  void (*gradient)(const TransformTile<T>&);
};

struct TransformTable {
  TransformKernels<float> f32;
  TransformKernels<double> f64;
};

ATROUS_DECLARE_TABLES(TransformTable)

}  // namespace atrous::cpu
