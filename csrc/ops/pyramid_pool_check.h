// Argument checks of the pyramid pooling ops, shared by every device.
#pragma once

#include <limits>

#include "conv2d_check.h"

namespace atrous {

// The sizes [batch, bins of all levels, channels] of the result.
inline Sizes check_pyramid(const Sizes& input, const Sizes& bins) {
  check_four("input", input);
  for (int i = 1; i < 4; ++i)
    if (input[i] < 1) fail("input", "expected at least 1 channel and 1x1 pixels, but got sizes ", text(input));
  if (input[2] * input[3] > std::numeric_limits<int32_t>::max())
    fail("input", "expected fewer than 2^31 pixels per plane, but got sizes ", text(input));
  if (bins.empty() || bins.size() % 2 != 0) fail("bins", "expected pairs (rows, columns), but got ", text(bins));
  for (const int64_t bin : bins)
    if (bin < 1) fail("bins", "expected values of at least 1, but got ", text(bins));
  int64_t cells = 0;
  for (size_t i = 0; i < bins.size(); i += 2) cells += bins[i] * bins[i + 1];
  return {input[0], cells, input[1]};
}

inline void check_pyramid_gradient(const Tensor& grad, const Tensor& index, const Sizes& input_size, const Sizes& bins,
                                   bool maximum) {
  const Sizes sizes = check_pyramid(input_size, bins);
  if (sizes_of(grad) != sizes) fail("grad", "expected sizes ", text(sizes), ", but got ", text(sizes_of(grad)));
  if (maximum && (index.scalar_type() != torch::headeronly::ScalarType::Long || sizes_of(index) != sizes))
    fail("index", "expected int64 of sizes ", text(sizes), ", but got ", text(sizes_of(index)));
  if (maximum && (index.is_cpu() != grad.is_cpu() || index.get_device_index() != grad.get_device_index()))
    fail("index", "expected to be on the same device as grad");
}

}  // namespace atrous
