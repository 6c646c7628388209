// torch.ops.atrous_native.conv2d_statistics: convolution that takes mean and moment of its output while it writes it. The op
// around it is ops/conv2d_statistics.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "conv2d_arguments.h"
#include "conv2d_check.h"

namespace atrous {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor, Tensor> conv2d_statistics_cpu(const Tensor& input, const Tensor& weight,
                                                         const std::optional<Tensor>& prepared, std::vector<int64_t> stride,
                                                         std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                         int64_t groups, int64_t tile) {
  const Conv2dArguments a = check_forward(input, weight, std::nullopt, stride, padding, dilation, groups);
  const cpu::Conv2dShape shape = shape_of(a);
  if (cpu::is_depthwise(shape)) fail("groups", "expected a dense convolution, but got ", groups, " groups of one channel");
  const cpu::DType dtype = dtype_of(input);
  const ScalarType sums = dtype == cpu::DType::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor output = empty(a.output, input, either_channels_last(input, weight));
  const auto per_channel = [&] {
    Tensor values = torch::stable::empty({a.weight[0]}, sums, std::nullopt, input.device(), std::nullopt, std::nullopt);
    return torch::stable::fill_(values, 0);
  };
  Tensor mean = per_channel(), moment = per_channel();
  if (output.numel() == 0) return {output, mean, moment};
  const cpu::Statistics statistics{mean.mutable_data_ptr(), moment.mutable_data_ptr()};
  if (tile != 0) {
    const cpu::WinogradShape winograd = check_winograd(a, input, tile, false);
    cpu::conv2d_winograd(winograd, read(input), read(weight), transformed_of(prepared, winograd), nullptr, write(output), {},
                         statistics);
  } else {
    cpu::conv2d(shape, dtype, read(input), read(weight), packed_of(prepared, a, input), nullptr, write(output), {},
                statistics);
  }
  return {output, mean, moment};
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  // prepared and tile as in conv_bn_act.
  m.def("conv2d_statistics(Tensor input, Tensor weight, Tensor? prepared, int[] stride, int[] padding, int[] dilation, "
        "int groups, int tile) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) { m.impl("conv2d_statistics", TORCH_BOX(&atrous::conv2d_statistics_cpu)); }
