// torch.ops.atrous_native.upsample_cross_entropy on CUDA tensors, through LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "binding.h"
#include "ops/upsample_check.h"
#include "upsample_cross_entropy.h"

namespace atrous::cuda {
namespace {

// The results of the CPU's op of this name (csrc/ops/upsample_cross_entropy.cpp).
std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_op(const Tensor& logits, const Tensor& target,
                                                             const Tensor& weight, const std::optional<Tensor>& scale,
                                                             int64_t ignore_index, double label_smoothing,
                                                             bool align_corners, bool per_pixel, bool with_gradient) {
  check_upsample_loss(logits, target, weight, scale);
  const Sizes in = sizes_of(logits), out = sizes_of(target);
  const UpsampleShape shape{in[0], in[1], in[2], in[3], out[1], out[2], align_corners};
  const DType dtype = dtype_of(logits);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor labels = torch::stable::contiguous(target), weights = torch::stable::contiguous(weight);
  const Tensor scales = scale ? torch::stable::contiguous(*scale) : Tensor();
  const Tensor loss = empty(per_pixel ? out : Sizes{0}, logits, false);
  const Tensor gradient = empty(with_gradient ? in : Sizes{0}, logits, with_gradient && is_channels_last(logits));
  const Tensor sums = empty_of(Sizes{2}, ScalarType::Double, logits);
  const Tensor workspace =
      empty_of(Sizes{upsample_cross_entropy_workspace(shape, dtype, with_gradient)}, ScalarType::Byte, logits);
  upsample_cross_entropy({shape, dtype, read(logits), labels.const_data_ptr(), label_type_of<LabelType>(target),
                          weights.const_data_ptr(), scale ? scales.const_data_ptr() : nullptr, ignore_index,
                          label_smoothing, per_pixel ? loss.mutable_data_ptr() : nullptr,
                          with_gradient ? write(gradient) : MutableTensor{},
                          static_cast<double*>(sums.mutable_data_ptr()), workspace.mutable_data_ptr()},
                         current_stream(logits));
  return {loss, gradient, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATROUS_NAMESPACE, ATROUS_DISPATCH_KEY, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy_op));
}

}  // namespace atrous::cuda
