// Pyramid pooling as functions of plain numbers and pointers: no framework types.
//
// Every sum has one order, fixed by the problem alone: the same arguments give the same bits for any number of threads.
#pragma once

#include "conv2d.h"

namespace atrous::cpu {

struct PyramidShape {
  int64_t batch, channels, height, width;
  const int64_t* bins;  // (rows, columns) of every level
  int64_t levels;

  int64_t cells() const {
    int64_t total = 0;
    for (int64_t i = 0; i < levels; ++i) total += bins[2 * i] * bins[2 * i + 1];
    return total;
  }
};

// A tensor, laid out as the input, whose leading channels become a copy of it. Null data: no copy.
struct CopyOfInput {
  void* data;
  int64_t channels;
};

// Input dense NCHW or NHWC. Output [batch, cells, channels], level by level; index alike, or null for the average.
void pyramid_pool(const PyramidShape& shape, DType dtype, ConstTensor input, bool channels_last, void* output, int64_t* index,
                  CopyOfInput copy = {nullptr, 0});

// Gradients of the two with respect to the input, dense NCHW or NHWC, from grad [batch, cells, channels].
void pyramid_pool_input(const PyramidShape& shape, DType dtype, const void* grad, const int64_t* index,
                        MutableTensor grad_input, bool channels_last);

}  // namespace atrous::cpu
