// Checked arguments as the CPU convolutions take them.
#pragma once

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

}  // namespace atrous
