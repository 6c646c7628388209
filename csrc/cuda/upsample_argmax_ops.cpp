// torch.ops.atrous_native.upsample_argmax on CUDA tensors, through LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include "binding.h"
#include "ops/upsample_check.h"
#include "upsample_argmax.h"

namespace atrous::cuda {
namespace {

Tensor upsample_argmax_op(const Tensor& logits, std::vector<int64_t> size, bool align_corners) {
  const Sizes in = check_upsampled(logits);
  check_pair("size", size, 0);
  const UpsampleShape shape{in[0], in[1], in[2], in[3], size[0], size[1], align_corners};
  const DeviceGuard guard(logits.get_device_index());
  const Tensor out = empty_of(Sizes{in[0], size[0], size[1]}, ScalarType::Long, logits);
  upsample_argmax(shape, dtype_of(logits), read(logits), static_cast<int64_t*>(out.mutable_data_ptr()),
                  current_stream(logits));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATROUS_NAMESPACE, ATROUS_DISPATCH_KEY, m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax_op));
}

}  // namespace atrous::cuda
