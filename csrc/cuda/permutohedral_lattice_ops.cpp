// torch.ops.atrous_native.permutohedral_lattice on CUDA tensors, through LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "binding.h"
#include "ops/permutohedral_check.h"
#include "permutohedral_lattice.h"

namespace atrous::cuda {
namespace {

using Arrays = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A number of the device: waits for it.
int64_t number_in(const Tensor& tensor) {
  int64_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(tensor.get(), &number));
  return number;
}

[[noreturn]] void fail_for(const Tensor& features, int64_t bad) {
  Tensor flat = torch::stable::flatten(features);
  const Tensor one = torch::stable::narrow(flat, 0, bad, 1);
  float single = 0;
  double value = 0;
  if (is_double("features", features)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_item_float64(one.get(), &value));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_item_float32(one.get(), &single));
    value = single;
  }
  fail("features", "expected finite values of at most 65536 (in units of the filter's width), but point ",
       bad / features.size(2), " has ", value);
}

Arrays permutohedral_lattice_op(const Tensor& features) {
  const Sizes sizes = check_features(features, most_lattice_dimensions);
  const LatticeShape shape{sizes[0], sizes[1], sizes[2]};
  const ScalarType real = is_double("features", features) ? ScalarType::Double : ScalarType::Float;
  const DType dtype = dtype_of(features);
  const int64_t all = shape.all(), corners = shape.dimensions + 1;
  const DeviceGuard guard(features.get_device_index());
  void* const stream = current_stream(features);
  const auto empty = [&](const Sizes& size, ScalarType type) { return empty_of(size, type, features); };
  const Tensor dense = torch::stable::contiguous(features);
  const Tensor vertices = empty({all, corners}, ScalarType::Int), weights = empty({all, corners}, real);
  const Tensor ranks = empty({all, corners}, ScalarType::Byte);
  Tensor found = empty({1}, ScalarType::Long), bad = empty({1}, ScalarType::Long);
  const Tensor workspace = empty({lattice_workspace(shape)}, ScalarType::Byte);
  torch::stable::zero_(found);
  torch::stable::fill_(bad, static_cast<double>(all * shape.dimensions));
  if (all > 0)
    place_points(shape, dtype, dense.const_data_ptr(), static_cast<int32_t*>(vertices.mutable_data_ptr()),
                 weights.mutable_data_ptr(), static_cast<uint8_t*>(ranks.mutable_data_ptr()),
                 static_cast<int64_t*>(found.mutable_data_ptr()), static_cast<int64_t*>(bad.mutable_data_ptr()),
                 workspace.mutable_data_ptr(), stream);
  // The sizes of the other arrays depend on the features: the one point where the host waits.
  if (const int64_t at = number_in(bad); at < all * shape.dimensions) fail_for(dense, at);
  const int64_t count = number_in(found);
  const Tensor neighbours = empty({corners, count, 2}, ScalarType::Int);
  Tensor begin = empty({count + 1}, ScalarType::Long);
  const Tensor points = empty({all * corners}, ScalarType::Int), point_weights = empty({all * corners}, real);
  if (all == 0) {
    torch::stable::zero_(begin);
    return {vertices, weights, neighbours, begin, points, point_weights, ranks};
  }
  const Tensor sort_workspace = empty({lattice_sort_workspace(shape, count)}, ScalarType::Byte);
  connect_vertices(shape, dtype, count, static_cast<const int32_t*>(vertices.const_data_ptr()), weights.const_data_ptr(),
                   static_cast<const uint8_t*>(ranks.const_data_ptr()), workspace.const_data_ptr(),
                   static_cast<int32_t*>(neighbours.mutable_data_ptr()), static_cast<int64_t*>(begin.mutable_data_ptr()),
                   static_cast<int32_t*>(points.mutable_data_ptr()), point_weights.mutable_data_ptr(),
                   sort_workspace.mutable_data_ptr(), stream);
  return {vertices, weights, neighbours, begin, points, point_weights, ranks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATROUS_NAMESPACE, ATROUS_DISPATCH_KEY, m) {
  m.impl("permutohedral_lattice", TORCH_BOX(&permutohedral_lattice_op));
}

}  // namespace atrous::cuda
