// Dense conv2d and its gradients on the tensor cores, as functions of plain numbers and pointers: no framework types, no CUDA
// headers. For one group, float16, bfloat16, and float32 in TF32 (10 bits of mantissa); sums are float32.
//
// Channels must be neighbours in memory and come in whole aligned vectors of 16 bytes in every tensor that is read:
// has_whole_vectors. Results may have any strides. As in conv2d.h, every element is written once, without atomics, and the same
// arguments give the same bits on every GPU.
#pragma once

#include "plan.h"

namespace atrous::cuda {

// What the kernels read: `channels` in 16-byte vectors at multiples of 16 bytes.
inline bool has_whole_vectors(ConstTensor tensor, DType dtype, int64_t n, int64_t channels, int64_t h, int64_t w) {
  const int64_t width = dtype == DType::float32 ? 4 : 8;
  const auto steps = [width](int64_t extent, int64_t stride) { return extent <= 1 || stride % width == 0; };
  return tensor.strides.c == 1 && channels % width == 0 && steps(n, tensor.strides.n) && steps(h, tensor.strides.h) &&
         steps(w, tensor.strides.w) && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
}

// The stride of an extent of 1 may be anything; as zero it keeps every address at a multiple of 16 bytes.
inline ConstTensor without_idle_strides(ConstTensor tensor, int64_t n, int64_t h, int64_t w) {
  if (n <= 1) tensor.strides.n = 0;
  if (h <= 1) tensor.strides.h = 0;
  if (w <= 1) tensor.strides.w = 0;
  return tensor;
}

// Tiles of 128 x 128 where their columns are in use and there are enough of them to occupy a large GPU, else 64 x 64. A
// function of the problem only, so that results do not depend on the GPU; tests lower the number.
#ifndef ATROUS_ENOUGH_TILES
#define ATROUS_ENOUGH_TILES 128
#endif
inline bool wants_wide_tile(int64_t wide_tiles_down, int64_t columns) {
  return columns > 64 && wide_tiles_down * ceil_divide(columns, 128) >= ATROUS_ENOUGH_TILES;
}

// Of the weight gradient: the side of its square tiles and the parts that the pixel loop is cut into.
struct WeightTiles {
  int64_t side, splits;
};
inline WeightTiles weight_tiles(const Conv2dShape& s) {
  const int64_t side = std::min(s.out_channels, s.in_channels) > 64 ? 128 : 64;
  const int64_t blocks = ceil_divide(s.out_channels, side) * ceil_divide(s.in_channels, side) * s.kernel_h * s.kernel_w;
  constexpr int64_t smallest_run = 512;       // pixels: 16 slices, four times what fills the pipeline
  constexpr int64_t wanted_blocks = 5 * 132;  // more of them balance no better, and partial sums have to be added up
  return {side, weight_splits(blocks, s.batch * s.out_h * s.out_w, smallest_run, wanted_blocks)};
}

void conv2d_tensor_core(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor weight, const void* bias,
                        MutableTensor output, void* stream);
void conv2d_input_tensor_core(const Conv2dShape& shape, DType dtype, ConstTensor weight, ConstTensor grad_output,
                              MutableTensor grad_input, void* stream);
// workspace: conv2d_weight_tensor_core_workspace bytes, 16-byte aligned.
int64_t conv2d_weight_tensor_core_workspace(const Conv2dShape& shape);
void conv2d_weight_tensor_core(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                               MutableTensor grad_weight, void* workspace, void* stream);

// Calls use(value of the C++ type behind dtype); there is no instruction for float64.
template <typename Use>
void with_tensor_core_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::float32: return use(float{});
    case DType::float16: return use(__half{});
    case DType::bfloat16: return use(__nv_bfloat16{});
    default: throw std::runtime_error("tensor cores: expected float32, float16 or bfloat16, but got float64");
  }
}

}  // namespace atrous::cuda
