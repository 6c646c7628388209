// The weight gradient of dense conv2d on the tensor cores.
//
// Per tap a matrix product [output channels, input channels]; the summed dimension is the pixels at which the tap is valid,
// flattened across the batch and cut into a fixed number of splits. Both factors lie with their channels innermost, so the
// fragments are read transposed. Partial sums are float32; sum_partials adds them in order.
#include <type_traits>

#include "conv2d_tensor_core.h"
#include "matrix_tiles.h"

namespace atrous::cuda {
namespace {

// A position in [batch, height, width] that moves on by a fixed number of pixels.
struct PixelWalk {
  int64_t width, height;
  int64_t x, y, n;
  int64_t step_x, step_y, step_n;

  __device__ PixelWalk(int64_t width, int64_t height, int64_t pixel, int64_t step) : width(width), height(height) {
    split(pixel, x, y, n);
    split(step, step_x, step_y, step_n);
  }
  __device__ void advance() {
    x += step_x, y += step_y, n += step_n;
    if (x >= width) x -= width, ++y;
    if (y >= height) y -= height, ++n;
  }

 private:
  __device__ void split(int64_t pixel, int64_t& of_x, int64_t& of_y, int64_t& of_n) const {
    const int64_t row = divide(pixel, width);
    of_n = divide(row, height), of_y = row - of_n * height, of_x = pixel - row * width;
  }
};

// Writes partials[split, tap, o, i] for all taps of the plan.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    correlate_weight_tiles(const __grid_constant__ WeightPlan plan, const T* __restrict__ src, const T* __restrict__ grad,
                           float* __restrict__ partials) {
  using Product = TileProduct<T, Shape, false, false>;
  using Part = typename Product::A;
  static_assert(std::is_same_v<Part, typename Product::B>, "a thread copies the same pixels of both factors");
  ATROUS_DYNAMIC_SHARED(unsigned char, shared);

  const int thread = static_cast<int>(threadIdx.x);
  int64_t rest = blockIdx.x;
  const auto take = [&rest](int64_t count) {
    const int64_t quotient = divide(rest, count), remainder = rest - quotient * count;
    rest = quotient;
    return remainder;
  };
  const int out_channels = static_cast<int>(plan.out_channels), in_channels = static_cast<int>(plan.in_channels);
  const int first_row = static_cast<int>(take((out_channels + Shape::rows - 1) / Shape::rows)) * Shape::rows;
  const int first_column = static_cast<int>(take((in_channels + Shape::columns - 1) / Shape::columns)) * Shape::columns;
  // All parts of a tap before the next one, so that the blocks with most pixels come first.
  const int64_t split = take(plan.splits), tap_w = take(plan.w.count), tap_h = rest;

  const int64_t width = plan.w.size[tap_w], height = plan.h.size[tap_h], pixels = plan.batch * height * width;
  const int64_t run = (divide(pixels + plan.splits - 1, plan.splits) + slice_depth<T> - 1) / slice_depth<T> * slice_depth<T>;
  const int64_t first_pixel = split * run, last_pixel = first_pixel + run < pixels ? first_pixel + run : pixels;
  const int slices = first_pixel < last_pixel
                         ? static_cast<int>((last_pixel - first_pixel + slice_depth<T> - 1) / slice_depth<T>)
                         : 0;

  const bool in_grad = first_row + Part::element(thread) < out_channels;
  const bool in_src = first_column + Part::element(thread) < in_channels;
  const T* const from_grad = grad + plan.h.start[tap_h] * plan.h.grad_stride + plan.w.start[tap_w] * plan.w.grad_stride +
                             first_row + Part::element(thread);
  const T* const from_src = src + plan.src_offset + plan.h.start[tap_h] * plan.h.src_stride +
                            plan.w.start[tap_w] * plan.w.src_stride + plan.h.tap[tap_h] * plan.h.src_tap_stride +
                            plan.w.tap[tap_w] * plan.w.src_tap_stride + first_column + Part::element(thread);

  Product product;
  product.start(thread, [](int) { return 0.f; });
  if (slices > 0) {
    PixelWalk walk(width, height, first_pixel + Part::row(thread, 0), Part::rows_per_pass);
    int64_t left = last_pixel - first_pixel - Part::row(thread, 0);
    product.run(shared, slices, thread, [&](unsigned char* a, unsigned char* b) {
#pragma unroll
      for (int pass = 0; pass < Part::passes; ++pass) {
        copy_async<16>(Part::place(a, thread, pass),
                       from_grad + (walk.n * plan.grad_n + walk.y * plan.h.grad_stride + walk.x * plan.w.grad_stride),
                       left > 0 && in_grad);
        copy_async<16>(Part::place(b, thread, pass),
                       from_src + (walk.n * plan.src_n + walk.y * plan.h.src_stride + walk.x * plan.w.src_stride),
                       left > 0 && in_src);
        walk.advance();
        left -= Part::rows_per_pass;
      }
    });
  }

  product.template stage_result<float>(shared, thread);
  const int64_t tap = plan.h.tap[tap_h] * plan.w.kernel + plan.w.tap[tap_w];
  const int64_t first_filter = (split * plan.h.kernel * plan.w.kernel + tap) * out_channels + first_row;
  Product::store_result(shared, thread, partials, in_channels - first_column, 1, true, [&](int row) {
    return first_row + row < out_channels ? (first_filter + row) * in_channels + first_column : nowhere;
  });
}

template <typename T, typename Shape>
void launch_weight_tiles(const WeightPlan& plan, const T* src, const T* grad, float* partials, void* stream) {
  const int64_t blocks = ceil_divide(plan.out_channels, Shape::rows) * ceil_divide(plan.in_channels, Shape::columns) *
                         plan.h.count * plan.w.count * plan.splits;
  if (blocks == 0) return;
  constexpr int bytes = TileProduct<T, Shape, false, false>::shared_bytes;
  const auto kernel = correlate_weight_tiles<T, Shape>;
  ATROUS_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Shape::threads), bytes, stream, plan, src, grad, partials);
}

}  // namespace

int64_t conv2d_weight_tensor_core_workspace(const Conv2dShape& s) {
  return weight_tiles(s).splits * s.kernel_h * s.kernel_w * s.out_channels * s.in_channels * 4;
}

void conv2d_weight_tensor_core(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                               MutableTensor grad_weight, void* workspace, void* stream) {
  const WeightTiles tiles = weight_tiles(shape);
  input = without_idle_strides(input, shape.batch, shape.in_h, shape.in_w);
  grad_output = without_idle_strides(grad_output, shape.batch, shape.out_h, shape.out_w);
  with_tensor_core_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_weight_plan(shape, input.strides, grad_output.strides, tiles.splits, [&](const WeightPlan& plan) {
      const auto launch = tiles.side == 128 ? launch_weight_tiles<T, WideTile> : launch_weight_tiles<T, SmallTile>;
      launch(plan, static_cast<const T*>(input.data), static_cast<const T*>(grad_output.data),
             static_cast<float*>(workspace), stream);
    });
  });
  sum_partials(shape, dtype, workspace, tiles.splits, grad_weight, stream);
}

}  // namespace atrous::cuda
