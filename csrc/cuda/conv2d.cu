// Dense conv2d and its gradients as implicit matrix products over valid-tap rectangles, on the ordinary (SIMT) units.
//
// Forward and input gradient: rows are pixels of one rectangle, columns are written channels, the summed dimension is
// (valid tap, read channel). Weight gradient: rows are output channels, columns input channels of one tap, the summed
// dimension is the pixels at which that tap is valid. A block stages slices of both factors in shared memory as
// accumulator-typed values; each of its 16 x 16 threads owns a 4 x TN piece of the product.
#include "plan.h"

namespace atrous::cuda {
namespace {

constexpr int threads = 256;
constexpr int rows = 64;   // of a block's piece of the product
constexpr int depth = 16;  // of one staged slice

// Blocks per multiprocessor. Left to itself the compiler aims for more and spills registers.
template <typename T>
constexpr int min_blocks = sizeof(T) == 8 ? 1 : 2;

constexpr int64_t nothing = INT64_MIN;  // offset of an element that does not exist

template <typename Acc, int TN>
struct Slice {
  static constexpr int columns = 16 * TN;
  // Four more than needed: rows of threads then start in different banks, and vectors stay aligned.
  alignas(16) Acc a[depth][rows + 4];
  alignas(16) Acc b[depth][columns + 4];
};

template <typename Acc, int TN>
__device__ __forceinline__ void multiply_slice(const Slice<Acc, TN>& slice, int row, int column, Acc (&sum)[4][TN]) {
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    const auto a = *reinterpret_cast<const Vector<Acc, 4>*>(&slice.a[k][row]);
    const auto b = *reinterpret_cast<const Vector<Acc, TN>*>(&slice.b[k][column]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) sum[i][j] += a.value[i] * b.value[j];
  }
}

template <typename T>
__device__ __forceinline__ accumulator_t<T> load(const T* data, int64_t offset, int64_t more) {
  if (offset == nothing || more == nothing) return 0;
  return widen(data[offset + more]);
}

// Which index neighbouring threads should differ in when they touch global memory.
struct CorrelateOrder {
  bool src_channels_inner, weight_src_inner, dst_channels_inner;
};

template <typename T, int TN>
__global__ void __launch_bounds__(threads, min_blocks<T>)
    correlate(const __grid_constant__ CorrelatePlan plan, const CorrelateOrder order, const int64_t tiles,
              const T* __restrict__ src, const T* __restrict__ weight, const T* __restrict__ bias,
              T* __restrict__ dst) {
  using Acc = accumulator_t<T>;
  using Staged = Slice<Acc, TN>;
  struct Tables {
    int64_t row_src[rows], row_dst[rows];  // of each pixel of the tile
    int64_t k_src[depth], k_weight[depth];  // of each (tap, read channel) of the slice
  };
  ATROUS_SHARED(Staged, slice);
  ATROUS_SHARED(Tables, tables);

  const int thread = static_cast<int>(threadIdx.x);
  const int row = (order.dst_channels_inner ? thread / 16 : thread % 16) * 4;
  const int column = (order.dst_channels_inner ? thread % 16 : thread / 16) * TN;
  const int64_t column_blocks = (plan.dst_channels + Staged::columns - 1) / Staged::columns;
  const int64_t work = tiles * plan.groups * column_blocks;

  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    // Blocks that run at the same time share the pixels of a tile.
    const int64_t rest = divide(index, column_blocks);
    const int64_t first_column = (index - rest * column_blocks) * Staged::columns;
    const int64_t tile_index = divide(rest, plan.groups), group = rest - tile_index * plan.groups;
    const Tile tile = find_tile(plan, tile_index, rows);
    const int64_t taps_w = plan.w.taps[tile.w];
    const int64_t total_depth = plan.h.taps[tile.h] * taps_w * plan.src_channels;
    const T* const group_src = src + group * plan.src_channels * plan.src_c;
    const T* const group_weight = weight + group * plan.weight_group;

    if (thread < rows) {
      const int64_t pixel = tile.first + thread;
      const PixelOffsets offsets =
          pixel < tile.pixels ? pixel_offsets(plan, tile, pixel) : PixelOffsets{nothing, nothing};
      tables.row_src[thread] = offsets.src;
      tables.row_dst[thread] = offsets.dst;
    }
    const auto fill_depth_table = [&](int64_t first_k) {
      if (thread >= depth) return;
      const int64_t k = first_k + thread;
      if (k >= total_depth) {
        tables.k_src[thread] = tables.k_weight[thread] = nothing;
        return;
      }
      const int64_t tap = divide(k, plan.src_channels), channel = k - tap * plan.src_channels;
      const int64_t tap_row = divide(tap, taps_w);
      const int64_t th = plan.h.tap_start[tile.h] + tap_row, tw = plan.w.tap_start[tile.w] + tap - tap_row * taps_w;
      tables.k_src[thread] = th * plan.h.src_tap_stride + tw * plan.w.src_tap_stride + channel * plan.src_c;
      tables.k_weight[thread] = th * plan.h.weight_tap_stride + tw * plan.w.weight_tap_stride +
                                channel * plan.weight_src + plan.weight_offset;
    };
    fill_depth_table(0);
    __syncthreads();

    Acc sum[4][TN] = {};
    for (int64_t first_k = 0; first_k < total_depth; first_k += depth) {
#pragma unroll
      for (int e = thread; e < rows * depth; e += threads) {
        const int k = order.src_channels_inner ? e % depth : e / rows;
        const int m = order.src_channels_inner ? e / depth : e % rows;
        slice.a[k][m] = load(group_src, tables.row_src[m], tables.k_src[k]);
      }
#pragma unroll
      for (int e = thread; e < Staged::columns * depth; e += threads) {
        const int k = order.weight_src_inner ? e % depth : e / Staged::columns;
        const int n = order.weight_src_inner ? e / depth : e % Staged::columns;
        const int64_t channel = first_column + n;
        slice.b[k][n] =
            load(group_weight, channel < plan.dst_channels ? channel * plan.weight_dst : nothing, tables.k_weight[k]);
      }
      __syncthreads();
      fill_depth_table(first_k + depth);
      multiply_slice(slice, row, column, sum);
      __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t pixel = tables.row_dst[row + i];
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        const int64_t channel = first_column + column + j;
        if (pixel == nothing || channel >= plan.dst_channels) continue;
        const int64_t global_channel = group * plan.dst_channels + channel;
        const Acc offset = bias ? widen(bias[global_channel]) : Acc(0);
        dst[pixel + global_channel * plan.dst_c] = narrow<T>(sum[i][j] + offset);
      }
    }
    __syncthreads();  // the next piece of work overwrites the tables
  }
}

