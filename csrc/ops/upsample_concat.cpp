// torch.ops.atrous_native.upsample_concat: schema, argument checks, CPU dispatch.
#include <torch/csrc/stable/library.h>

#include "conv2d_arguments.h"
#include "cpu/upsample_concat.h"

namespace atrous {
namespace {

cpu::Level level_of(const Tensor& t) { return {t.const_data_ptr(), t.size(1), t.size(2), t.size(3)}; }

Tensor upsample_concat_cpu(const Tensor& input, std::vector<Tensor> levels, bool align_corners) {
  check_four("input", sizes_of(input));
  const bool channels_last = is_channels_last(input);
  const auto layout =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  int64_t channels = input.size(1);
  for (Tensor& level : levels) {
    check_four("levels", sizes_of(level));
    check_alike("levels", level, "input", input);
    if (level.size(0) != input.size(0) || level.size(2) < 1 || level.size(3) < 1)
      fail("levels", "expected ", input.size(0), " images of at least 1x1 pixels, but got sizes ", text(sizes_of(level)));
    level = torch::stable::contiguous(level, layout);
    channels += level.size(1);
  }
  Tensor output = empty({input.size(0), channels, input.size(2), input.size(3)}, input, channels_last);
  if (output.numel() == 0) return output;
  const Tensor x = torch::stable::contiguous(input, layout);
  std::vector<cpu::Level> plain;
  for (const Tensor& level : levels) plain.push_back(level_of(level));
  cpu::upsample_concat(dtype_of(input), channels_last, input.size(0), level_of(x), plain, align_corners,
                       output.mutable_data_ptr());
  return output;
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("upsample_concat(Tensor input, Tensor[] levels, bool align_corners) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) { m.impl("upsample_concat", TORCH_BOX(&atrous::upsample_concat_cpu)); }
