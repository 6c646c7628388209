// torch.ops.atrous_native.upsample_cross_entropy: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/upsample_cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "conv2d_check.h"

namespace atrous {
namespace {

using torch::headeronly::ScalarType;

cpu::LabelType label_type_of(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Byte: return cpu::LabelType::uint8;
    case ScalarType::Int: return cpu::LabelType::int32;
    case ScalarType::Long: return cpu::LabelType::int64;
    default: break;
  }
  fail("target", "expected uint8, int32 or int64, but got scalar type ", static_cast<int>(target.scalar_type()));
}

// Pixel losses [N, H, W] (empty unless asked for), the gradient of their sum (likewise), and two sums over the labelled
// pixels in float64: the losses, and scale times the weight of the label.
std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_cpu(const Tensor& logits, const Tensor& target, const Tensor& weight,
                                                              const std::optional<Tensor>& scale, int64_t ignore_index,
                                                              double label_smoothing, bool align_corners, bool per_pixel,
                                                              bool with_gradient) {
  check_four("logits", sizes_of(logits));
  const ScalarType dtype = logits.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail("logits", "expected float32 or float64, but got scalar type ", static_cast<int>(dtype));
  const Sizes in = sizes_of(logits), out = sizes_of(target);
  if (out.size() != 3 || out[0] != in[0])
    fail("target", "expected sizes [", in[0], ", H, W], but got ", text(out));
  if (in[1] < 1 || in[2] < 1 || in[3] < 1) fail("logits", "expected a class and a pixel at least, but got sizes ", text(in));
  check_alike("weight", weight, "logits", logits);
  if (sizes_of(weight) != Sizes{in[1]}) fail("weight", "expected sizes [", in[1], "], but got ", text(sizes_of(weight)));
  const Tensor labels = torch::stable::contiguous(target), weights = torch::stable::contiguous(weight);
  std::optional<Tensor> scales;
  if (scale) {
    check_alike("scale", *scale, "logits", logits);
    if (sizes_of(*scale) != out) fail("scale", "expected sizes ", text(out), ", but got ", text(sizes_of(*scale)));
    scales = torch::stable::contiguous(*scale);
  }

  Tensor loss = empty(per_pixel ? out : Sizes{0}, logits, false);
  Tensor gradient = empty(with_gradient ? in : Sizes{0}, logits, with_gradient && is_channels_last(logits));
  Tensor sums = torch::stable::empty(Sizes{2}, ScalarType::Double, std::nullopt, logits.device());
  const auto strides = [](const Tensor& t) { return cpu::Strides{t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; };
  const cpu::UpsampleCrossEntropy job{
      {in[0], in[1], in[2], in[3], out[1], out[2], align_corners},
      dtype == ScalarType::Double ? cpu::DType::float64 : cpu::DType::float32,
      {logits.const_data_ptr(), strides(logits)},
      labels.const_data_ptr(),
      label_type_of(target),
      weights.const_data_ptr(),
      scales ? scales->const_data_ptr() : nullptr,
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
