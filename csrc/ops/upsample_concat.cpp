// torch.ops.atrous_native.upsample_concat and upsample_into: schemas, argument checks, CPU dispatch.
#include <torch/csrc/stable/library.h>

#include "conv2d_arguments.h"
#include "cpu/upsample_concat.h"

namespace atrous {
namespace {

cpu::Level level_of(const Tensor& t) { return {t.const_data_ptr(), t.size(1), t.size(2), t.size(3)}; }

// The levels, dense in the layout of the concatenation that starts with `channels` channels of `like`; adds theirs to `channels`.
std::vector<Tensor> dense_levels(std::vector<Tensor> levels, const Tensor& like, bool channels_last, int64_t& channels) {
  const auto layout =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  for (Tensor& level : levels) {
    check_four("levels", sizes_of(level));
    check_alike("levels", level, "input", like);
    if (level.size(0) != like.size(0) || level.size(2) < 1 || level.size(3) < 1)
      fail("levels", "expected ", like.size(0), " images of at least 1x1 pixels, but got sizes ", text(sizes_of(level)));
    level = torch::stable::contiguous(level, layout);
    channels += level.size(1);
  }
  return levels;
}

std::vector<cpu::Level> plain(const std::vector<Tensor>& levels) {
  std::vector<cpu::Level> all;
  for (const Tensor& level : levels) all.push_back(level_of(level));
  return all;
}

Tensor upsample_concat_cpu(const Tensor& input, std::vector<Tensor> levels, bool align_corners) {
  check_four("input", sizes_of(input));
  const bool channels_last = is_channels_last(input);
  int64_t channels = input.size(1);
  const std::vector<Tensor> dense = dense_levels(std::move(levels), input, channels_last, channels);
  Tensor output = empty({input.size(0), channels, input.size(2), input.size(3)}, input, channels_last);
  if (output.numel() == 0) return output;
  const Tensor x = torch::stable::contiguous(
      input, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
  cpu::upsample_concat(dtype_of(input), channels_last, input.size(0), level_of(x), plain(dense), align_corners,
                       output.mutable_data_ptr());
  return output;
}

// The same into the channels of `output` after the leading ones, which pyramid_pool_copy has written.
void upsample_into_cpu(Tensor output, int64_t leading, std::vector<Tensor> levels, bool align_corners) {
  check_four("output", sizes_of(output));
  const bool channels_last = is_channels_last(output);
  int64_t channels = leading;
  const std::vector<Tensor> dense = dense_levels(std::move(levels), output, channels_last, channels);
  if (leading < 0 || channels != output.size(1))
    fail("levels", "expected ", output.size(1) - leading, " channels in all, but got ", channels - leading);
  if (output.numel() == 0) return;
  cpu::upsample_concat(dtype_of(output), channels_last, output.size(0), {nullptr, leading, output.size(2), output.size(3)},
                       plain(dense), align_corners, output.mutable_data_ptr());
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("upsample_concat(Tensor input, Tensor[] levels, bool align_corners) -> Tensor");
  m.def("upsample_into(Tensor(a!) output, int leading, Tensor[] levels, bool align_corners) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("upsample_concat", TORCH_BOX(&atrous::upsample_concat_cpu));
  m.impl("upsample_into", TORCH_BOX(&atrous::upsample_into_cpu));
}
