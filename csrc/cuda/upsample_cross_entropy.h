// Cross-entropy of bilinearly upsampled logits on CUDA, and its gradient, without the upsampled logits.
//
// No atomics; the same arguments give the same bits on every GPU. A failed launch throws std::runtime_error.
#pragma once

#include "upsample.h"

namespace atrous::cuda {

enum class LabelType { uint8, int32, int64 };

// loss = the sum over the labelled pixels (or each), times `scale`; gradient = that of the sum of the losses. A label that is
// neither a class nor the ignored one makes its pixel's loss and gradient NaN: a kernel cannot raise an error.
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
  MutableTensor gradient;  // data may be null
  double* sums;            // [2]: loss; sum over the labelled pixels of scale times the weight of the label
  void* workspace;         // upsample_cross_entropy_workspace bytes, 16-byte aligned
};

int64_t upsample_cross_entropy_workspace(const UpsampleShape& shape, DType dtype, bool with_gradient);
void upsample_cross_entropy(const UpsampleCrossEntropy& job, void* stream);

}  // namespace atrous::cuda
