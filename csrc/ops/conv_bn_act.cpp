// torch.ops.atrous_native.conv_bn_act: convolution whose sums are normalised by constant statistics, added to a residual and
// activated before they are written. The op around it is ops/conv_bn_act.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "conv2d_arguments.h"
#include "conv2d_check.h"

namespace atrous {
namespace {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

// scale = weight / sqrt(var + eps) and shift = bias - mean * scale, one after the other.
template <class T>
std::vector<T> constants(int64_t channels, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var,
                         double eps) {
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto values = [&](const char* name, const Tensor& t) {
    if (t.scalar_type() != type || t.numel() != channels || !t.is_contiguous())
      fail(name, "expected ", channels, sizeof(T) == 8 ? " contiguous float64" : " contiguous float32", " values");
    return static_cast<const T*>(t.const_data_ptr());
  };
  const T *by = weight ? values("bn_weight", *weight) : nullptr, *add = bias ? values("bn_bias", *bias) : nullptr;
  const T *center = values("mean", mean), *spread = values("var", var);
  std::vector<T> both(static_cast<size_t>(2 * channels));
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = (by ? static_cast<double>(by[c]) : 1.0) / std::sqrt(static_cast<double>(spread[c]) + eps);
    both[c] = static_cast<T>(scale);
    both[channels + c] = static_cast<T>((add ? static_cast<double>(add[c]) : 0.0) - static_cast<double>(center[c]) * scale);
  }
  return both;
}

Tensor conv_bn_act_cpu(const Tensor& input, const Tensor& weight, const Optional& prepared, const Optional& bn_weight,
                       const Optional& bn_bias, const Tensor& mean, const Tensor& var, double eps, const Optional& residual,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                       int64_t groups, double low, double high, int64_t tile) {
  const Conv2dArguments a = check_forward(input, weight, std::nullopt, stride, padding, dilation, groups);
  const int64_t channels = a.weight[0];
  std::vector<float> narrow;
  std::vector<double> wide;
  cpu::Finish finish{nullptr, nullptr, low, high, 0};
  if (dtype_of(input) == cpu::DType::float64) {
    wide = constants<double>(channels, bn_weight, bn_bias, mean, var, eps);
    finish.scale = wide.data(), finish.shift = wide.data() + channels;
  } else {
    narrow = constants<float>(channels, bn_weight, bn_bias, mean, var, eps);
    finish.scale = narrow.data(), finish.shift = narrow.data() + channels;
  }
  Tensor output = empty(a.output, input, either_channels_last(input, weight));
  if (output.numel() == 0) return output;
  if (residual) {
    check_alike("residual", *residual, "input", input);
    bool alike = sizes_of(*residual) == a.output;
    for (int dim = 0; alike && dim < 4; ++dim)  // where there is one index, its stride says nothing
      alike = a.output[dim] == 1 || residual->stride(dim) == output.stride(dim);
    if (!alike || !cpu::adds_residual(shape_of(a), dtype_of(input), write(output)) || tile != 0)
      fail("residual", "expected float32 or float64 sizes ", text(a.output),
           " in channels_last, channels in whole vectors, of a direct convolution, but got sizes ", text(sizes_of(*residual)));
    finish.residual = static_cast<const char*>(residual->const_data_ptr()) - static_cast<char*>(output.mutable_data_ptr());
  }
  if (tile != 0) {
    const cpu::WinogradShape shape = check_winograd(a, input, tile, false);
    cpu::conv2d_winograd(shape, read(input), read(weight), transformed_of(prepared, shape), nullptr, write(output), finish);
  } else {
    cpu::conv2d(shape_of(a), dtype_of(input), read(input), read(weight), packed_of(prepared, a, input), nullptr,
                write(output), finish);
  }
  return output;
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  // prepared: by pack_weight, or by winograd_weight for this tile; tile: 0 for the direct kernels.
  m.def("conv_bn_act(Tensor input, Tensor weight, Tensor? prepared, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, "
        "Tensor var, float eps, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, float low, "
        "float high, int tile) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) { m.impl("conv_bn_act", TORCH_BOX(&atrous::conv_bn_act_cpu)); }
