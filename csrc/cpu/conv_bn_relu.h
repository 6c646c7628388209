// The passes of a batch normalisation with activation, as functions of plain numbers and pointers: no framework types.
//
// Sums have one order, fixed by the problem alone: the same arguments give the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace atrous::cpu {

struct NormShape {
  int64_t batch, channels, pixels;
  bool channels_last;  // dense NHWC, else dense NCHW
};

// Per channel, in the accumulator type: y = (x - mean) * scale + shift, held between low and high.
struct NormParameters {
  const void *mean, *scale, *shift;
  double low, high;
};

// mean and moment (sum of squared distances from the mean): [channels], accumulator type; zero without any element.
void norm_statistics(const NormShape& shape, DType dtype, const void* x, void* mean, void* moment);
// residual: added to y, or null. out may be x itself.
void norm_apply(const NormShape& shape, DType dtype, const NormParameters& parameters, const void* x, const void* residual,
                void* out);
// sum = sum of y's gradient, product = sum of y's gradient * (x - mean): [channels], accumulator type.
void norm_sums(const NormShape& shape, DType dtype, const NormParameters& parameters, const void* grad, const void* x,
               void* sum, void* product);
// out = scale * y's gradient + slope * (x - mean) + offset.
void norm_input_gradient(const NormShape& shape, DType dtype, const NormParameters& parameters, const void* slope,
                         const void* offset, const void* grad, const void* x, void* out);

}  // namespace atrous::cpu
