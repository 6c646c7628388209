// torch.ops.atrous_native.upsample_argmax: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/upsample_argmax.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "upsample_check.h"

namespace atrous {
namespace {

Tensor upsample_argmax_cpu(const Tensor& logits, std::vector<int64_t> size, bool align_corners) {
  const Sizes in = check_upsampled(logits);
  check_pair("size", size, 0);
  Tensor out = empty_of(Sizes{in[0], size[0], size[1]}, ScalarType::Long, logits);
  if (out.numel() > 0)
    cpu::upsample_argmax({in[0], in[1], in[2], in[3], size[0], size[1], align_corners},
                         logits.scalar_type() == ScalarType::Double ? cpu::DType::float64 : cpu::DType::float32,
                         {logits.const_data_ptr(), {logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3)}},
                         static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("upsample_argmax(Tensor logits, int[] size, bool align_corners) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) { m.impl("upsample_argmax", TORCH_BOX(&atrous::upsample_argmax_cpu)); }
