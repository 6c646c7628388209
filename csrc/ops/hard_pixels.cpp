// torch.ops.atrous_native.hard_pixels_: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/hard_pixels.h"

#include <torch/csrc/stable/library.h>

#include "upsample_check.h"

namespace atrous {
namespace {

void hard_pixels_cpu(const Tensor& loss, const Tensor& target, int64_t ignore_index, double fraction) {
  const ScalarType dtype = loss.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail("loss", "expected float32 or float64, but got scalar type ", static_cast<int>(dtype));
  if (!loss.is_contiguous()) fail("loss", "expected a contiguous tensor, but got sizes ", text(sizes_of(loss)), " with other strides");
  if (sizes_of(loss) != sizes_of(target))
    fail("loss", "expected the sizes of the target ", text(sizes_of(target)), ", but got ", text(sizes_of(loss)));
  if (!(fraction > 0 && fraction <= 1)) fail("fraction", "expected above 0, to 1, but got ", fraction);
  const Tensor labels = torch::stable::contiguous(target);
  cpu::hard_pixels(loss.mutable_data_ptr(), dtype == ScalarType::Double ? cpu::DType::float64 : cpu::DType::float32,
                   labels.const_data_ptr(), label_type_of<cpu::LabelType>(target), loss.numel(), ignore_index, fraction);
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("hard_pixels_(Tensor(a!) loss, Tensor target, int ignore_index, float fraction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) { m.impl("hard_pixels_", TORCH_BOX(&atrous::hard_pixels_cpu)); }
