// Depthwise conv2d and its gradients. Memory-bound: every thread keeps V neighbouring channels of several pixels in
// registers, so that with channels innermost all its accesses are 16 bytes wide. V = 1 takes any layout and any number
// of output channels per group.
#include "lanes.h"
#include "plan.h"

namespace atrous::cuda {
namespace {

constexpr int threads = lane_threads;
constexpr int pixels_per_thread = 4;
constexpr int min_blocks = 2;  // per multiprocessor; left to itself the compiler aims for more and spills registers

template <typename T, int V>
__global__ void __launch_bounds__(threads, min_blocks)
    depthwise_correlate(const __grid_constant__ CorrelatePlan plan, const Lanes lanes, const int64_t tiles,
                        const T* __restrict__ src, const T* __restrict__ weight, const T* __restrict__ bias,
                        T* __restrict__ dst) {
  using Acc = accumulator_t<T>;
  const LaneIndex lane = lane_index(lanes, static_cast<int>(threadIdx.x));
  const int64_t channels = plan.groups * plan.dst_channels;
  const int64_t channel_blocks = divide(channels + lanes.channels * V - 1, lanes.channels * V);
  const int64_t work = tiles * channel_blocks;

  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    const int64_t tile_index = divide(index, channel_blocks);
    const int64_t channel = ((index - tile_index * channel_blocks) * lanes.channels + lane.channel) * V;
    if (channel >= channels) continue;
    const Tile tile = find_tile(plan, tile_index, lanes.pixels * pixels_per_thread);
    const int64_t group = divide(channel, plan.dst_channels), in_group = channel - group * plan.dst_channels;

    PixelOffsets pixel[pixels_per_thread];
    bool exists[pixels_per_thread];
#pragma unroll
    for (int i = 0; i < pixels_per_thread; ++i) {
      const int64_t p = tile.first + i * lanes.pixels + lane.pixel;
      exists[i] = p < tile.pixels;
      pixel[i] = exists[i] ? pixel_offsets(plan, tile, p) : PixelOffsets{0, 0};
    }

    Acc sum[pixels_per_thread][V] = {};
    for (int64_t read = 0; read < plan.src_channels; ++read) {
      const T* const channel_src = src + (group * plan.src_channels + read) * plan.src_c;
      const T* const channel_weight =
          weight + group * plan.weight_group + in_group * plan.weight_dst + read * plan.weight_src + plan.weight_offset;
      // The V channels of a vector are V groups of one channel each.
      const int64_t weight_step = plan.weight_group;
      for (int64_t a = 0; a < plan.h.taps[tile.h]; ++a)
        for (int64_t b = 0; b < plan.w.taps[tile.w]; ++b) {
          const int64_t th = plan.h.tap_start[tile.h] + a, tw = plan.w.tap_start[tile.w] + b;
          const int64_t src_tap = th * plan.h.src_tap_stride + tw * plan.w.src_tap_stride;
          const int64_t weight_tap = th * plan.h.weight_tap_stride + tw * plan.w.weight_tap_stride;
          Acc factor[V];
#pragma unroll
          for (int v = 0; v < V; ++v) factor[v] = widen(channel_weight[weight_tap + v * weight_step]);
#pragma unroll
          for (int i = 0; i < pixels_per_thread; ++i) {
            if (!exists[i]) continue;
            const Vector<T, V> x = load_vector<T, V>(channel_src + pixel[i].src + src_tap);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[i][v] += widen(x.value[v]) * factor[v];
          }
        }
    }

#pragma unroll
    for (int i = 0; i < pixels_per_thread; ++i) {
      if (!exists[i]) continue;
      Vector<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.value[v] = narrow<T>(sum[i][v] + (bias ? widen(bias[channel + v]) : Acc(0)));
      *reinterpret_cast<Vector<T, V>*>(dst + pixel[i].dst + channel * plan.dst_c) = result;
    }
  }
}

// Writes partials[split, tap, o] for all taps of the plan. Threads of a channel share the rows of the split by columns,
// their sums are added pairwise in a fixed tree.
template <typename T, int V>
__global__ void __launch_bounds__(threads, min_blocks)
    depthwise_weight(const __grid_constant__ WeightPlan plan, const Lanes lanes, const T* __restrict__ src,
                     const T* __restrict__ grad, accumulator_t<T>* __restrict__ partials) {
  using Acc = accumulator_t<T>;
  struct Sums {
    Acc value[V][threads];
  };
  ATROUS_SHARED(Sums, sums);
  const LaneIndex lane = lane_index(lanes, static_cast<int>(threadIdx.x));
  const int slot = lane.pixel * lanes.channels + lane.channel;
  const int64_t channels = plan.groups * plan.out_channels;
  const int64_t channel_blocks = divide(channels + lanes.channels * V - 1, lanes.channels * V);
  const int64_t work = channel_blocks * plan.h.count * plan.w.count * plan.splits;

  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    int64_t rest = index;
    const auto take = [&rest](int64_t count) {
      const int64_t quotient = divide(rest, count), remainder = rest - quotient * count;
      rest = quotient;
      return remainder;
    };
    const int64_t channel = (take(channel_blocks) * lanes.channels + lane.channel) * V;
    const int64_t tap_w = take(plan.w.count), tap_h = take(plan.h.count), split = rest;

    Acc sum[V] = {};
    if (channel < channels) {
      const T* const channel_src = src + divide(channel, plan.out_channels) * plan.src_c + plan.src_offset +
                                   plan.h.tap[tap_h] * plan.h.src_tap_stride +
                                   plan.w.tap[tap_w] * plan.w.src_tap_stride;
      const T* const channel_grad = grad + channel * plan.grad_c;
      const int64_t height = plan.h.size[tap_h], lines = plan.batch * height;
      const int64_t run = divide(lines + plan.splits - 1, plan.splits);
      const int64_t last = (split + 1) * run < lines ? (split + 1) * run : lines;
      for (int64_t line = split * run; line < last; ++line) {
        const int64_t n = divide(line, height), y = plan.h.start[tap_h] + line - n * height;
        const T* const line_src = channel_src + n * plan.src_n + y * plan.h.src_stride;
        const T* const line_grad = channel_grad + n * plan.grad_n + y * plan.h.grad_stride;
        for (int64_t i = lane.pixel; i < plan.w.size[tap_w]; i += lanes.pixels) {
          const int64_t x = plan.w.start[tap_w] + i;
          const Vector<T, V> a = load_vector<T, V>(line_src + x * plan.w.src_stride);
          const Vector<T, V> g = load_vector<T, V>(line_grad + x * plan.w.grad_stride);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += widen(a.value[v]) * widen(g.value[v]);
        }
      }
    }

#pragma unroll
    for (int v = 0; v < V; ++v) sums.value[v][slot] = sum[v];
    for (int half = lanes.pixels / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane.pixel < half)
#pragma unroll
        for (int v = 0; v < V; ++v) sums.value[v][slot] += sums.value[v][slot + half * lanes.channels];
    }
    if (lane.pixel == 0 && channel < channels) {
      const int64_t tap = plan.h.tap[tap_h] * plan.w.kernel + plan.w.tap[tap_w];
      const int64_t all_taps = plan.h.kernel * plan.w.kernel;
#pragma unroll
      for (int v = 0; v < V; ++v) partials[(split * all_taps + tap) * channels + channel + v] = sums.value[v][slot];
    }
    __syncthreads();  // the next piece of work overwrites the sums
  }
}

