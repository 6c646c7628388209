// torch.ops.atrous_native.upsample_cross_entropy: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/upsample_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "upsample_check.h"

namespace atrous {
namespace {

// Pixel losses [N, H, W] (empty unless asked for), the gradient of their sum (likewise), and two sums over the labelled
// pixels in float64: the losses, and scale times the weight of the label.
std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_cpu(const Tensor& logits, const Tensor& target, const Tensor& weight,
                                                              const std::optional<Tensor>& scale, int64_t ignore_index,
                                                              double label_smoothing, bool align_corners, bool per_pixel,
                                                              bool with_gradient) {
  check_upsample_loss(logits, target, weight, scale);
  const Sizes in = sizes_of(logits), out = sizes_of(target);
  const Tensor labels = torch::stable::contiguous(target), weights = torch::stable::contiguous(weight);
  const Tensor scales = scale ? torch::stable::contiguous(*scale) : Tensor();
  Tensor loss = empty(per_pixel ? out : Sizes{0}, logits, false);
  Tensor gradient = empty(with_gradient ? in : Sizes{0}, logits, with_gradient && is_channels_last(logits));
  Tensor sums = empty_of(Sizes{2}, ScalarType::Double, logits);
  const auto strides = [](const Tensor& t) { return cpu::Strides{t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; };
  const cpu::UpsampleCrossEntropy job{
      {in[0], in[1], in[2], in[3], out[1], out[2], align_corners},
      logits.scalar_type() == ScalarType::Double ? cpu::DType::float64 : cpu::DType::float32,
      {logits.const_data_ptr(), strides(logits)},
      labels.const_data_ptr(),
      label_type_of<cpu::LabelType>(target),
      weights.const_data_ptr(),
      scale ? scales.const_data_ptr() : nullptr,
      ignore_index,
      label_smoothing,
      per_pixel ? loss.mutable_data_ptr() : nullptr,
      with_gradient ? cpu::MutableTensor{gradient.mutable_data_ptr(), strides(gradient)} : cpu::MutableTensor{},
      static_cast<double*>(sums.mutable_data_ptr())};
  int64_t bad_label = 0;
  if (!cpu::upsample_cross_entropy(job, bad_label))
    fail("target", "expected classes 0 to ", in[1] - 1, " or ignore_index=", ignore_index, ", but got ", bad_label);
  return {loss, gradient, sums};
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("upsample_cross_entropy(Tensor logits, Tensor target, Tensor weight, Tensor? scale, int ignore_index, "
        "float label_smoothing, bool align_corners, bool per_pixel, bool with_gradient) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&atrous::upsample_cross_entropy_cpu));
}
