// The second pass of the weight gradients: partial sums of the splits of the pixel loop, added in ascending order.
#include "plan.h"

namespace atrous::cuda {
namespace {

constexpr int threads = 256;

template <typename T>
__global__ void __launch_bounds__(threads)
    sum_splits(const accumulator_t<T>* __restrict__ partials, const int64_t splits, const int64_t taps_h,
               const int64_t taps_w, const int64_t out_channels, const int64_t in_channels, const Strides strides,
               T* __restrict__ grad_weight) {
  const int64_t count = taps_h * taps_w * out_channels * in_channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < count; i += step) {
    accumulator_t<T> sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += partials[split * count + i];
    const int64_t filter = divide(i, in_channels), tap = divide(filter, out_channels), tap_row = divide(tap, taps_w);
    const int64_t c = i - filter * in_channels, o = filter - tap * out_channels, tap_column = tap - tap_row * taps_w;
    grad_weight[o * strides.n + c * strides.c + tap_row * strides.h + tap_column * strides.w] = narrow<T>(sum);
  }
}

}  // namespace

void sum_partials(const Conv2dShape& shape, DType dtype, const void* partials, int64_t splits,
                  MutableTensor grad_weight, void* stream) {
  const int64_t in_channels = shape.in_channels / shape.groups;
  const int64_t count = shape.kernel_h * shape.kernel_w * shape.out_channels * in_channels;
  if (count == 0) return;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = sum_splits<T>;
    ATROUS_LAUNCH(kernel, dim3(grid_blocks(ceil_divide(count, threads))), dim3(threads), 0, stream,
                  static_cast<const accumulator_t<T>*>(partials), splits, shape.kernel_h, shape.kernel_w,
                  shape.out_channels, in_channels, grad_weight.strides, static_cast<T*>(grad_weight.data));
  });
}

}  // namespace atrous::cuda
