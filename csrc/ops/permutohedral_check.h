// Argument checks of the permutohedral ops, shared by every device. A violation throws with the value and what was expected.
#pragma once

#include <limits>

#include "conv2d_check.h"

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

struct LatticeSizes {
  int64_t points, vertices, corners;
};

// The six tensors that a filter reads, in the order of the schemas: types and sizes, not the indices in them.
inline LatticeSizes check_lattice(const Tensor& vertices, const Tensor& weights, const Tensor& neighbours, const Tensor& begin,
                                  const Tensor& points, const Tensor& point_weights) {
  const ScalarType real = is_double("weights", weights) ? ScalarType::Double : ScalarType::Float;
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
  return {count, known, corners};
}

// features [images, points, dimensions], of which a lattice is made.
inline Sizes check_features(const Tensor& features, int64_t most_dimensions) {
  const Sizes sizes = sizes_of(features);
  if (sizes.size() != 3) fail("features", "expected [images, points, dimensions], but got sizes ", text(sizes));
  if (sizes[2] < 1 || sizes[2] > most_dimensions)
    fail("features", "expected 1 to ", most_dimensions, " dimensions, but got sizes ", text(sizes));
  if (sizes[0] * sizes[1] * (sizes[2] + 1) > std::numeric_limits<int32_t>::max())
    fail("features", "expected fewer than 2^31 corners (points times dimensions + 1), but got sizes ", text(sizes));
  return sizes;
}

inline Tensor checked_values(const char* name, const Tensor& t, const Tensor& weights, int64_t points) {
  check_alike(name, t, "weights", weights);
  if (t.dim() != 2 || t.size(0) != points || t.size(1) < 1)
    fail(name, "expected [", points, ", channels], at least 1 channel, but got sizes ", text(sizes_of(t)));
  return torch::stable::contiguous(t);
}

}  // namespace atrous
