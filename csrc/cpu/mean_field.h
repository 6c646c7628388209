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

// [points, channels], of any strides.
template <class T> struct MeanFieldUnary {
  int64_t points, channels;
  const T* data;
  int64_t point_stride, channel_stride;
};

// out [points, channels]: Q = softmax(-unary), then `iterations` times Q = softmax(-unary - sum over the kernels of
// compatibility times the filtered Q). Where the values of the vertices would take more than most_vertex_bytes and all
// compatibilities are diagonal, a few channels at a time go through the lattices; the result has the same bits.
template <class T>
void mean_field(const MeanFieldUnary<T>& unary, const std::vector<MeanFieldKernel<T>>& kernels, int64_t iterations,
                int64_t most_vertex_bytes, T* out);

}  // namespace atrous::cpu
