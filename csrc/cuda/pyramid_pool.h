// Pyramid pooling on CUDA as functions of plain numbers and pointers: no framework types, no CUDA headers.
//
// Tensors [N, C, H, W] may have any strides; bins lie in [batch, bins of all levels, channels], contiguous. No atomics;
// the same arguments give the same bits on every GPU. A failed launch throws std::runtime_error.
#pragma once

#include "tensor.h"

namespace atrous::cuda {

constexpr int max_levels = 16;

struct PyramidShape {
  int64_t batch, channels, height, width;
  const int64_t* bins;  // (rows, columns) of every level
  int64_t levels;       // at most max_levels
};

// The average, or with `index` the maximum and the pixel of the plane that it came from. workspace:
// pyramid_pool_workspace bytes, 16-byte aligned.
int64_t pyramid_pool_workspace(const PyramidShape& shape, DType dtype, bool maximum);
void pyramid_pool(const PyramidShape& shape, DType dtype, ConstTensor input, void* output, int64_t* index,
                  void* workspace, void* stream);

// The gradient of the average: writes every element of grad_input.
void pyramid_pool_average_input(const PyramidShape& shape, DType dtype, const void* grad, MutableTensor grad_input,
                                void* stream);

// The gradient of the maximum: adds nothing, but writes the pixels that are the maximum of a bin. The others have to be
// zero before. index: as pyramid_pool wrote it; a value outside the plane is skipped.
void pyramid_pool_maximum_input(const PyramidShape& shape, DType dtype, const void* grad, const int64_t* index,
                                MutableTensor grad_input, void* stream);

}  // namespace atrous::cuda
