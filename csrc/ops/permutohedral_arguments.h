// A lattice as it crosses the border of the CPU library: checked, so that no index leaves its array.
#pragma once

#include "cpu/permutohedral_filter.h"
#include "permutohedral_check.h"

namespace atrous {

inline void check_indices(const char* name, const Tensor& t, int64_t limit) {
  const int32_t* values = static_cast<const int32_t*>(t.const_data_ptr());
  const int64_t count = t.numel();
  int32_t least = 0, most = -1;
  for (int64_t i = 0; i < count; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  if (least < 0 || most >= limit) fail(name, "expected 0 to ", limit - 1, ", but got ", least < 0 ? least : most);
}

// The six tensors that a filter reads, in the order of the schemas.
template <class T>
cpu::LatticeView<T> lattice_view(const Tensor& vertices, const Tensor& weights, const Tensor& neighbours, const Tensor& begin,
                                 const Tensor& points, const Tensor& point_weights) {
  const LatticeSizes sizes = check_lattice(vertices, weights, neighbours, begin, points, point_weights);
  if (is_double("weights", weights) != (sizeof(T) == sizeof(double)))
    fail("weights", "expected the dtype of unary, but got scalar type ", static_cast<int>(weights.scalar_type()));
  check_indices("vertices", vertices, sizes.vertices);
  check_indices("neighbours", neighbours, sizes.vertices + 1);
  check_indices("points", points, sizes.points);
  const int64_t corners = sizes.points * sizes.corners;
  const int64_t* at = static_cast<const int64_t*>(begin.const_data_ptr());
  for (int64_t v = 0; v < sizes.vertices; ++v)
    if (at[v] > at[v + 1]) fail("begin", "expected increasing values, but got ", at[v], " before ", at[v + 1]);
  if (at[0] != 0 || at[sizes.vertices] != corners)
    fail("begin", "expected 0 to ", corners, ", but got ", at[0], " to ", at[sizes.vertices]);
  return {sizes.points,
          sizes.vertices,
          sizes.corners,
          static_cast<const int32_t*>(vertices.const_data_ptr()),
          static_cast<const T*>(weights.const_data_ptr()),
          static_cast<const int32_t*>(neighbours.const_data_ptr()),
          at,
          static_cast<const int32_t*>(points.const_data_ptr()),
          static_cast<const T*>(point_weights.const_data_ptr())};
}

}  // namespace atrous
