// The table of pyramid pooling by C++ type, for its drivers.
#pragma once

#include "conv2d.h"
#include "pyramid_pool_kernels.h"
#include "typed.h"

namespace atrous::cpu {

template <class T> const PyramidKernels<T>& pyramid_kernels() {
  const PyramidTable& all = table<PyramidTable>();
  if constexpr (std::is_same_v<T, double>) return all.f64;
  else if constexpr (std::is_same_v<T, bf16>) return all.b16;
  else return all.f32;
}

// body(zero of the storage type)
template <class Body> void with_type(DType dtype, const Body& body) {
  if (dtype == DType::float32) return body(float{});
  if (dtype == DType::float64) return body(double{});
  body(bf16{});
}

}  // namespace atrous::cpu