struct WeightOrder {
  bool grad_channels_inner, src_channels_inner;
};

// Writes partials[split, tap, o, i] for all taps of the plan; sum_partials adds the splits up.
template <typename T, int TN>
__global__ void __launch_bounds__(threads, min_blocks<T>)
    correlate_weight(const __grid_constant__ WeightPlan plan, const WeightOrder order, const T* __restrict__ src,
                     const T* __restrict__ grad, accumulator_t<T>* __restrict__ partials) {
  using Acc = accumulator_t<T>;
  using Staged = Slice<Acc, TN>;
  struct Tables {
    int64_t src[depth], grad[depth];  // of each pixel of the slice
  };
  ATROUS_SHARED(Staged, slice);
  ATROUS_SHARED(Tables, tables);

  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / 16 * 4, column = thread % 16 * TN;
  const int64_t row_blocks = (plan.out_channels + rows - 1) / rows;
  const int64_t column_blocks = (plan.in_channels + Staged::columns - 1) / Staged::columns;
  const int64_t taps = plan.h.count * plan.w.count;
  const int64_t work = row_blocks * column_blocks * taps * plan.groups * plan.splits;

  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    int64_t rest = index;
    const auto take = [&rest](int64_t count) {
      const int64_t quotient = divide(rest, count), remainder = rest - quotient * count;
      rest = quotient;
      return remainder;
    };
    const int64_t first_row = take(row_blocks) * rows;
    const int64_t first_column = take(column_blocks) * Staged::columns;
    const int64_t tap_w = take(plan.w.count), tap_h = take(plan.h.count);
    const int64_t group = take(plan.groups), split = rest;

    const int64_t width = plan.w.size[tap_w], height = plan.h.size[tap_h];
    const int64_t pixels = plan.batch * height * width;
    const int64_t run = (divide(pixels + plan.splits - 1, plan.splits) + depth - 1) / depth * depth;
    const int64_t first_pixel = split * run, last_pixel = first_pixel + run < pixels ? first_pixel + run : pixels;
    const int64_t tap_offset = plan.src_offset + plan.h.tap[tap_h] * plan.h.src_tap_stride +
                               plan.w.tap[tap_w] * plan.w.src_tap_stride;
    const T* const group_src = src + group * plan.in_channels * plan.src_c;
    const T* const group_grad = grad + group * plan.out_channels * plan.grad_c;

    const auto fill_pixel_table = [&](int64_t first) {
      if (thread >= depth) return;
      const int64_t pixel = first + thread;
      if (pixel >= last_pixel) {
        tables.src[thread] = tables.grad[thread] = nothing;
        return;
      }
      const int64_t line = divide(pixel, width), n = divide(line, height);
      const int64_t x = plan.w.start[tap_w] + pixel - line * width, y = plan.h.start[tap_h] + line - n * height;
      tables.src[thread] = n * plan.src_n + y * plan.h.src_stride + x * plan.w.src_stride + tap_offset;
      tables.grad[thread] = n * plan.grad_n + y * plan.h.grad_stride + x * plan.w.grad_stride;
    };
    fill_pixel_table(first_pixel);
    __syncthreads();

    Acc sum[4][TN] = {};
    for (int64_t first = first_pixel; first < last_pixel; first += depth) {
#pragma unroll
      for (int e = thread; e < rows * depth; e += threads) {
        const int k = order.grad_channels_inner ? e / rows : e % depth;
        const int m = order.grad_channels_inner ? e % rows : e / depth;
        const int64_t channel = first_row + m;
        slice.a[k][m] =
            load(group_grad, channel < plan.out_channels ? channel * plan.grad_c : nothing, tables.grad[k]);
      }
#pragma unroll
      for (int e = thread; e < Staged::columns * depth; e += threads) {
        const int k = order.src_channels_inner ? e / Staged::columns : e % depth;
        const int n = order.src_channels_inner ? e % Staged::columns : e / depth;
        const int64_t channel = first_column + n;
        slice.b[k][n] = load(group_src, channel < plan.in_channels ? channel * plan.src_c : nothing, tables.src[k]);
      }
      __syncthreads();
      fill_pixel_table(first + depth);
      multiply_slice(slice, row, column, sum);
      __syncthreads();
    }

    const int64_t tap = plan.h.tap[tap_h] * plan.w.kernel + plan.w.tap[tap_w];
    const int64_t all_taps = plan.h.kernel * plan.w.kernel;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        const int64_t o = first_row + row + i, c = first_column + column + j;
        if (o >= plan.out_channels || c >= plan.in_channels) continue;
        const int64_t filter = ((split * all_taps + tap) * plan.groups + group) * plan.out_channels + o;
        partials[filter * plan.in_channels + c] = sum[i][j];
      }
  }
}

