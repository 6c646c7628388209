// A lattice as it crosses the library's border: checked, so that no index leaves its array.
#pragma once

#include <limits>

#include "conv2d_check.h"
#include "cpu/permutohedral_filter.h"

namespace atrous {

using torch::headeronly::ScalarType;

inline bool is_double(const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float && t.scalar_type() != ScalarType::Double)
    fail(name, "expected float32 or float64, but got scalar type ", static_cast<int>(t.scalar_type()));
  return t.scalar_type() == ScalarType::Double;
}

inline void check_array(const char* name, const Tensor& t, ScalarType type, const Sizes& sizes) {
  if (t.scalar_type() != type || sizes_of(t) != sizes || !t.is_contiguous())
    fail(name, "expected contiguous scalar type ", static_cast<int>(type), " of sizes ", text(sizes), ", but got scalar type ",
         static_cast<int>(t.scalar_type()), " of sizes ", text(sizes_of(t)));
}

inline void check_indices(const char* name, const Tensor& t, int64_t limit) {
  const int32_t* values = static_cast<const int32_t*>(t.const_data_ptr());
  int32_t least = 0, most = -1;
  for (int64_t i = 0; i < t.numel(); ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  if (least < 0 || most >= limit) fail(name, "expected 0 to ", limit - 1, ", but got ", least < 0 ? least : most);
}

// The six tensors that a filter reads, in the order of the schemas.
template <class T>
cpu::LatticeView<T> lattice_view(const Tensor& vertices, const Tensor& weights, const Tensor& neighbours, const Tensor& begin,
                                 const Tensor& points, const Tensor& point_weights) {
  const ScalarType real = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  if (vertices.dim() != 2 || neighbours.dim() != 3)
    fail("vertices", "expected [points, corners] and neighbours [corners, vertices, 2], but got sizes ",
         text(sizes_of(vertices)), " and ", text(sizes_of(neighbours)));
  const int64_t count = vertices.size(0), corners = vertices.size(1), known = neighbours.size(1);
  check_array("vertices", vertices, ScalarType::Int, {count, corners});
  check_array("weights", weights, real, {count, corners});
  check_array("neighbours", neighbours, ScalarType::Int, {corners, known, 2});
  check_array("begin", begin, ScalarType::Long, {known + 1});
  check_array("points", points, ScalarType::Int, {count * corners});
  check_array("point_weights", point_weights, real, {count * corners});
  check_indices("vertices", vertices, known);
  check_indices("neighbours", neighbours, known + 1);
  check_indices("points", points, count);
  const int64_t* at = static_cast<const int64_t*>(begin.const_data_ptr());
  for (int64_t v = 0; v < known; ++v)
    if (at[v] > at[v + 1]) fail("begin", "expected increasing values, but got ", at[v], " before ", at[v + 1]);
  if (at[0] != 0 || at[known] != count * corners)
    fail("begin", "expected 0 to ", count * corners, ", but got ", at[0], " to ", at[known]);
  return {count,
          known,
          corners,
          static_cast<const int32_t*>(vertices.const_data_ptr()),
          static_cast<const T*>(weights.const_data_ptr()),
          static_cast<const int32_t*>(neighbours.const_data_ptr()),
          at,
          static_cast<const int32_t*>(points.const_data_ptr()),
          static_cast<const T*>(point_weights.const_data_ptr())};
}

}  // namespace atrous
