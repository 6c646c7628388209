// torch.ops.atrous_native.permutohedral_filter and permutohedral_filter_weights on CUDA tensors, through LibTorch's stable ABI.
#include "permutohedral_filter.h"

#include <torch/csrc/stable/library.h>

#include "binding.h"
#include "ops/permutohedral_check.h"

namespace atrous::cuda {
namespace {

Lattice checked_lattice(const Tensor& vertices, const Tensor& weights, const Tensor& neighbours, const Tensor& begin,
                        const Tensor& points, const Tensor& point_weights) {
  const LatticeSizes sizes = check_lattice(vertices, weights, neighbours, begin, points, point_weights);
  return {sizes.points,
          sizes.vertices,
          sizes.corners,
          dtype_of(weights),
          static_cast<const int32_t*>(vertices.const_data_ptr()),
          weights.const_data_ptr(),
          static_cast<const int32_t*>(neighbours.const_data_ptr()),
          static_cast<const int64_t*>(begin.const_data_ptr()),
          static_cast<const int32_t*>(points.const_data_ptr()),
          point_weights.const_data_ptr()};
}

Tensor permutohedral_filter_op(const Tensor& values, const Tensor& vertices, const Tensor& weights, const Tensor& neighbours,
                               const Tensor& begin, const Tensor& points, const Tensor& point_weights, bool reverse) {
  const Lattice lattice = checked_lattice(vertices, weights, neighbours, begin, points, point_weights);
  const DeviceGuard guard(values.get_device_index());
  const Tensor x = checked_values("values", values, weights, lattice.points);
  const int64_t channels = x.size(1);
  const Tensor out = empty_of({lattice.points, channels}, x.scalar_type(), x);
  if (lattice.points == 0) return out;
  const Tensor workspace = empty_of(Sizes{filter_workspace(lattice, channels)}, ScalarType::Byte, x);
  permutohedral_filter(lattice, channels, x.const_data_ptr(), reverse, out.mutable_data_ptr(), workspace.mutable_data_ptr(),
                       current_stream(x));
  return out;
}

Tensor permutohedral_filter_weights_op(const Tensor& grad, const Tensor& values, const Tensor& vertices, const Tensor& weights,
                                       const Tensor& neighbours, const Tensor& begin, const Tensor& points,
                                       const Tensor& point_weights, bool reverse) {
  const Lattice lattice = checked_lattice(vertices, weights, neighbours, begin, points, point_weights);
  const DeviceGuard guard(values.get_device_index());
  const Tensor g = checked_values("grad", grad, weights, lattice.points);
  const Tensor x = checked_values("values", values, weights, lattice.points);
  const int64_t channels = x.size(1);
  if (g.size(1) != channels) fail("grad", "expected ", channels, " channels, but got sizes ", text(sizes_of(g)));
  const Tensor out = empty_of({lattice.points, lattice.corners}, x.scalar_type(), x);
  if (lattice.points == 0) return out;
  const Tensor workspace = empty_of(Sizes{filter_weights_workspace(lattice, channels)}, ScalarType::Byte, x);
  permutohedral_filter_weights(lattice, channels, g.const_data_ptr(), x.const_data_ptr(), reverse, out.mutable_data_ptr(),
                               workspace.mutable_data_ptr(), current_stream(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATROUS_NAMESPACE, ATROUS_DISPATCH_KEY, m) {
  m.impl("permutohedral_filter", TORCH_BOX(&permutohedral_filter_op));
  m.impl("permutohedral_filter_weights", TORCH_BOX(&permutohedral_filter_weights_op));
}

}  // namespace atrous::cuda
