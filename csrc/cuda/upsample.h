// Sizes of the losses and class maps taken at an upsampled resolution. No framework types, no CUDA headers.
#pragma once

#include "tensor.h"

namespace atrous::cuda {

struct UpsampleShape {
  int64_t batch, classes, in_h, in_w, out_h, out_w;
  bool align_corners;
};

}  // namespace atrous::cuda
