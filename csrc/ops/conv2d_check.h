// Argument checks of the convolution ops, shared by every device. A violation throws with the value and what was expected.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace atrous {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Parts> [[noreturn]] void fail(const std::string& argument, const Parts&... parts) {
  std::ostringstream message;
  message << "atrous_native: " << argument << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

inline Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// The sizes of one convolution, complete: [N, C, H, W] of input and output, [O, C / groups, KH, KW] of the weight.
struct Conv2dArguments {
  Sizes input, weight, output, stride, padding, dilation;
  int64_t groups;
};

inline void check_pair(const char* name, const Sizes& values, int64_t least) {
  if (values.size() != 2) fail(name, "expected 2 values (height, width), but got ", text(values));
  for (const int64_t value : values)
    if (value < least) fail(name, "expected values of at least ", least, ", but got ", text(values));
}

inline void check_four(const char* name, const Sizes& sizes) {
  if (sizes.size() != 4) fail(name, "expected 4 dimensions, but got sizes ", text(sizes));
  for (const int64_t size : sizes)
    if (size < 0) fail(name, "expected sizes of at least 0, but got ", text(sizes));
}

inline void check_alike(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  if (t.scalar_type() != other.scalar_type())
    fail(name, "expected the dtype of ", other_name, " (scalar type ", static_cast<int>(other.scalar_type()),
         "), but got scalar type ", static_cast<int>(t.scalar_type()));
  if (t.is_cpu() != other.is_cpu() || t.get_device_index() != other.get_device_index())
    fail(name, "expected to be on the same device as ", other_name);
}

// Checks everything that the sizes and the geometry decide, and derives the output's sizes.
inline Conv2dArguments check_geometry(const Sizes& input, const Sizes& weight, const Sizes& stride, const Sizes& padding,
                                      const Sizes& dilation, int64_t groups) {
  check_four("input", input);
  check_four("weight", weight);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  if (groups < 1) fail("groups", "expected at least 1, but got ", groups);
  if (weight[2] < 1 || weight[3] < 1) fail("weight", "expected a kernel of at least 1x1, but got sizes ", text(weight));
  if (input[1] != weight[1] * groups)
    fail("input", "expected ", weight[1] * groups, " channels for a weight of sizes ", text(weight), " and ", groups,
         " groups, but got sizes ", text(input));
  if (weight[0] % groups != 0)
    fail("weight", "expected a number of output channels divisible by ", groups, " groups, but got sizes ", text(weight));
  Conv2dArguments a{input, weight, {input[0], weight[0], 0, 0}, stride, padding, dilation, groups};
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = dilation[i] * (weight[2 + i] - 1) + 1, padded = input[2 + i] + 2 * padding[i];
    if (padded < reach)
      fail("input", "expected a padded extent of at least ", reach, " (kernel ", weight[2 + i], ", dilation ", dilation[i],
           "), but got ", padded, " from sizes ", text(input), " and padding ", text(padding));
    a.output[2 + i] = (padded - reach) / stride[i] + 1;
  }
  return a;
}

inline Conv2dArguments check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                     const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups) {
  check_alike("weight", weight, "input", input);
  const Conv2dArguments a = check_geometry(sizes_of(input), sizes_of(weight), stride, padding, dilation, groups);
  if (bias) {
    check_alike("bias", *bias, "input", input);
    if (sizes_of(*bias) != Sizes{a.weight[0]})
      fail("bias", "expected sizes [", a.weight[0], "], but got ", text(sizes_of(*bias)));
  }
  return a;
}

inline void check_grad_output(const Tensor& grad_output, const Conv2dArguments& a) {
  if (sizes_of(grad_output) != a.output)
    fail("grad_output", "expected the output's sizes ", text(a.output), ", but got ", text(sizes_of(grad_output)));
}

inline Conv2dArguments check_input_gradient(const Sizes& input_size, const Tensor& weight, const Tensor& grad_output,
                                            const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                            int64_t groups) {
  check_alike("grad_output", grad_output, "weight", weight);
  const Conv2dArguments a = check_geometry(input_size, sizes_of(weight), stride, padding, dilation, groups);
  check_grad_output(grad_output, a);
  return a;
}

inline Conv2dArguments check_weight_gradient(const Tensor& input, const Sizes& weight_size, const Tensor& grad_output,
                                             const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                             int64_t groups) {
  check_alike("grad_output", grad_output, "input", input);
  const Conv2dArguments a = check_geometry(sizes_of(input), weight_size, stride, padding, dilation, groups);
  check_grad_output(grad_output, a);
  return a;
}

// The framework's own rule for what counts as channels-last; ambiguous shapes count as contiguous.
inline bool is_channels_last(const Tensor& t) {
  if (t.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) == 0 || t.stride(dim) < least) return false;
    if (dim == 0 && least == t.stride(1)) return false;
    least = t.stride(dim) * t.size(dim);
  }
  return true;
}
inline bool either_channels_last(const Tensor& a, const Tensor& b) { return is_channels_last(a) || is_channels_last(b); }

// Uninitialised, of the dtype and device of `like`.
inline Tensor empty(const Sizes& sizes, const Tensor& like, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

inline Tensor empty_of(const Sizes& sizes, torch::headeronly::ScalarType type, const Tensor& like) {
  return torch::stable::empty(sizes, type, std::nullopt, like.device());
}

}  // namespace atrous
