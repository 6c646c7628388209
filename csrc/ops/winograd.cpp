// torch.ops.atrous_native.conv2d_winograd, conv2d_input_winograd and conv2d_weight_winograd; winograd_weight and
// fingerprint, with which the transformed weights are cached.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "conv2d_arguments.h"
#include "conv2d_check.h"
#include "cpu/fingerprint.h"

namespace atrous {
namespace {

Tensor winograd_weight_cpu(const Tensor& weight, std::vector<int64_t> input_size, std::vector<int64_t> stride,
                           std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, int64_t tile,
                           bool input_gradient) {
  const Sizes size = sizes_of(weight);
  check_four("weight", size);
  const Conv2dArguments a = check_geometry(input_size, size, stride, padding, dilation, groups);
  const cpu::WinogradShape shape = check_winograd(a, weight, tile, input_gradient);
  Tensor transformed = empty({cpu::winograd_weight_elements(shape)}, weight, false);
  if (transformed.numel() > 0)
    cpu::winograd_weight(shape, read(weight), static_cast<float*>(transformed.mutable_data_ptr()));
  return transformed;
}

Tensor conv2d_winograd_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& transformed,
                           const std::optional<Tensor>& bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation, int64_t groups, int64_t tile) {
  const Conv2dArguments a = check_forward(input, weight, bias, stride, padding, dilation, groups);
  const cpu::WinogradShape shape = check_winograd(a, weight, tile, false);
  Tensor output = empty(a.output, input, either_channels_last(input, weight));
  if (output.numel() == 0) return output;
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  cpu::conv2d_winograd(shape, read(input), read(weight), transformed_of(transformed, shape),
                       bias ? dense_bias->const_data_ptr() : nullptr, write(output));
  return output;
}

Tensor conv2d_input_winograd_cpu(std::vector<int64_t> input_size, const Tensor& weight,
                                 const std::optional<Tensor>& transformed, const Tensor& grad_output,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                 int64_t groups, int64_t tile) {
  const Conv2dArguments a = check_input_gradient(input_size, weight, grad_output, stride, padding, dilation, groups);
  const cpu::WinogradShape shape = check_winograd(a, weight, tile, true);
  Tensor grad_input = empty(a.input, weight, either_channels_last(weight, grad_output));
  if (grad_input.numel() > 0)
    cpu::conv2d_winograd(shape, read(grad_output), read(weight), transformed_of(transformed, shape), nullptr, write(grad_input));
  return grad_input;
}

Tensor conv2d_weight_winograd_cpu(const Tensor& input, std::vector<int64_t> weight_size, const Tensor& grad_output,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                  int64_t groups, int64_t tile) {
  const Conv2dArguments a = check_weight_gradient(input, weight_size, grad_output, stride, padding, dilation, groups);
  const cpu::WinogradShape shape = check_winograd(a, input, tile, false);
  Tensor grad_weight = empty(a.weight, input, either_channels_last(input, grad_output));
  if (grad_weight.numel() > 0) cpu::conv2d_weight_winograd(shape, read(input), read(grad_output), write(grad_weight));
  return grad_weight;
}

int64_t fingerprint_cpu(const Tensor& tensor) {
  int64_t elements = 1;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 0) return 0;
    elements += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  if (elements != tensor.numel()) fail("tensor", "expected memory without gaps, but got sizes ", text(sizes_of(tensor)));
  return cpu::fingerprint(tensor.const_data_ptr(), elements * static_cast<int64_t>(tensor.element_size()));
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
#define ATROUS_GEOMETRY "int[] stride, int[] padding, int[] dilation, int groups, int tile) -> Tensor"
  m.def("winograd_weight(Tensor weight, int[] input_size, int[] stride, int[] padding, int[] dilation, int groups, int tile, "
        "bool input_gradient) -> Tensor");
  m.def("conv2d_winograd(Tensor input, Tensor weight, Tensor? transformed, Tensor? bias, " ATROUS_GEOMETRY);
  m.def("conv2d_input_winograd(int[] input_size, Tensor weight, Tensor? transformed, Tensor grad_output, " ATROUS_GEOMETRY);
  m.def("conv2d_weight_winograd(Tensor input, int[] weight_size, Tensor grad_output, " ATROUS_GEOMETRY);
  m.def("fingerprint(Tensor tensor) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&atrous::winograd_weight_cpu));
  m.impl("conv2d_winograd", TORCH_BOX(&atrous::conv2d_winograd_cpu));
  m.impl("conv2d_input_winograd", TORCH_BOX(&atrous::conv2d_input_winograd_cpu));
  m.impl("conv2d_weight_winograd", TORCH_BOX(&atrous::conv2d_weight_winograd_cpu));
  m.impl("fingerprint", TORCH_BOX(&atrous::fingerprint_cpu));
}