template <typename T>
bool use_vectors(const Conv2dShape& s, const void* a, const Strides& a_strides, const void* b,
                 const Strides& b_strides) {
  constexpr int V = vector_width<T>;
  return s.in_channels == s.groups && s.out_channels == s.groups && s.groups % V == 0 &&
         takes_vectors(a, a_strides, sizeof(T), V) && takes_vectors(b, b_strides, sizeof(T), V);
}

template <typename T, int V>
void launch_correlate(const CorrelatePlan& plan, const T* src, const T* weight, const T* bias, T* dst, void* stream) {
  const int64_t vectors = ceil_divide(plan.groups * plan.dst_channels, V);
  const Lanes lanes = choose_lanes(vectors, plan.dst_c <= plan.w.dst_stride);
  const int64_t tiles = tile_count(plan, lanes.pixels * pixels_per_thread);
  const int64_t blocks = tiles * ceil_divide(vectors, lanes.channels);
  if (blocks == 0) return;
  const auto kernel = depthwise_correlate<T, V>;
  ATROUS_LAUNCH(kernel, dim3(grid_blocks(blocks)), dim3(threads), 0, stream, plan, lanes, tiles, src, weight, bias,
                dst);
}

template <typename T, int V>
void launch_weight(const WeightPlan& plan, const T* src, const T* grad, accumulator_t<T>* partials, void* stream) {
  const int64_t vectors = ceil_divide(plan.groups * plan.out_channels, V);
  const Lanes lanes = choose_lanes(vectors, plan.grad_c <= plan.w.grad_stride);
  const int64_t blocks = ceil_divide(vectors, lanes.channels) * plan.h.count * plan.w.count * plan.splits;
  if (blocks == 0) return;
  const auto kernel = depthwise_weight<T, V>;
  ATROUS_LAUNCH(kernel, dim3(grid_blocks(blocks)), dim3(threads), 0, stream, plan, lanes, src, grad, partials);
}

