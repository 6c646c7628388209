// What the two layouts of depthwise convolution share.
#pragma once

#include <algorithm>
#include <vector>

#include "correlate.h"
#include "typed.h"

namespace atrous::cpu {

void depthwise_correlate_nhwc(const Correlation& job, DType dtype);
void depthwise_weight_gradient_nhwc(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                                    MutableTensor grad_weight);

// Depthwise loops wait for memory, so threads pay off at less arithmetic than threads_for assumes.
constexpr double memory_weight = 8;

inline Clamp clamp_of(const Correlation& job) { return {job.finish.scale != nullptr, job.finish.low, job.finish.high}; }

template <class S> Accumulator<S> scale_of(const Correlation& job, int64_t channel) {
  return job.finish.scale == nullptr ? 1 : static_cast<const Accumulator<S>*>(job.finish.scale)[channel];
}

// packed[tap * tap_step + channel * channel_step], times the scale of the finish: what is left of that is a bias and a clamp.
template <class S>
void pack_depthwise_weight(const Correlation& job, Accumulator<S>* packed, int64_t channel_step, int64_t tap_step) {
  for (int64_t i = 0; i < job.h.taps; ++i)
    for (int64_t j = 0; j < job.w.taps; ++j) {
      const S* from = static_cast<const S*>(job.weight) + i * job.weight_tap_h + j * job.weight_tap_w;
      Accumulator<S>* to = packed + (i * job.w.taps + j) * tap_step;
      for (int64_t c = 0; c < job.groups; ++c)
        to[c * channel_step] = convert_value<S, Accumulator<S>>(from[c * job.weight_group]) * scale_of<S>(job, c);
    }
}

template <class S> void pack_depthwise_bias(const Correlation& job, Accumulator<S>* packed) {
  for (int64_t c = 0; c < job.groups; ++c) {
    packed[c] = job.finish.shift == nullptr ? 0 : static_cast<const Accumulator<S>*>(job.finish.shift)[c];
    if (job.bias != nullptr)
      packed[c] += convert_value<S, Accumulator<S>>(static_cast<const S*>(job.bias)[c]) * scale_of<S>(job, c);
  }
}

}  // namespace atrous::cpu
