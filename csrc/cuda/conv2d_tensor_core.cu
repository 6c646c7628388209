// Dense conv2d and its input gradient on the tensor cores: implicit matrix products over valid-tap rectangles.
//
// Rows are pixels of one rectangle, flattened across the batch; columns are written channels; the summed dimension is
// (valid tap, read channel), one tap at a time in slices of 64 bytes. Rectangles with more taps come first.
#include "conv2d_tensor_core.h"
#include "matrix_tiles.h"

namespace atrous::cuda {
namespace {

// A block computes one tile: more than 2^31 of them are more than any memory holds.
// weight_src_inner: the read channel is innermost in the weight [O, KH, KW, I], as it is in the forward pass; in the input
// gradient the written one is.
template <typename T, typename Shape, bool weight_src_inner>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    correlate_tiles(const __grid_constant__ CorrelatePlan plan, const bool whole_vectors, const T* __restrict__ src,
                    const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ dst) {
  using Product = TileProduct<T, Shape, true, weight_src_inner>;
  using A = typename Product::A;
  using B = typename Product::B;
  struct Tables {
    int64_t src[Shape::rows], dst[Shape::rows];  // offsets of each pixel of the tile
  };
  ATROUS_SHARED(Tables, tables);
  ATROUS_DYNAMIC_SHARED(unsigned char, shared);

  const int thread = static_cast<int>(threadIdx.x);
  const int src_channels = static_cast<int>(plan.src_channels);
  const int64_t column_blocks = (plan.dst_channels + Shape::columns - 1) / Shape::columns;
  // Blocks that run at the same time share the pixels of a tile.
  const int64_t tile_index = divide(blockIdx.x, column_blocks);
  const int first_column = static_cast<int>(blockIdx.x - tile_index * column_blocks) * Shape::columns;
  const int columns = static_cast<int>(plan.dst_channels) - first_column;
  const Tile tile = find_tile(plan, tile_index, Shape::rows);
  const int64_t taps_h = plan.h.taps[tile.h], taps_w = plan.w.taps[tile.w];
  const int slices_per_tap = (src_channels + slice_depth<T> - 1) / slice_depth<T>;

  if (thread < Shape::rows) {
    const int64_t pixel = tile.first + thread;
    const PixelOffsets offsets =
        pixel < tile.pixels ? pixel_offsets(plan, tile, pixel) : PixelOffsets{nowhere, nowhere};
    tables.src[thread] = offsets.src;
    tables.dst[thread] = offsets.dst;
  }
  __syncthreads();

  // The thread's vectors under tap 0 and channel 0. What does not exist has some address, which is not read.
  const T* from_src[A::passes];
  unsigned in_src = 0;
#pragma unroll
  for (int pass = 0; pass < A::passes; ++pass) {
    const int64_t pixel = tables.src[A::along(thread, pass)];
    in_src |= static_cast<unsigned>(pixel != nowhere) << pass;
    from_src[pass] = src + (pixel == nowhere ? 0 : pixel) + A::depth(thread, pass);
  }
  const T* const from_weight = weight + plan.weight_offset + (first_column + B::along(thread, 0)) * plan.weight_dst +
                               B::depth(thread, 0) * plan.weight_src;
  const int64_t weight_pass = B::rows_per_pass * (weight_src_inner ? plan.weight_dst : plan.weight_src);

  // Where the next slice starts, relative to tap 0 and channel 0.
  const int64_t first_h = plan.h.tap_start[tile.h], first_w = plan.w.tap_start[tile.w];
  int64_t src_shift = first_h * plan.h.src_tap_stride + first_w * plan.w.src_tap_stride;
  int64_t weight_shift = first_h * plan.h.weight_tap_stride + first_w * plan.w.weight_tap_stride;
  int channel = 0, tap_w = 0;
  Product product;
  product.start(thread, [&](int column) {
    return bias && column < columns ? widen(bias[first_column + column]) : 0.f;
  });
  product.run(shared, static_cast<int>(taps_h * taps_w) * slices_per_tap, thread, [&](unsigned char* a, unsigned char* b) {
    const int left = src_channels - channel;
#pragma unroll
    for (int pass = 0; pass < A::passes; ++pass)
      copy_async<16>(A::place(a, thread, pass), from_src[pass] + src_shift,
                     (in_src >> pass & 1) && A::depth(thread, pass) < left);
#pragma unroll
    for (int pass = 0; pass < B::passes; ++pass)
      copy_async<16>(B::place(b, thread, pass), from_weight + (weight_shift + pass * weight_pass),
                     B::along(thread, pass) < columns && B::depth(thread, pass) < left);
    channel += slice_depth<T>;
    src_shift += slice_depth<T>;
    weight_shift += slice_depth<T> * plan.weight_src;
    if (channel < src_channels) return;
    src_shift += plan.w.src_tap_stride - channel;
    weight_shift += plan.w.weight_tap_stride - channel * plan.weight_src;
    channel = 0;
    if (++tap_w < taps_w) return;
    src_shift += plan.h.src_tap_stride - taps_w * plan.w.src_tap_stride;
    weight_shift += plan.h.weight_tap_stride - taps_w * plan.w.weight_tap_stride;
    tap_w = 0;
  });

  product.template stage_result<T>(shared, thread);
  Product::store_result(shared, thread, dst, columns, plan.dst_c, whole_vectors, [&](int row) {
    return tables.dst[row] == nowhere ? nowhere : tables.dst[row] + first_column * plan.dst_c;
  });
}

template <typename T, typename Shape, bool weight_src_inner>
void launch_tiles(const CorrelatePlan& plan, bool whole_vectors, const T* src, const T* weight, const T* bias, T* dst,
                  void* stream) {
  const int64_t tiles = tile_count(plan, Shape::rows);
  const int64_t blocks = tiles * ceil_divide(plan.dst_channels, Shape::columns);
  if (blocks == 0) return;
  constexpr int bytes = TileProduct<T, Shape, true, weight_src_inner>::shared_bytes;
  const auto kernel = correlate_tiles<T, Shape, weight_src_inner>;
  ATROUS_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Shape::threads), bytes, stream, plan, whole_vectors, src,
                weight, bias, dst);
}

