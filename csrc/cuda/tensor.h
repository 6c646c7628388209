// Tensors as kernels' launchers take them: a pointer and element strides, no framework types, no CUDA headers.
#pragma once

#include <cstdint>

namespace atrous::cuda {

enum class DType : int64_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// Elements between neighbours along the dimensions [N, C, H, W], or [O, I/groups, KH, KW] for a weight.
struct Strides {
  int64_t n, c, h, w;
};

struct ConstTensor {
  const void* data;
  Strides strides;
};

struct MutableTensor {
  void* data;
  Strides strides;
};

}  // namespace atrous::cuda
