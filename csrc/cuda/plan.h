// From a convolution to kernel launches. Kernels see linear maps only: which element of the source and of the weight a
// written element meets under a tap is base + sum of index * stride, for the forward pass and for both gradients.
//
// The written tensor is cut into the rectangles of problem.h, in each of which the set of valid taps is constant; a
// tile of work is a run of pixels of one rectangle, flattened across the batch. So no kernel checks spatial bounds and
// no padding zero is ever multiplied.
#pragma once

#include "conv2d.h"
#include "launch.h"
#include "problem.h"

namespace atrous::cuda {

// Segments of one axis in one launch. More of them (large kernels) become several launches.
constexpr int max_segments = 16;

struct AxisPlan {
  int64_t count;
  int64_t start[max_segments], size[max_segments];      // written positions
  int64_t tap_start[max_segments], taps[max_segments];  // their valid taps
  int64_t dst_stride, src_stride;                       // elements per position
  int64_t src_tap_stride, weight_tap_stride;            // elements per tap
};

// dst[n, d, h, w] = sum over s, taps of src[n, s, h', w'] * weight[d, s, tap]: forward (dst = output, src = input) and,
// per residue of the stride, the input gradient (dst = grad_input, src = grad_output). Channel counts are per group.
struct CorrelatePlan {
  AxisPlan h, w;
  int64_t batch, groups, dst_channels, src_channels;
  int64_t dst_offset, src_offset, weight_offset;
  int64_t dst_n, dst_c, src_n, src_c;
  int64_t weight_dst, weight_src, weight_group;
};

// grad_weight[o, i, tap] = sum over n, h, w of grad_output[n, o, h, w] * input[n, i, h', w'], over the rectangle of
// output positions at which the tap is valid. Channel counts are per group.
struct TapAxis {
  int64_t count, kernel;                            // so many taps of a kernel of this size
  int64_t tap[max_segments];                        // those valid at more positions first
  int64_t start[max_segments], size[max_segments];  // output positions at which each is valid
  int64_t grad_stride, src_stride, src_tap_stride;
};

struct WeightPlan {
  TapAxis h, w;
  int64_t batch, groups, out_channels, in_channels;
  int64_t src_offset;
  int64_t grad_n, grad_c, src_n, src_c;
  int64_t splits;
};

// The rectangle a tile belongs to, and the tile's first pixel in the rectangle flattened over [batch, rows, columns].
struct Tile {
  int h, w;
  int64_t first, pixels;
};

__host__ __device__ inline int64_t tile_count(const CorrelatePlan& plan, int64_t tile_pixels) {
  int64_t tiles = 0;
  for (int64_t h = 0; h < plan.h.count; ++h)
    for (int64_t w = 0; w < plan.w.count; ++w)
      tiles += (plan.batch * plan.h.size[h] * plan.w.size[w] + tile_pixels - 1) / tile_pixels;
  return tiles;
}

__device__ inline Tile find_tile(const CorrelatePlan& plan, int64_t tile, int64_t tile_pixels) {
  for (int h = 0; h < plan.h.count; ++h)
    for (int w = 0; w < plan.w.count; ++w) {
      const int64_t pixels = plan.batch * plan.h.size[h] * plan.w.size[w];
      const int64_t tiles = divide(pixels + tile_pixels - 1, tile_pixels);
      if (tile < tiles) return {h, w, tile * tile_pixels, pixels};
      tile -= tiles;
    }
  return {0, 0, 0, 0};
}

// Element offsets of one pixel of a rectangle in the written and in the read tensor (there: under tap 0).
struct PixelOffsets {
  int64_t dst, src;
};

__device__ inline PixelOffsets pixel_offsets(const CorrelatePlan& plan, const Tile& tile, int64_t pixel) {
  const int64_t width = plan.w.size[tile.w], height = plan.h.size[tile.h];
  const int64_t row = divide(pixel, width), n = divide(row, height);
  const int64_t x = plan.w.start[tile.w] + pixel - row * width;
  const int64_t y = plan.h.start[tile.h] + row - n * height;
  return {n * plan.dst_n + y * plan.h.dst_stride + x * plan.w.dst_stride + plan.dst_offset,
          n * plan.src_n + y * plan.h.src_stride + x * plan.w.src_stride + plan.src_offset};
}

namespace detail {

// Calls use(first, last) for runs of at most max_segments of [0, count).
template <typename Use>
void for_each_run(int64_t count, Use use) {
  for (int64_t first = 0; first < count; first += max_segments) use(first, std::min(count, first + max_segments));
}

inline void set_segments(AxisPlan& plan, const std::vector<Segment>& segments, int64_t first, int64_t last) {
  plan.count = last - first;
  for (int64_t i = first; i < last; ++i) {
    const Segment& s = segments[static_cast<size_t>(i)];
    plan.start[i - first] = s.start;
    plan.size[i - first] = s.stop - s.start;
    plan.tap_start[i - first] = s.tap_start;
    plan.taps[i - first] = s.tap_stop - s.tap_start;
  }
}

template <typename Use>
void for_each_rectangle_run(CorrelatePlan& plan, const Axis& h, const Axis& w, Use use) {
  // Rectangles with more taps first: the short ones then fill the last wave of blocks.
  const auto sorted_segments = [](const Axis& axis) {
    std::vector<Segment> segments = axis_segments(axis);
    const auto longer = [](const Segment& a, const Segment& b) { return a.tap_stop - a.tap_start > b.tap_stop - b.tap_start; };
    std::stable_sort(segments.begin(), segments.end(), longer);
    return segments;
  };
  const std::vector<Segment> h_segments = sorted_segments(h), w_segments = sorted_segments(w);
  for_each_run(static_cast<int64_t>(h_segments.size()), [&](int64_t h_first, int64_t h_last) {
    set_segments(plan.h, h_segments, h_first, h_last);
    for_each_run(static_cast<int64_t>(w_segments.size()), [&](int64_t w_first, int64_t w_last) {
      set_segments(plan.w, w_segments, w_first, w_last);
      use(static_cast<const CorrelatePlan&>(plan));
    });
  });
}

struct TapRange {
  int64_t tap, start, size;
};

// The taps of an axis, those that are valid at more positions first: as with rectangles, for the last wave.
inline std::vector<TapRange> largest_first(const Axis& axis) {
  std::vector<TapRange> taps;
  for (int64_t t = 0; t < axis.taps; ++t) {
    int64_t start, stop;
    tap_range(axis, t, start, stop);
    taps.push_back({t, start, stop - start});
  }
  std::stable_sort(taps.begin(), taps.end(), [](const TapRange& a, const TapRange& b) { return a.size > b.size; });
  return taps;
}

inline void set_taps(TapAxis& plan, const std::vector<TapRange>& taps, int64_t first, int64_t last) {
  plan.count = last - first;
  for (int64_t i = first; i < last; ++i) {
    const TapRange& range = taps[static_cast<size_t>(i)];
    plan.tap[i - first] = range.tap;
    plan.start[i - first] = range.start;
    plan.size[i - first] = range.size;
  }
}

}  // namespace detail

// Calls use(plan) for each launch of the forward pass.
template <typename Use>
void for_each_forward_plan(const Conv2dShape& s, const Strides& input, const Strides& weight, const Strides& output,
                           Use use) {
  if (s.batch == 0 || s.out_channels == 0) return;
  const Axis h = forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const Axis w = forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  CorrelatePlan plan{};
  plan.batch = s.batch;
  plan.groups = s.groups;
  plan.dst_channels = s.out_channels / s.groups;
  plan.src_channels = s.in_channels / s.groups;
  plan.src_offset = h.src_offset * input.h + w.src_offset * input.w;
  plan.dst_n = output.n, plan.dst_c = output.c;
  plan.src_n = input.n, plan.src_c = input.c;
  plan.weight_dst = weight.n, plan.weight_src = weight.c;
  plan.weight_group = plan.dst_channels * weight.n;
  plan.h.dst_stride = output.h, plan.w.dst_stride = output.w;
  plan.h.src_stride = h.src_step * input.h, plan.w.src_stride = w.src_step * input.w;
  plan.h.src_tap_stride = h.tap_step * input.h, plan.w.src_tap_stride = w.tap_step * input.w;
  plan.h.weight_tap_stride = weight.h, plan.w.weight_tap_stride = weight.w;
  detail::for_each_rectangle_run(plan, h, w, use);
}

// Calls use(plan) for each launch of the input gradient: at least one per residue of the stride.
template <typename Use>
void for_each_input_plan(const Conv2dShape& s, const Strides& weight, const Strides& grad_output,
                         const Strides& grad_input, Use use) {
  if (s.batch == 0 || s.in_channels == 0) return;
  CorrelatePlan plan{};
  plan.batch = s.batch;
  plan.groups = s.groups;
  plan.dst_channels = s.in_channels / s.groups;
  plan.src_channels = s.out_channels / s.groups;
  plan.dst_n = grad_input.n, plan.dst_c = grad_input.c;
  plan.src_n = grad_output.n, plan.src_c = grad_output.c;
  plan.weight_dst = weight.c, plan.weight_src = weight.n;
  plan.weight_group = plan.src_channels * weight.n;
  plan.h.dst_stride = s.stride_h * grad_input.h, plan.w.dst_stride = s.stride_w * grad_input.w;
  for (int64_t rh = 0; rh < std::min(s.stride_h, s.in_h); ++rh) {
    const InputGradAxis h =
        input_grad_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h, rh);
    plan.h.src_stride = h.axis.src_step * grad_output.h;
    plan.h.src_tap_stride = h.axis.tap_step * grad_output.h;
    plan.h.weight_tap_stride = h.tap_stride * weight.h;
    for (int64_t rw = 0; rw < std::min(s.stride_w, s.in_w); ++rw) {
      const InputGradAxis w =
          input_grad_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w, rw);
      plan.w.src_stride = w.axis.src_step * grad_output.w;
      plan.w.src_tap_stride = w.axis.tap_step * grad_output.w;
      plan.w.weight_tap_stride = w.tap_stride * weight.w;
      plan.dst_offset = rh * grad_input.h + rw * grad_input.w;
      plan.src_offset = h.axis.src_offset * grad_output.h + w.axis.src_offset * grad_output.w;
      plan.weight_offset = h.first_tap * weight.h + w.first_tap * weight.w;
      detail::for_each_rectangle_run(plan, h.axis, w.axis, use);
    }
  }
}

