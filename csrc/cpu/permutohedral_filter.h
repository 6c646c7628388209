// Gaussian filtering through a permutohedral lattice: points to vertices, a blur along every axis, vertices to points.
//
// Every vertex sums its points in one order, fixed by the lattice: the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "permutohedral_kernels.h"
#include "runtime.h"

namespace atrous::cpu {

// The arrays of LatticeBuilder (permutohedral_lattice.h); T: float or double.
template <class T> struct LatticeView {
  int64_t points, vertices, corners;
  const int32_t* corner_vertices;  // [points, corners]
  const T* weights;                // [points, corners]
  const int32_t* neighbours;       // [corners, vertices, 2]
  const int64_t* begin;            // [vertices + 1]
  const int32_t* corner_points;    // [points * corners]
  const T* point_weights;          // [points * corners]

  // The blur sums to 2^corners times its input, a unit Gaussian to less: with this factor, its peak is about 1.
  T scale() const { return 1 / (1 + 1 / static_cast<T>(int64_t{1} << (corners - 1))); }
};

// Values of the vertices, and room for blurring them: rows of `channels`, one of zeros at the end for absent neighbours.
template <class T> class VertexValues {
 public:
  VertexValues(const LatticeView<T>& lattice, int64_t channels);
  T* values() const { return now_; }

  // Blurred values of the vertices from values of the points. reverse: the axes in reverse order, which is the adjoint.
  // scale: what the result is multiplied by, per channel, or null. point_scale: the same of the input, per point.
  void fill(const T* points, bool reverse, const T* scale, const T* point_scale = nullptr);

  // values() times a matrix [channels, channels].
  void mix(const T* matrix);

 private:
  LatticeView<T> lattice_;
  int64_t channels_;
  Scratch first_, second_;
  T *now_, *next_;
};

// out [points, channels] from values [points, channels].
template <class T>
void permutohedral_filter(const LatticeView<T>& lattice, int64_t channels, const T* values, bool reverse, T* out);

// out [points, corners]: the gradient of the weights, given that of the filter's output.
template <class T>
void permutohedral_filter_weights(const LatticeView<T>& lattice, int64_t channels, const T* grad, const T* values,
                                  bool reverse, T* out);

template <class T> const PermutohedralKernels<T>& permutohedral_kernels() {
  if constexpr (sizeof(T) == sizeof(double)) return table<PermutohedralTable>().f64;
  else return table<PermutohedralTable>().f32;
}

}  // namespace atrous::cpu
