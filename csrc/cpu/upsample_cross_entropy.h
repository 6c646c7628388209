// Cross-entropy of bilinearly upsampled logits, and its gradient, without the upsampled logits.
#pragma once

#include "upsample.h"

namespace atrous::cpu {

enum class LabelType { uint8, int32, int64 };

// loss = the sum over the labelled pixels (or each), times `scale`; gradient = that of the sum of the losses.
struct UpsampleCrossEntropy {
  UpsampleShape shape;
  DType dtype;             // float32 or float64: of logits, weight, scale, loss and gradient
  ConstTensor logits;      // any strides
  const void* labels;      // [N, H, W] contiguous
  LabelType label_type;
  const void* weight;      // [C]
  const void* scale;       // [N, H, W] contiguous, or null: 1
  int64_t ignore_index;
  double smoothing;
  void* pixel_loss;        // [N, H, W] contiguous, or null
  MutableTensor gradient;  // strides of a dense layout; data may be null
  double* sums;            // [2]: loss; sum over the labelled pixels of scale times the weight of the label
};

// False where a label is neither a class nor the ignored one; `bad_label` is then one of these, and the results are void.
bool upsample_cross_entropy(const UpsampleCrossEntropy& job, int64_t& bad_label);

}  // namespace atrous::cpu
