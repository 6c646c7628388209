// What every launcher needs: the size of a grid, and the C++ type behind a dtype.
#pragma once

#include <algorithm>

#include "device.h"
#include "tensor.h"

namespace atrous::cuda {

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of one launch. Kernels step through their work by gridDim.x, so any amount of work is possible; the limit is
// the hardware's, and tests lower it so that blocks take several pieces of work.
#ifndef ATROUS_MAX_BLOCKS
#define ATROUS_MAX_BLOCKS 0x7fffffff
#endif
inline unsigned grid_blocks(int64_t work) { return static_cast<unsigned>(std::min<int64_t>(work, ATROUS_MAX_BLOCKS)); }

// Calls use(value of the C++ type behind dtype).
template <typename Use>
void with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::float32: return use(float{});
    case DType::float64: return use(double{});
    case DType::float16: return use(__half{});
    case DType::bfloat16: return use(__nv_bfloat16{});
  }
  throw std::runtime_error("unknown dtype " + std::to_string(static_cast<int64_t>(dtype)));
}

}  // namespace atrous::cuda