// A narrow block wastes less where there are few channels.
bool wants_narrow(int64_t channels) { return channels <= 16; }

template <typename T, int TN>
void launch_correlate(const CorrelatePlan& plan, const T* src, const T* weight, const T* bias, T* dst, void* stream) {
  const int64_t tiles = tile_count(plan, rows);
  const int64_t blocks = tiles * plan.groups * ceil_divide(plan.dst_channels, Slice<float, TN>::columns);
  if (blocks == 0) return;
  const CorrelateOrder order{plan.src_c <= plan.w.src_stride, plan.weight_src <= plan.weight_dst,
                             plan.dst_c <= plan.w.dst_stride};
  const auto kernel = correlate<T, TN>;
  ATROUS_LAUNCH(kernel, dim3(grid_blocks(blocks)), dim3(threads), 0, stream, plan, order, tiles, src, weight, bias,
                dst);
}

template <typename T>
void correlate_plan(const CorrelatePlan& plan, const void* src, const void* weight, const void* bias, void* dst,
                    void* stream) {
  const auto launch = wants_narrow(plan.dst_channels) ? launch_correlate<T, 1> : launch_correlate<T, 4>;
  launch(plan, static_cast<const T*>(src), static_cast<const T*>(weight), static_cast<const T*>(bias),
         static_cast<T*>(dst), stream);
}

