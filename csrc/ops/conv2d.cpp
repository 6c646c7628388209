// torch.ops.atrous_native.conv2d, conv2d_input and conv2d_weight: schemas, argument checks, CPU dispatch.
// LibTorch's stable ABI only: one binary serves every PyTorch from 2.10 on, and every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "conv2d_arguments.h"
#include "conv2d_check.h"

namespace atrous {
namespace {

using torch::headeronly::ScalarType;

bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::Half; }
Tensor to_type(const Tensor& t, ScalarType type) { return torch::stable::to(t, type); }

// The CPU has no half-precision arithmetic worth the name: float16 is computed in float32 and rounded once.
Tensor conv2d_packed_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& packed,
                         const std::optional<Tensor>& bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups) {
  const Conv2dArguments a = check_forward(input, weight, bias, stride, padding, dilation, groups);
  if (is_half(input)) {
    const auto wide_bias = bias ? std::optional<Tensor>(to_type(*bias, ScalarType::Float)) : std::nullopt;
    return to_type(conv2d_packed_cpu(to_type(input, ScalarType::Float), to_type(weight, ScalarType::Float), packed,
                                     wide_bias, stride, padding, dilation, groups),
                   ScalarType::Half);
  }
  const void* ready = packed_of(packed, a, input);
  Tensor output = empty(a.output, input, either_channels_last(input, weight));
  if (output.numel() == 0) return output;
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  cpu::conv2d(shape_of(a), dtype_of(input), read(input), read(weight), ready, bias ? dense_bias->const_data_ptr() : nullptr,
              write(output));
  return output;
}

Tensor conv2d_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  return conv2d_packed_cpu(input, weight, std::nullopt, bias, stride, padding, dilation, groups);
}

// In the order of the kernels, for float32, float64 and bfloat16.
Tensor pack_weight_cpu(const Tensor& weight, int64_t groups) {
  const Sizes size = sizes_of(weight);
  check_four("weight", size);
  // The order depends on the weight alone; any image that the kernel fits does.
  const Conv2dArguments a =
      check_geometry({1, size[1] * groups, size[2], size[3]}, size, {1, 1}, {0, 0}, {1, 1}, groups);
  const cpu::Conv2dShape shape = shape_of(a);
  Tensor packed = torch::stable::empty({cpu::packed_conv2d_weight_bytes(shape, dtype_of(weight))}, ScalarType::Byte,
                                       std::nullopt, weight.device(), std::nullopt, std::nullopt);
  if (packed.numel() > 0) cpu::pack_conv2d_weight(shape, dtype_of(weight), read(weight), packed.mutable_data_ptr());
  return packed;
}

Tensor conv2d_input_cpu(std::vector<int64_t> input_size, const Tensor& weight, const Tensor& grad_output,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        int64_t groups) {
  const Conv2dArguments a = check_input_gradient(input_size, weight, grad_output, stride, padding, dilation, groups);
  if (is_half(weight))
    return to_type(conv2d_input_cpu(input_size, to_type(weight, ScalarType::Float), to_type(grad_output, ScalarType::Float),
                                    stride, padding, dilation, groups),
                   ScalarType::Half);
  Tensor grad_input = empty(a.input, weight, either_channels_last(weight, grad_output));
  if (grad_input.numel() > 0)
    cpu::conv2d_input(shape_of(a), dtype_of(weight), read(weight), read(grad_output), write(grad_input));
  return grad_input;
}

Tensor conv2d_weight_cpu(const Tensor& input, std::vector<int64_t> weight_size, const Tensor& grad_output,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups) {
  const Conv2dArguments a = check_weight_gradient(input, weight_size, grad_output, stride, padding, dilation, groups);
  if (is_half(input))
    return to_type(conv2d_weight_cpu(to_type(input, ScalarType::Float), weight_size, to_type(grad_output, ScalarType::Float),
                                     stride, padding, dilation, groups),
                   ScalarType::Half);
  Tensor grad_weight = empty(a.weight, input, either_channels_last(input, grad_output));
  if (grad_weight.numel() > 0)
    cpu::conv2d_weight(shape_of(a), dtype_of(input), read(input), read(grad_output), write(grad_weight));
  return grad_weight;
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY(atrous_native, m) {
#define ATROUS_GEOMETRY "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
  m.def("conv2d(Tensor input, Tensor weight, Tensor? bias, " ATROUS_GEOMETRY);
  m.def("conv2d_packed(Tensor input, Tensor weight, Tensor? packed, Tensor? bias, " ATROUS_GEOMETRY);
  m.def("pack_weight(Tensor weight, int groups) -> Tensor");
  m.def("conv2d_input(int[] input_size, Tensor weight, Tensor grad_output, " ATROUS_GEOMETRY);
  m.def("conv2d_weight(Tensor input, int[] weight_size, Tensor grad_output, " ATROUS_GEOMETRY);
  m.def("conv2d_tensor_core(Tensor input, Tensor weight, Tensor? bias, " ATROUS_GEOMETRY);  // these three on CUDA only
  m.def("conv2d_input_tensor_core(int[] input_size, Tensor weight, Tensor grad_output, " ATROUS_GEOMETRY);
  m.def("conv2d_weight_tensor_core(Tensor input, int[] weight_size, Tensor grad_output, " ATROUS_GEOMETRY);
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&atrous::conv2d_cpu));
  m.impl("conv2d_packed", TORCH_BOX(&atrous::conv2d_packed_cpu));
  m.impl("pack_weight", TORCH_BOX(&atrous::pack_weight_cpu));
  m.impl("conv2d_input", TORCH_BOX(&atrous::conv2d_input_cpu));
  m.impl("conv2d_weight", TORCH_BOX(&atrous::conv2d_weight_cpu));
}
