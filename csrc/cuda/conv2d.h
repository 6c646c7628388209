// The CUDA convolutions as functions of plain numbers and pointers: no framework types, no CUDA headers.
//
// All tensors are described by element strides, so any layout works. Every function writes every element of its result
// exactly once (also where no tap is valid), uses no atomics and gives the same bits for the same arguments on every
// GPU: launch shapes depend on the problem only. A failed launch throws std::runtime_error.
#pragma once

#include "tensor.h"

namespace atrous::cuda {

struct Conv2dShape {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
};

// output = conv2d(input, weight) + bias. bias: out_channels contiguous values, or null.
void conv2d(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor weight, const void* bias,
            MutableTensor output, void* stream);

// The gradient of conv2d with respect to its input.
void conv2d_input(const Conv2dShape& shape, DType dtype, ConstTensor weight, ConstTensor grad_output,
                  MutableTensor grad_input, void* stream);

// The gradient of conv2d with respect to its weight. workspace: conv2d_weight_workspace bytes, 16-byte aligned.
int64_t conv2d_weight_workspace(const Conv2dShape& shape, DType dtype);
void conv2d_weight(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                   MutableTensor grad_weight, void* workspace, void* stream);

// The same three for one input channel per group (any number of output channels per group).
inline bool is_depthwise(const Conv2dShape& shape) { return shape.groups == shape.in_channels; }

void depthwise_conv2d(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor weight, const void* bias,
                      MutableTensor output, void* stream);
void depthwise_conv2d_input(const Conv2dShape& shape, DType dtype, ConstTensor weight, ConstTensor grad_output,
                            MutableTensor grad_input, void* stream);
int64_t depthwise_conv2d_weight_workspace(const Conv2dShape& shape, DType dtype);
void depthwise_conv2d_weight(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                             MutableTensor grad_weight, void* workspace, void* stream);

}  // namespace atrous::cuda