template <typename T, int TN>
void launch_correlate_weight(const WeightPlan& plan, const T* src, const T* grad, accumulator_t<T>* partials,
                             void* stream) {
  const int64_t blocks = ceil_divide(plan.out_channels, rows) *
                         ceil_divide(plan.in_channels, Slice<float, TN>::columns) * plan.h.count * plan.w.count *
                         plan.groups * plan.splits;
  if (blocks == 0) return;
  const WeightOrder order{plan.grad_c <= plan.w.grad_stride, plan.src_c <= plan.w.src_stride};
  const auto kernel = correlate_weight<T, TN>;
  ATROUS_LAUNCH(kernel, dim3(grid_blocks(blocks)), dim3(threads), 0, stream, plan, order, src, grad, partials);
}

int64_t splits_of(const Conv2dShape& s) {
  const int64_t in_channels = s.in_channels / s.groups;
  const int64_t blocks = ceil_divide(s.out_channels / s.groups, rows) *
                         ceil_divide(in_channels, wants_narrow(in_channels) ? 16 : 64) * s.kernel_h * s.kernel_w *
                         s.groups;
  return weight_splits(blocks, s.batch * s.out_h * s.out_w, 16 * depth);
}

}  // namespace

void conv2d(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor weight, const void* bias,
            MutableTensor output, void* stream) {
  with_type(dtype, [&](auto zero) {
    for_each_forward_plan(shape, input.strides, weight.strides, output.strides, [&](const CorrelatePlan& plan) {
      correlate_plan<decltype(zero)>(plan, input.data, weight.data, bias, output.data, stream);
    });
  });
}

void conv2d_input(const Conv2dShape& shape, DType dtype, ConstTensor weight, ConstTensor grad_output,
                  MutableTensor grad_input, void* stream) {
  with_type(dtype, [&](auto zero) {
    for_each_input_plan(shape, weight.strides, grad_output.strides, grad_input.strides, [&](const CorrelatePlan& plan) {
      correlate_plan<decltype(zero)>(plan, grad_output.data, weight.data, nullptr, grad_input.data, stream);
    });
  });
}

int64_t conv2d_weight_workspace(const Conv2dShape& s, DType dtype) {
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  return splits_of(s) * s.kernel_h * s.kernel_w * s.out_channels * (s.in_channels / s.groups) * element;
}

void conv2d_weight(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                   MutableTensor grad_weight, void* workspace, void* stream) {
  const int64_t splits = splits_of(shape);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_weight_plan(shape, input.strides, grad_output.strides, splits, [&](const WeightPlan& plan) {
      const bool narrow = wants_narrow(plan.in_channels);
      const auto launch = narrow ? launch_correlate_weight<T, 1> : launch_correlate_weight<T, 4>;
      launch(plan, static_cast<const T*>(input.data), static_cast<const T*>(grad_output.data),
             static_cast<accumulator_t<T>*>(workspace), stream);
    });
  });
  sum_partials(shape, dtype, workspace, splits, grad_weight, stream);
}

}  // namespace atrous::cuda
