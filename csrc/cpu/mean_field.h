// Mean field inference in a fully connected CRF (Kraehenbuehl and Koltun 2011, algorithm 1).
#pragma once

#include <vector>

#include "permutohedral_filter.h"

namespace atrous::cpu {

template <class T> struct MeanFieldKernel {
  LatticeView<T> lattice;
  const T* compatibility;  // [channels], or [channels, channels]
  bool diagonal;
};

// out [points, channels]: Q = softmax(logits), then `iterations` times Q = softmax(logits - sum over the kernels of
// compatibility times the filtered Q).
template <class T>
void mean_field(int64_t points, int64_t channels, const T* logits, const std::vector<MeanFieldKernel<T>>& kernels,
                int64_t iterations, T* out);

}  // namespace atrous::cpu
