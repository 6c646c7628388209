// The recursive domain transform as functions of plain numbers and pointers: no framework types.
//
// Every sum has one order, fixed by the problem alone: the same arguments give the same bits for any number of threads.
#pragma once

#include "conv2d.h"

namespace atrous::cpu {

struct TransformShape {
  int64_t batch, channels, height, width;
  double sigma_s, sigma_r;
  int64_t iterations;
};

// Input and output dense, both NCHW or both NHWC. Edge [batch, 2, height, width], any strides: densities between horizontal and
// between vertical neighbours, at the second of the two. dtype: float32 or float64.
void domain_transform(const TransformShape& shape, DType dtype, const void* input, ConstTensor edge, void* output,
                      bool channels_last);

// Gradients of both from the output's, which is laid out as the input; grad_edge is contiguous.
void domain_transform_backward(const TransformShape& shape, DType dtype, const void* grad, const void* input, ConstTensor edge,
                               void* grad_input, void* grad_edge, bool channels_last);

}  // namespace atrous::cpu
