// The concatenation of a map with bilinearly upsampled smaller ones, as a function of plain numbers and pointers.
#pragma once

#include <vector>

#include "conv2d.h"

namespace atrous::cpu {

struct Level {
  const void* data;
  int64_t channels, height, width;
};

// Everything dense, in NHWC or all of it in NCHW: output [batch, channels + those of the levels, height, width]. The data of
// the input may be null: its slice is left as it is then.
void upsample_concat(DType dtype, bool channels_last, int64_t batch, const Level& input, const std::vector<Level>& levels,
                     bool align_corners, void* output);

}  // namespace atrous::cpu