// Calls use(plan) for each launch of the weight gradient (one, unless the kernel has more taps than a plan holds).
template <typename Use>
void for_each_weight_plan(const Conv2dShape& s, const Strides& input, const Strides& grad_output, int64_t splits,
                          Use use) {
  const Axis h = forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const Axis w = forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  WeightPlan plan{};
  plan.batch = s.batch;
  plan.groups = s.groups;
  plan.out_channels = s.out_channels / s.groups;
  plan.in_channels = s.in_channels / s.groups;
  plan.src_offset = h.src_offset * input.h + w.src_offset * input.w;
  plan.grad_n = grad_output.n, plan.grad_c = grad_output.c;
  plan.src_n = input.n, plan.src_c = input.c;
  plan.splits = splits;
  const auto set_strides = [](TapAxis& taps, const Axis& axis, int64_t grad_stride, int64_t input_stride) {
    taps.kernel = axis.taps;
    taps.grad_stride = grad_stride;
    taps.src_stride = axis.src_step * input_stride;
    taps.src_tap_stride = axis.tap_step * input_stride;
  };
  set_strides(plan.h, h, grad_output.h, input.h);
  set_strides(plan.w, w, grad_output.w, input.w);
  const std::vector<detail::TapRange> h_taps = detail::largest_first(h), w_taps = detail::largest_first(w);
  detail::for_each_run(h.taps, [&](int64_t h_first, int64_t h_last) {
    detail::set_taps(plan.h, h_taps, h_first, h_last);
    detail::for_each_run(w.taps, [&](int64_t w_first, int64_t w_last) {
      detail::set_taps(plan.w, w_taps, w_first, w_last);
      use(static_cast<const WeightPlan&>(plan));
    });
  });
}

// How many partial sums the pixel loop of a weight gradient is cut into: enough blocks to fill a large GPU, each with
// enough pixels to be worth a launch slot. A function of the problem only, so that results do not depend on the GPU.
inline int64_t weight_splits(int64_t blocks_per_split, int64_t pixels, int64_t smallest_run, int64_t wanted_blocks = 1024) {
  constexpr int64_t most = 1024;
  const int64_t by_blocks = ceil_divide(wanted_blocks, std::max<int64_t>(blocks_per_split, 1));
  return std::clamp<int64_t>(std::min(by_blocks, ceil_divide(pixels, smallest_run)), 1, most);
}

// Second pass of a weight gradient: grad_weight = sum over splits, in ascending order, of the partial sums
// [splits, kernel_h * kernel_w, out_channels, in_channels / groups].
void sum_partials(const Conv2dShape& shape, DType dtype, const void* partials, int64_t splits,
                  MutableTensor grad_weight, void* stream);

}  // namespace atrous::cuda
