// torch.ops.atrous_native.pyramid_pool and pyramid_pool_input on CUDA tensors, through LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "binding.h"
#include "ops/pyramid_pool_check.h"
#include "pyramid_pool.h"

namespace atrous::cuda {
namespace {

PyramidShape shape_of(const Sizes& input, const Sizes& bins) {
  const auto levels = static_cast<int64_t>(bins.size() / 2);
  if (levels > max_levels) fail("bins", "expected at most ", max_levels, " levels, but got ", levels);
  return {input[0], input[1], input[2], input[3], bins.data(), levels};
}

std::tuple<Tensor, Tensor> pyramid_pool_op(const Tensor& input, std::vector<int64_t> bins, bool maximum) {
  const Sizes sizes = check_pyramid(sizes_of(input), bins), in = sizes_of(input);
  const PyramidShape shape = shape_of(in, bins);
  const DType dtype = dtype_of(input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor output = empty_of(sizes, input.scalar_type(), input);
  const Tensor index = empty_of(maximum ? sizes : Sizes{0}, ScalarType::Long, input);
  const Tensor workspace = empty_of(Sizes{pyramid_pool_workspace(shape, dtype, maximum)}, ScalarType::Byte, input);
  pyramid_pool(shape, dtype, read(input), output.mutable_data_ptr(),
               maximum ? static_cast<int64_t*>(index.mutable_data_ptr()) : nullptr, workspace.mutable_data_ptr(),
               current_stream(input));
  return {output, index};
}

Tensor pyramid_pool_input_op(const Tensor& grad, const Tensor& index, std::vector<int64_t> input_size,
                             std::vector<int64_t> bins, bool maximum, bool channels_last) {
  check_pyramid_gradient(grad, index, input_size, bins, maximum);
  const PyramidShape shape = shape_of(input_size, bins);
  const DType dtype = dtype_of(grad);
  const DeviceGuard guard(grad.get_device_index());
  const Tensor g = torch::stable::contiguous(grad), at = torch::stable::contiguous(index);
  Tensor grad_input = empty(input_size, grad, channels_last);
  if (!maximum) {
    pyramid_pool_average_input(shape, dtype, g.const_data_ptr(), write(grad_input), current_stream(grad));
    return grad_input;
  }
  torch::stable::zero_(grad_input);
  pyramid_pool_maximum_input(shape, dtype, g.const_data_ptr(), static_cast<const int64_t*>(at.const_data_ptr()),
                             write(grad_input), current_stream(grad));
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATROUS_NAMESPACE, ATROUS_DISPATCH_KEY, m) {
  m.impl("pyramid_pool", TORCH_BOX(&pyramid_pool_op));
  m.impl("pyramid_pool_input", TORCH_BOX(&pyramid_pool_input_op));
}

}  // namespace atrous::cuda