template <typename T, bool weight_src_inner>
void correlate_plan(const CorrelatePlan& plan, ConstTensor src, ConstTensor weight, const void* bias, MutableTensor dst,
                    void* stream) {
  const bool wide = wants_wide_tile(tile_count(plan, WideTile::rows), plan.dst_channels);
  const auto launch = wide ? launch_tiles<T, WideTile, weight_src_inner> : launch_tiles<T, SmallTile, weight_src_inner>;
  const bool whole_vectors = plan.dst_channels % vector_width<T> == 0 &&
                             takes_vectors(dst.data, dst.strides, sizeof(T), vector_width<T>);
  launch(plan, whole_vectors, static_cast<const T*>(src.data), static_cast<const T*>(weight.data),
         static_cast<const T*>(bias), static_cast<T*>(dst.data), stream);
}

}  // namespace

void conv2d_tensor_core(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor weight, const void* bias,
                        MutableTensor output, void* stream) {
  input = without_idle_strides(input, shape.batch, shape.in_h, shape.in_w);
  weight = without_idle_strides(weight, shape.out_channels, shape.kernel_h, shape.kernel_w);
  with_tensor_core_type(dtype, [&](auto zero) {
    for_each_forward_plan(shape, input.strides, weight.strides, output.strides, [&](const CorrelatePlan& plan) {
      correlate_plan<decltype(zero), true>(plan, input, weight, bias, output, stream);
    });
  });
}

void conv2d_input_tensor_core(const Conv2dShape& shape, DType dtype, ConstTensor weight, ConstTensor grad_output,
                              MutableTensor grad_input, void* stream) {
  weight = without_idle_strides(weight, shape.out_channels, shape.kernel_h, shape.kernel_w);
  grad_output = without_idle_strides(grad_output, shape.batch, shape.out_h, shape.out_w);
  with_tensor_core_type(dtype, [&](auto zero) {
    for_each_input_plan(shape, weight.strides, grad_output.strides, grad_input.strides, [&](const CorrelatePlan& plan) {
      correlate_plan<decltype(zero), false>(plan, grad_output, weight, nullptr, grad_input, stream);
    });
  });
}

}  // namespace atrous::cuda
