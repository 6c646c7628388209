// The most likely class of every pixel of bilinearly upsampled logits.
#pragma once

#include "upsample.h"

namespace atrous::cpu {

// out: [N, H, W] contiguous. dtype: float32 or float64.
void upsample_argmax(const UpsampleShape& shape, DType dtype, ConstTensor logits, int64_t* out);

}  // namespace atrous::cpu
