// From a convolution to correlations.
#include "conv2d.h"

#include <algorithm>

#include "correlate.h"
#include "runtime.h"
#include "winograd.h"

namespace atrous::cpu {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The same taps from last to first, so that they read the source in ascending order.
void reverse(Axis& axis, int64_t& weight_tap, int64_t& weight_offset) {
  weight_offset += std::max<int64_t>(axis.taps - 1, 0) * weight_tap;
  weight_tap = -weight_tap;
  axis.src_offset += std::max<int64_t>(axis.taps - 1, 0) * axis.tap_step;
  axis.tap_step = -axis.tap_step;
}

void correlate(const Correlation& job, DType dtype, bool depthwise) {
  depthwise ? depthwise_correlate(job, dtype) : dense_correlate(job, dtype);
}

Correlation forward_job(const Conv2dShape& s, ConstTensor input, ConstTensor weight, const void* bias,
                        MutableTensor output) {
  Correlation job{};
  job.batch = s.batch;
  job.groups = s.groups;
  job.src_channels = s.in_channels / s.groups;
  job.dst_channels = s.out_channels / s.groups;
  job.h = forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  job.w = forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  job.src = input;
  job.dst = output;
  job.weight = weight.data;
  job.weight_group = job.dst_channels * weight.strides.n;
  job.weight_dst = weight.strides.n;
  job.weight_src = weight.strides.c;
  job.weight_tap_h = weight.strides.h;
  job.weight_tap_w = weight.strides.w;
  job.bias = bias;
  return job;
}

// The input gradient at the input positions that are equal to (row, column) modulo the stride.
Correlation input_gradient_job(const Conv2dShape& s, DType dtype, ConstTensor weight, ConstTensor grad_output,
                               MutableTensor grad_input, int64_t row, int64_t column) {
  const int64_t size = element_size(dtype);
  const InputGradAxis h = input_grad_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h, row);
  const InputGradAxis w = input_grad_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w, column);
  const Strides& to = grad_input.strides;
  const Strides& by = weight.strides;
  Correlation job{};
  job.batch = s.batch;
  job.groups = s.groups;
  job.src_channels = s.out_channels / s.groups;
  job.dst_channels = s.in_channels / s.groups;
  job.h = h.axis;
  job.w = w.axis;
  job.src = grad_output;
  job.dst.data = static_cast<char*>(grad_input.data) + (row * to.h + column * to.w) * size;
  job.dst.strides = {to.n, to.c, to.h * s.stride_h, to.w * s.stride_w};
  job.weight_group = job.src_channels * by.n;
  job.weight_dst = by.c;
  job.weight_src = by.n;
  job.weight_tap_h = by.h * h.tap_stride;
  job.weight_tap_w = by.w * w.tap_stride;
  int64_t first = h.first_tap * by.h + w.first_tap * by.w;
  reverse(job.h, job.weight_tap_h, first);
  reverse(job.w, job.weight_tap_w, first);
  job.weight = static_cast<const char*>(weight.data) + first * size;
  return job;
}

Correlation winograd_job(const WinogradShape& s, ConstTensor src, ConstTensor weight, const void* bias, MutableTensor dst) {
  return s.input_gradient ? input_gradient_job(s.conv, DType::float32, weight, src, dst, 0, 0)
                          : forward_job(s.conv, src, weight, bias, dst);
}

}  // namespace

void conv2d(const Conv2dShape& s, DType dtype, ConstTensor input, ConstTensor weight, const void* packed,
            const void* bias, MutableTensor output, const Finish& finish, const Statistics& statistics) {
  Correlation job = forward_job(s, input, weight, bias, output);
  job.packed = packed;
  job.finish = finish;
  job.statistics = statistics;
  correlate(job, dtype, is_depthwise(s));
}

bool adds_residual(const Conv2dShape& s, DType dtype, MutableTensor output) {
  const MatmulKernels& mm = dtype == DType::float64 ? kernels().matmul_f64 : kernels().matmul_f32;
  return dtype != DType::bfloat16 && !is_depthwise(s) && output.strides.c == 1 && s.out_channels / s.groups % mm.lanes == 0;
}

int64_t packed_conv2d_weight_bytes(const Conv2dShape& s, DType dtype) {
  return packed_weight_bytes(forward_job(s, {}, {}, nullptr, {}), dtype);
}

void pack_conv2d_weight(const Conv2dShape& s, DType dtype, ConstTensor weight, void* packed) {
  pack_dense_weight(forward_job(s, {}, weight, nullptr, {}), dtype, packed);
}

void conv2d_input(const Conv2dShape& s, DType dtype, ConstTensor weight, ConstTensor grad_output,
                  MutableTensor grad_input) {
  for (int64_t row = 0; row < s.stride_h && row < s.in_h; ++row)
    for (int64_t column = 0; column < s.stride_w && column < s.in_w; ++column)
      correlate(input_gradient_job(s, dtype, weight, grad_output, grad_input, row, column), dtype, is_depthwise(s));
}

void conv2d_weight(const Conv2dShape& s, DType dtype, ConstTensor input, ConstTensor grad_output,
                   MutableTensor grad_weight) {
  is_depthwise(s) ? depthwise_weight_gradient(s, dtype, input, grad_output, grad_weight)
                  : dense_weight_gradient(s, dtype, input, grad_output, grad_weight);
}

int64_t winograd_weight_elements(const WinogradShape& shape) {
  return winograd_weight_elements(winograd_job(shape, {}, {}, nullptr, {}), shape.tile);
}

void winograd_weight(const WinogradShape& shape, ConstTensor weight, float* transformed) {
  winograd_weight(winograd_job(shape, {}, weight, nullptr, {}), shape.tile, transformed);
}

void conv2d_winograd(const WinogradShape& shape, ConstTensor src, ConstTensor weight, const float* transformed,
                     const void* bias, MutableTensor dst, const Finish& finish, const Statistics& statistics) {
  Correlation job = winograd_job(shape, src, weight, bias, dst);
  job.finish = finish;
  job.statistics = statistics;
  winograd_correlate(job, shape.tile, transformed);
}

void conv2d_weight_winograd(const WinogradShape& shape, ConstTensor input, ConstTensor grad_output,
                            MutableTensor grad_weight) {
  winograd_weight_gradient(shape.conv, shape.tile, input, grad_output, grad_weight);
}

}  // namespace atrous::cpu
