// Argument checks of the losses and class maps taken at an upsampled resolution, shared by every device.
#pragma once

#include <optional>

#include "conv2d_check.h"

namespace atrous {

using torch::headeronly::ScalarType;

// The sizes [N, C, h, w] of the logits.
inline Sizes check_upsampled(const Tensor& logits) {
  const Sizes in = sizes_of(logits);
  check_four("logits", in);
  const ScalarType dtype = logits.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail("logits", "expected float32 or float64, but got scalar type ", static_cast<int>(dtype));
  if (in[1] < 1 || in[2] < 1 || in[3] < 1) fail("logits", "expected a class and a pixel at least, but got sizes ", text(in));
  return in;
}

template <class LabelType> LabelType label_type_of(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Byte: return LabelType::uint8;
    case ScalarType::Int: return LabelType::int32;
    case ScalarType::Long: return LabelType::int64;
    default: break;
  }
  fail("target", "expected uint8, int32 or int64, but got scalar type ", static_cast<int>(target.scalar_type()));
}

inline void check_upsample_loss(const Tensor& logits, const Tensor& target, const Tensor& weight,
                                const std::optional<Tensor>& scale) {
  const Sizes in = check_upsampled(logits), out = sizes_of(target);
  if (out.size() != 3 || out[0] != in[0])
    fail("target", "expected sizes [", in[0], ", H, W], but got ", text(out));
  check_alike("weight", weight, "logits", logits);
  if (sizes_of(weight) != Sizes{in[1]}) fail("weight", "expected sizes [", in[1], "], but got ", text(sizes_of(weight)));
  if (!scale) return;
  check_alike("scale", *scale, "logits", logits);
  if (sizes_of(*scale) != out) fail("scale", "expected sizes ", text(out), ", but got ", text(sizes_of(*scale)));
}

}  // namespace atrous
