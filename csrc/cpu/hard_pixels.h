// The pixels with the largest losses, for online hard example mining.
#pragma once

#include <cstdint>

#include "upsample_cross_entropy.h"

namespace atrous::cpu {

// Of the counted pixels (label != ignore_index) the ceil(fraction * counted) with the largest loss become 1 in `loss`, all other
// pixels 0. NaN counts as infinity; among equal losses the first ones are taken. dtype: float32 or float64.
void hard_pixels(void* loss, DType dtype, const void* labels, LabelType label_type, int64_t pixels, int64_t ignore_index,
                 double fraction);

}  // namespace atrous::cpu
