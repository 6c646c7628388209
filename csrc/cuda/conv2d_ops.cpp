// torch.ops.atrous_native.conv2d, conv2d_input and conv2d_weight on CUDA tensors, through LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "binding.h"
#include "conv2d.h"
#include "conv2d_tensor_core.h"

namespace atrous::cuda {
namespace {

Conv2dShape shape_of(const Conv2dArguments& a) {
  Conv2dShape s{};
  s.batch = a.input[0], s.in_channels = a.input[1], s.in_h = a.input[2], s.in_w = a.input[3];
  s.out_channels = a.output[1], s.out_h = a.output[2], s.out_w = a.output[3];
  s.kernel_h = a.weight[2], s.kernel_w = a.weight[3];
  s.stride_h = a.stride[0], s.stride_w = a.stride[1];
  s.padding_h = a.padding[0], s.padding_w = a.padding[1];
  s.dilation_h = a.dilation[0], s.dilation_w = a.dilation[1];
  s.groups = a.groups;
  return s;
}

Tensor conv2d_op(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Sizes& stride,
                 const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Conv2dArguments arguments = check_forward(input, weight, bias, stride, padding, dilation, groups);
  const Conv2dShape shape = shape_of(arguments);
  const DType dtype = dtype_of(input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
  const Tensor output = empty(arguments.output, input, either_channels_last(input, weight));
  const auto run = is_depthwise(shape) ? depthwise_conv2d : conv2d;
  run(shape, dtype, read(input), read(weight), bias ? dense_bias.const_data_ptr() : nullptr, write(output),
      current_stream(input));
  return output;
}

Tensor conv2d_input_op(const Sizes& input_size, const Tensor& weight, const Tensor& grad_output, const Sizes& stride,
                       const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Conv2dShape shape =
      shape_of(check_input_gradient(input_size, weight, grad_output, stride, padding, dilation, groups));
  const DType dtype = dtype_of(weight);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor grad_input = empty(input_size, weight, either_channels_last(weight, grad_output));
  const auto run = is_depthwise(shape) ? depthwise_conv2d_input : conv2d_input;
  run(shape, dtype, read(weight), read(grad_output), write(grad_input), current_stream(weight));
  return grad_input;
}

Tensor conv2d_weight_op(const Tensor& input, const Sizes& weight_size, const Tensor& grad_output, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Conv2dShape shape =
      shape_of(check_weight_gradient(input, weight_size, grad_output, stride, padding, dilation, groups));
  const DType dtype = dtype_of(input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor grad_weight = empty(weight_size, input, either_channels_last(input, grad_output));
  const bool depthwise = is_depthwise(shape);
  const auto workspace_bytes = depthwise ? depthwise_conv2d_weight_workspace : conv2d_weight_workspace;
  const auto run = depthwise ? depthwise_conv2d_weight : conv2d_weight;
  const Tensor workspace = empty_of(Sizes{workspace_bytes(shape, dtype)}, ScalarType::Byte, input);
  run(shape, dtype, read(input), read(grad_output), write(grad_weight), workspace.mutable_data_ptr(),
      current_stream(input));
  return grad_weight;
}

// On the tensor cores: channels-last data in whole vectors, results channels-last; float32 is multiplied in TF32.

void check_vectors(const char* name, const Tensor& t) {
  const Sizes size = sizes_of(t);
  if (size[0] * size[2] * size[3] == 0 || has_whole_vectors(read(t), dtype_of(t), size[0], size[1], size[2], size[3])) return;
  std::string at = "[";
  for (int64_t i = 0; i < 4; ++i) at += (i > 0 ? ", " : "") + std::to_string(t.stride(i));
  fail(name, "expected channels-last data in whole vectors of 16 bytes, 16-byte aligned, but got sizes ", text(size),
       " with strides ", at, "] at ", t.const_data_ptr());
}

void check_tensor_core(const Conv2dShape& shape, DType dtype) {
  if (shape.groups != 1) fail("groups", "expected 1 on the tensor cores, but got ", shape.groups);
  if (dtype == DType::float64) fail("dtype", "expected float32, float16 or bfloat16 on the tensor cores, but got float64");
}

Tensor conv2d_tensor_core_op(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Sizes& stride,
                             const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Conv2dArguments arguments = check_forward(input, weight, bias, stride, padding, dilation, groups);
  const Conv2dShape shape = shape_of(arguments);
  const DType dtype = dtype_of(input);
  check_tensor_core(shape, dtype);
  check_vectors("input", input);
  check_vectors("weight", weight);
  const DeviceGuard guard(input.get_device_index());
  const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
  const Tensor output = empty(arguments.output, input, true);
  conv2d_tensor_core(shape, dtype, read(input), read(weight), bias ? dense_bias.const_data_ptr() : nullptr, write(output),
                     current_stream(input));
  return output;
}

Tensor conv2d_input_tensor_core_op(const Sizes& input_size, const Tensor& weight, const Tensor& grad_output,
                                   const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Conv2dShape shape =
      shape_of(check_input_gradient(input_size, weight, grad_output, stride, padding, dilation, groups));
  const DType dtype = dtype_of(weight);
  check_tensor_core(shape, dtype);
  check_vectors("weight", weight);
  check_vectors("grad_output", grad_output);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor grad_input = empty(input_size, weight, true);
  conv2d_input_tensor_core(shape, dtype, read(weight), read(grad_output), write(grad_input), current_stream(weight));
  return grad_input;
}

Tensor conv2d_weight_tensor_core_op(const Tensor& input, const Sizes& weight_size, const Tensor& grad_output,
                                    const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Conv2dShape shape =
      shape_of(check_weight_gradient(input, weight_size, grad_output, stride, padding, dilation, groups));
  const DType dtype = dtype_of(input);
  check_tensor_core(shape, dtype);
  check_vectors("input", input);
  check_vectors("grad_output", grad_output);
  const DeviceGuard guard(input.get_device_index());
  const Tensor grad_weight = empty(weight_size, input, true);
  const Tensor workspace = empty_of(Sizes{conv2d_weight_tensor_core_workspace(shape)}, ScalarType::Byte, input);
  conv2d_weight_tensor_core(shape, dtype, read(input), read(grad_output), write(grad_weight),
                            workspace.mutable_data_ptr(), current_stream(input));
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATROUS_NAMESPACE, ATROUS_DISPATCH_KEY, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_op));
  m.impl("conv2d_input", TORCH_BOX(&conv2d_input_op));
  m.impl("conv2d_weight", TORCH_BOX(&conv2d_weight_op));
  m.impl("conv2d_tensor_core", TORCH_BOX(&conv2d_tensor_core_op));
  m.impl("conv2d_input_tensor_core", TORCH_BOX(&conv2d_input_tensor_core_op));
  m.impl("conv2d_weight_tensor_core", TORCH_BOX(&conv2d_weight_tensor_core_op));
}

}  // namespace atrous::cuda
