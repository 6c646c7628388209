// The CPU convolutions as functions of plain numbers and pointers: no framework types.
//
// Tensors come with element strides, so any layout is read and written as it is. Every element of the result is written,
// also where no tap is valid. Each sum has one order, fixed by the problem alone: the same arguments give the same bits
// for any number of threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace atrous::cpu {

enum class DType { float32, float64, bfloat16 };

// Elements between neighbours along [N, C, H, W], or [O, I / groups, KH, KW] for a weight.
struct Strides {
  int64_t n, c, h, w;
};
struct ConstTensor {
  const void* data;
  Strides strides;
};
struct MutableTensor {
  void* data;
  Strides strides;
};

struct Conv2dShape {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
};

inline bool is_depthwise(const Conv2dShape& s) {
  return s.groups > 1 && s.groups == s.in_channels && s.groups == s.out_channels;
}

// Of a convolution's output, taken while it is in a cache: mean and moment (sum of squared distances from the mean), out_channels
// values each in the type of the sums. Null: not wanted. Sums are taken as they are before they are rounded to bfloat16.
struct Statistics {
  void* mean = nullptr;
  void* moment = nullptr;
};

// bias: out_channels contiguous values of the same dtype, or null. packed: by pack_conv2d_weight, or null; not for
// depthwise convolution, whose weights are small. finish: out_channels values. statistics: not of depthwise convolution.
void conv2d(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor weight, const void* packed,
            const void* bias, MutableTensor output, const Finish& finish = {}, const Statistics& statistics = {});
// Whether finish.residual can be used: sums are written straight to their place, in whole vectors.
bool adds_residual(const Conv2dShape& shape, DType dtype, MutableTensor output);
int64_t packed_conv2d_weight_bytes(const Conv2dShape& shape, DType dtype);
void pack_conv2d_weight(const Conv2dShape& shape, DType dtype, ConstTensor weight, void* packed);

void conv2d_input(const Conv2dShape& shape, DType dtype, ConstTensor weight, ConstTensor grad_output,
                  MutableTensor grad_input);
void conv2d_weight(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                   MutableTensor grad_weight);

// The same by Winograd's algorithm (winograd.cpp), for float32, 3x3 and stride 1, with tiles of tile x tile written pixels,
// 2 to 4, as forward pass or as input gradient. The weights may have been transformed beforehand, for one of the two; else
// `transformed` is null.
struct WinogradShape {
  Conv2dShape conv;
  int64_t tile;
  bool input_gradient;
};
int64_t winograd_weight_elements(const WinogradShape& shape);
void winograd_weight(const WinogradShape& shape, ConstTensor weight, float* transformed);
void conv2d_winograd(const WinogradShape& shape, ConstTensor src, ConstTensor weight, const float* transformed,
                     const void* bias, MutableTensor dst, const Finish& finish = {}, const Statistics& statistics = {});
void conv2d_weight_winograd(const WinogradShape& shape, ConstTensor input, ConstTensor grad_output,
                            MutableTensor grad_weight);

}  // namespace atrous::cpu
