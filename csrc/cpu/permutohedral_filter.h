// Gaussian filtering through a permutohedral lattice: points to vertices, a blur along every axis, vertices to points.
//
// Every vertex sums its points in one order, fixed by the lattice: the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

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

// The vertices along every axis, as BlurChains takes them: those with a neighbour, each behind the one before it.
class LatticeChains {
 public:
  LatticeChains(const int32_t* neighbours, int64_t corners, int64_t vertices);
  const int32_t* order(int64_t axis) const { return order_.as<int32_t>() + axis * vertices_; }
  int64_t count(int64_t axis) const { return count_[axis]; }

  // Whether the chains are short. Long ones, as of a regular grid, stride through memory: blurring row after row is faster there.
  static bool worthwhile(const int32_t* neighbours, int64_t corners, int64_t vertices);

 private:
  int64_t vertices_;
  Scratch order_;
  std::vector<int64_t> count_;
};

// Values of the vertices: rows of `channels`.
template <class T> class VertexValues {
 public:
  // repeated: filled more than once or twice. Finding the chains then pays, and blurring needs no second set of rows.
  VertexValues(const LatticeView<T>& lattice, int64_t channels, bool repeated);
  T* values() const { return now_; }

  // Blurred values of the vertices, in rows of `channels`, at most those of the constructor, from values of the points, in rows of
  // `stride`. reverse: the axes in reverse order, which is the adjoint. factor: what the result is multiplied by, per channel, or
  // null. point_scale: the same of the input, per point.
  void fill(const T* points, int64_t stride, int64_t channels, bool reverse, const T* factor, const T* point_scale = nullptr);

  // values() times a matrix [channels, channels], which are those of the last fill().
  void mix(const T* matrix);

  // Bytes per vertex and channel.
  static int64_t bytes(const LatticeView<T>& lattice, bool repeated);

 private:
  void blur(int64_t axis);

  LatticeView<T> lattice_;
  int64_t channels_;
  std::optional<LatticeChains> chains_;
  Scratch first_;
  std::optional<Scratch> second_;  // without chains; rows of neighbours that are absent are zeros at the end
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
