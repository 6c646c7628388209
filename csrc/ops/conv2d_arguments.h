// Checked arguments as the CPU convolutions take them.
#pragma once

#include <optional>

#include "conv2d_check.h"
#include "cpu/conv2d.h"

namespace atrous {

inline cpu::DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return cpu::DType::float32;
    case ScalarType::Double: return cpu::DType::float64;
    case ScalarType::BFloat16: return cpu::DType::bfloat16;
    default: break;
  }
  fail("dtype", "expected float32, float64, bfloat16 or float16, but got scalar type ",
       static_cast<int>(t.scalar_type()));
}

inline cpu::Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }
inline cpu::ConstTensor read(const Tensor& t) { return {t.const_data_ptr(), strides_of(t)}; }
inline cpu::MutableTensor write(const Tensor& t) { return {t.mutable_data_ptr(), strides_of(t)}; }

inline cpu::Conv2dShape shape_of(const Conv2dArguments& a) {
  return {a.input[0],    a.input[1],   a.input[2],   a.input[3],    a.output[1],   a.output[2],   a.output[3],
          a.weight[2],   a.weight[3],  a.stride[0],  a.stride[1],   a.padding[0],  a.padding[1],  a.dilation[0],
          a.dilation[1], a.groups};
}

// Weights prepared for Winograd's algorithm, or packed for the direct kernels; null where there are none.

inline cpu::WinogradShape check_winograd(const Conv2dArguments& a, const Tensor& like, int64_t tile, bool input_gradient) {
  if (tile < 2 || tile > 4) fail("tile", "expected 2, 3 or 4, but got ", tile);
  if (like.scalar_type() != torch::headeronly::ScalarType::Float)
    fail("dtype", "expected float32, but got scalar type ", static_cast<int>(like.scalar_type()));
  if (a.weight[2] != 3 || a.weight[3] != 3 || a.stride != Sizes{1, 1})
    fail("weight", "expected 3x3 and stride 1, but got sizes ", text(a.weight), " and stride ", text(a.stride));
  return {shape_of(a), tile, input_gradient};
}

inline const float* transformed_of(const std::optional<Tensor>& transformed, const cpu::WinogradShape& shape) {
  if (!transformed) return nullptr;
  const int64_t elements = cpu::winograd_weight_elements(shape);
  if (transformed->scalar_type() != torch::headeronly::ScalarType::Float || !transformed->is_contiguous() ||
      transformed->numel() != elements)
    fail("transformed", "expected ", elements, " contiguous float32 elements, but got sizes ",
         text(sizes_of(*transformed)));
  return static_cast<const float*>(transformed->const_data_ptr());
}

inline const void* packed_of(const std::optional<Tensor>& packed, const Conv2dArguments& a, const Tensor& like) {
  const cpu::Conv2dShape shape = shape_of(a);
  if (!packed || cpu::is_depthwise(shape)) return nullptr;
  const int64_t bytes = cpu::packed_conv2d_weight_bytes(shape, dtype_of(like));
  if (packed->scalar_type() != torch::headeronly::ScalarType::Byte || !packed->is_contiguous() || packed->numel() != bytes)
    fail("packed", "expected ", bytes, " contiguous bytes by pack_weight, but got sizes ", text(sizes_of(*packed)));
  return packed->const_data_ptr();
}

}  // namespace atrous
