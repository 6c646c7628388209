// One correlation: what the forward pass is, and what the input gradient is per residue of the stride.
#pragma once

#include "conv2d.h"
#include "problem.h"

namespace atrous::cpu {

// dst[n, d, h, w] = finish(bias[d] + sum over s and valid taps of src[n, s, h', w'] * weight[d, s, tap]), per group.
struct Correlation {
  int64_t batch, groups;
  int64_t src_channels, dst_channels;  // per group
  Axis h, w;
  ConstTensor src;
  MutableTensor dst;
  const void* weight;  // at the first tap
  int64_t weight_group, weight_dst, weight_src, weight_tap_h, weight_tap_w;
  const void* bias;
  const void* packed;  // the weights by pack_dense_weight, or null
  Finish finish;       // of all groups' channels
  Statistics statistics;

  int64_t taps() const { return h.taps * w.taps; }
  double flops() const {
    return 2.0 * static_cast<double>(batch * h.n_out * w.n_out) *
           static_cast<double>(groups * src_channels * dst_channels * std::max<int64_t>(taps(), 1));
  }
};

void dense_correlate(const Correlation& job, DType dtype);

// The weights of all groups in the order of the kernels, for calls that share them. Looks at nothing else of the job.
int64_t packed_weight_bytes(const Correlation& job, DType dtype);
void pack_dense_weight(const Correlation& job, DType dtype, void* packed);

void depthwise_correlate(const Correlation& job, DType dtype);

void dense_weight_gradient(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                           MutableTensor grad_weight);
void depthwise_weight_gradient(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                               MutableTensor grad_weight);

}  // namespace atrous::cpu
