// torch.ops.atrous_native.upsample_argmax: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/upsample_argmax.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "conv2d_check.h"

namespace atrous {
namespace {

using torch::headeronly::ScalarType;

Tensor upsample_argmax_cpu(const Tensor& logits, std::vector<int64_t> size, bool align_corners) {
  const Sizes in = sizes_of(logits);
  check_four("logits", in);
  check_pair("size", size, 0);
  const ScalarType dtype = logits.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail("logits", "expected float32 or float64, but got scalar type ", static_cast<int>(dtype));
  if (in[1] < 1 || in[2] < 1 || in[3] < 1) fail("logits", "expected a class and a pixel at least, but got sizes ", text(in));
  Tensor out = torch::stable::empty(Sizes{in[0], size[0], size[1]}, ScalarType::Long, std::nullopt, logits.device());
  if (out.numel() > 0)
    cpu::upsample_argmax({in[0], in[1], in[2], in[3], size[0], size[1], align_corners},
                         dtype == ScalarType::Double ? cpu::DType::float64 : cpu::DType::float32,
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
