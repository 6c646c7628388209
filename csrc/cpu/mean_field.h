// Mean field inference in a fully connected CRF (Kraehenbuehl and Koltun 2011, algorithm 1).
#pragma once

#include <vector>

#include "permutohedral_filter.h"

namespace atrous::cpu {

template <class T> struct MeanFieldKernel {
  LatticeView<T> lattice;
  const T* compatibility;  // [channels], or [channels, channels]
  bool diagonal;
  const T *before, *after;  // [points], what the values are multiplied by before and after the filter; null: 1
};

// out [points, channels]: Q = softmax(-unary), then `iterations` times Q = softmax(-unary - sum over the kernels of
// compatibility times the filtered Q).
template <class T>
void mean_field(int64_t points, int64_t channels, const T* unary, const std::vector<MeanFieldKernel<T>>& kernels,
                int64_t iterations, T* out);

}  // namespace atrous::cpu