int64_t splits_of(const Conv2dShape& s) {
  return weight_splits(ceil_divide(s.out_channels, 32) * s.kernel_h * s.kernel_w, s.batch * s.out_h, 8);
}

}  // namespace

void depthwise_conv2d(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor weight, const void* bias,
                      MutableTensor output, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = use_vectors<T>(shape, input.data, input.strides, output.data, output.strides);
    const auto launch = vectors ? launch_correlate<T, vector_width<T>> : launch_correlate<T, 1>;
    for_each_forward_plan(shape, input.strides, weight.strides, output.strides, [&](const CorrelatePlan& plan) {
      launch(plan, static_cast<const T*>(input.data), static_cast<const T*>(weight.data), static_cast<const T*>(bias),
             static_cast<T*>(output.data), stream);
    });
  });
}

void depthwise_conv2d_input(const Conv2dShape& shape, DType dtype, ConstTensor weight, ConstTensor grad_output,
                            MutableTensor grad_input, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors =
        use_vectors<T>(shape, grad_output.data, grad_output.strides, grad_input.data, grad_input.strides);
    const auto launch = vectors ? launch_correlate<T, vector_width<T>> : launch_correlate<T, 1>;
    for_each_input_plan(shape, weight.strides, grad_output.strides, grad_input.strides, [&](const CorrelatePlan& plan) {
      launch(plan, static_cast<const T*>(grad_output.data), static_cast<const T*>(weight.data), nullptr,
             static_cast<T*>(grad_input.data), stream);
    });
  });
}

int64_t depthwise_conv2d_weight_workspace(const Conv2dShape& s, DType dtype) {
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  return splits_of(s) * s.kernel_h * s.kernel_w * s.out_channels * element;
}

void depthwise_conv2d_weight(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                             MutableTensor grad_weight, void* workspace, void* stream) {
  const int64_t splits = splits_of(shape);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = use_vectors<T>(shape, input.data, input.strides, grad_output.data, grad_output.strides);
    const auto launch = vectors ? launch_weight<T, vector_width<T>> : launch_weight<T, 1>;
    for_each_weight_plan(shape, input.strides, grad_output.strides, splits, [&](const WeightPlan& plan) {
      launch(plan, static_cast<const T*>(input.data), static_cast<const T*>(grad_output.data),
             static_cast<accumulator_t<T>*>(workspace), stream);
    });
  });
  sum_partials(shape, dtype, workspace, splits, grad_weight, stream);
}

}  // namespace atrous::cuda
