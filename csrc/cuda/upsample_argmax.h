// The most likely class of every pixel of bilinearly upsampled logits, on CUDA.
#pragma once

#include "upsample.h"

namespace atrous::cuda {

// out: [N, H, W] contiguous; of equal logits the first class, a NaN above all. dtype: float32 or float64.
void upsample_argmax(const UpsampleShape& shape, DType dtype, ConstTensor logits, int64_t* out, void* stream);

}  // namespace atrous::cuda
