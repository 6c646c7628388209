// torch.ops.atrous_native.permutohedral_lattice: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/permutohedral_lattice.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "permutohedral_check.h"

namespace atrous {
namespace {

using Arrays = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T> Arrays build(const Tensor& features, const cpu::LatticePoints& shape) {
  const auto empty = [&](const Sizes& sizes, ScalarType type) {
    return torch::stable::empty(sizes, type, std::nullopt, features.device());
  };
  const int64_t all = shape.all(), corners = shape.dimensions + 1;
  const ScalarType real = features.scalar_type();
  Tensor vertices = empty({all, corners}, ScalarType::Int), weights = empty({all, corners}, real);
  Tensor ranks = empty({all, corners}, ScalarType::Byte);
  cpu::LatticeBuilder<T> builder(shape);
  const int64_t count =
      builder.place(static_cast<const T*>(features.const_data_ptr()), static_cast<int32_t*>(vertices.mutable_data_ptr()),
                    static_cast<T*>(weights.mutable_data_ptr()), static_cast<uint8_t*>(ranks.mutable_data_ptr()));
  Tensor neighbours = empty({corners, count, 2}, ScalarType::Int), begin = empty({count + 1}, ScalarType::Long);
  Tensor points = empty({all * corners}, ScalarType::Int), point_weights = empty({all * corners}, real);
  builder.connect(static_cast<int32_t*>(neighbours.mutable_data_ptr()));
  builder.sort(static_cast<const int32_t*>(vertices.const_data_ptr()), static_cast<const T*>(weights.const_data_ptr()),
               static_cast<int64_t*>(begin.mutable_data_ptr()), static_cast<int32_t*>(points.mutable_data_ptr()),
               static_cast<T*>(point_weights.mutable_data_ptr()));
  return {vertices, weights, neighbours, begin, points, point_weights, ranks};
}

Arrays permutohedral_lattice_cpu(const Tensor& features) {
  const Sizes sizes = check_features(features, cpu::most_lattice_dimensions);
  const cpu::LatticePoints shape{sizes[0], sizes[1], sizes[2]};
  const Tensor dense = torch::stable::contiguous(features);
  return is_double("features", features) ? build<double>(dense, shape) : build<float>(dense, shape);
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("permutohedral_lattice(Tensor features) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("permutohedral_lattice", TORCH_BOX(&atrous::permutohedral_lattice_cpu));
}
