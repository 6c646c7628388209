// Winograd's convolution on phase grids: fp32, 3x3, stride 1, any rate. Driver for forward pass and input gradient.
#pragma once

#include "correlate.h"

namespace atrous::cpu {

// Elements of the transformed weights of all groups.
int64_t winograd_weight_elements(const Correlation& job, int64_t tile);

// Transforms the weights of `job`, whose source and destination are not looked at.
void winograd_weight(const Correlation& job, int64_t tile, float* transformed);

// The correlation, for tiles of tile x tile written pixels (2 to 4); transformed weights, or null to transform them here.
void winograd_correlate(const Correlation& job, int64_t tile, const float* transformed);

void winograd_weight_gradient(const Conv2dShape& shape, int64_t tile, ConstTensor input, ConstTensor grad_output,
                              MutableTensor grad_weight);

}  // namespace atrous::cpu
