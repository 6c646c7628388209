// Gaussian filtering through a permutohedral lattice on CUDA, as functions of plain numbers and pointers: no framework types, no
// CUDA headers.
//
// Every sum has one order, fixed by the lattice and the number of channels. Indices are trusted: they are those of a lattice that
// permutohedral_lattice made. A failed launch throws std::runtime_error.
#pragma once

#include "tensor.h"

namespace atrous::cuda {

// The six arrays of a lattice (cpu/permutohedral_filter.h), real numbers being float32 or float64.
struct Lattice {
  int64_t points, vertices, corners;
  DType dtype;
  const int32_t* corner_vertices;
  const void* weights;
  const int32_t* neighbours;
  const int64_t* begin;
  const int32_t* corner_points;
  const void* point_weights;
};

// out [points, channels] from values [points, channels]; reverse: the axes in reverse order. workspace: filter_workspace bytes.
int64_t filter_workspace(const Lattice& lattice, int64_t channels);
void permutohedral_filter(const Lattice& lattice, int64_t channels, const void* values, bool reverse, void* out, void* workspace,
                          void* stream);

// out [points, corners]: the gradient of the weights, given that of the filter's output. workspace: filter_weights_workspace bytes.
int64_t filter_weights_workspace(const Lattice& lattice, int64_t channels);
void permutohedral_filter_weights(const Lattice& lattice, int64_t channels, const void* grad, const void* values, bool reverse,
                                  void* out, void* workspace, void* stream);

}  // namespace atrous::cuda
