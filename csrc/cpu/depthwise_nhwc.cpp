// Depthwise convolution with the channels of a pixel side by side: vectors run over channels.
#include "depthwise.h"

namespace atrous::cpu {
namespace {

// Rows of partial sums for the weight gradient: their number depends on the problem alone, so the order of every sum does.
constexpr int64_t most_parts = 32;
constexpr int64_t rows_per_part = 8;

template <class S> void correlate(const Correlation& job) {
  using Acc = Accumulator<S>;
  const int64_t channels = job.groups, taps = job.taps();
  const Strides &s = job.src.strides, &d = job.dst.strides;
  Scratch scratch(static_cast<size_t>((taps + 1) * channels) * sizeof(Acc));
  Acc* weight = scratch.as<Acc>();
  Acc* bias = weight + taps * channels;
  pack_depthwise_weight<S>(job, weight, 1, channels);
  pack_depthwise_bias<S>(job, bias);

  const std::vector<Segment> segments_h = axis_segments(job.h), segments_w = axis_segments(job.w);
  std::vector<size_t> segment_of(job.h.n_out);
  for (size_t i = 0; i < segments_h.size(); ++i)
    std::fill(segment_of.begin() + segments_h[i].start, segment_of.begin() + segments_h[i].stop, i);

  parallel(job.batch * job.h.n_out, threads_for(memory_weight * job.flops()), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / job.h.n_out, y = row % job.h.n_out;
      const Segment& h = segments_h[segment_of[y]];
      const int64_t y0 = y * job.h.src_step + job.h.src_offset + h.tap_start * job.h.tap_step;
      for (const Segment& w : segments_w) {
        const int64_t x0 = w.start * job.w.src_step + job.w.src_offset + w.tap_start * job.w.tap_step;
        depthwise_kernels<S>().run(DepthwiseRun{
            w.stop - w.start, channels, h.tap_stop - h.tap_start, w.tap_stop - w.tap_start,
            static_cast<const S*>(job.src.data) + (n * s.n + y0 * s.h + x0 * s.w), job.w.src_step * s.w,
            job.h.tap_step * s.h, job.w.tap_step * s.w, weight + (h.tap_start * job.w.taps + w.tap_start) * channels,
            job.w.taps * channels, bias, static_cast<S*>(job.dst.data) + (n * d.n + y * d.h + w.start * d.w), d.w,
            clamp_of(job)});
      }
    }
  });
}

template <class S>
void weight_gradient(const Conv2dShape& shape, ConstTensor input, ConstTensor grad, MutableTensor grad_weight) {
  using Acc = Accumulator<S>;
  const Axis h = forward_axis(shape.in_h, shape.out_h, shape.kernel_h, shape.stride_h, shape.padding_h, shape.dilation_h);
  const Axis w = forward_axis(shape.in_w, shape.out_w, shape.kernel_w, shape.stride_w, shape.padding_w, shape.dilation_w);
  const std::vector<Segment> segments_h = axis_segments(h), segments_w = axis_segments(w);
  const int64_t channels = shape.groups, taps = h.taps * w.taps, rows = shape.batch * shape.out_h;
  const int64_t parts = std::clamp<int64_t>(rows / rows_per_part, 1, most_parts);
  const Strides &s = input.strides, &g = grad.strides;
  Scratch scratch(static_cast<size_t>(parts * taps * channels) * sizeof(Acc));
  Acc* partial = scratch.as<Acc>();
  const double work = 2.0 * static_cast<double>(rows * shape.out_w) * static_cast<double>(channels * taps);

  parallel(parts, threads_for(memory_weight * work), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Acc* sum = partial + part * taps * channels;
      std::fill_n(sum, taps * channels, Acc{0});
      for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
        const int64_t n = row / shape.out_h, y = row % shape.out_h;
        for (const Segment& segment : segments_h) {
          if (y < segment.start || y >= segment.stop) continue;
          for (int64_t i = segment.tap_start; i < segment.tap_stop; ++i) {
            const int64_t y0 = y * h.src_step + h.src_offset + i * h.tap_step;
            for (const Segment& x : segments_w) {
              if (x.tap_start == x.tap_stop) continue;
              const int64_t x0 = x.start * w.src_step + w.src_offset + x.tap_start * w.tap_step;
              depthwise_kernels<S>().weight_run(DepthwiseWeightRun{
                  x.stop - x.start, channels, x.tap_stop - x.tap_start,
                  static_cast<const S*>(input.data) + (n * s.n + y0 * s.h + x0 * s.w),
                  static_cast<const S*>(grad.data) + (n * g.n + y * g.h + x.start * g.w), w.src_step * s.w,
                  w.tap_step * s.w, g.w, sum + (i * w.taps + x.tap_start) * channels, channels});
            }
          }
        }
      }
    }
  });

  const Strides& d = grad_weight.strides;
  for (int64_t tap = 0; tap < taps; ++tap) {
    Acc* total = partial + tap * channels;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t c = 0; c < channels; ++c) total[c] += partial[(part * taps + tap) * channels + c];
    S* to = static_cast<S*>(grad_weight.data) + tap / w.taps * d.h + tap % w.taps * d.w;
    for (int64_t c = 0; c < channels; ++c) to[c * d.n] = convert_value<Acc, S>(total[c]);
  }
}

}  // namespace

void depthwise_correlate_nhwc(const Correlation& job, DType dtype) {
  if (dtype == DType::float32) return correlate<float>(job);
  if (dtype == DType::float64) return correlate<double>(job);
  correlate<bf16>(job);
}

void depthwise_weight_gradient_nhwc(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                                    MutableTensor grad_weight) {
  if (dtype == DType::float32) return weight_gradient<float>(shape, input, grad_output, grad_weight);
  if (dtype == DType::float64) return weight_gradient<double>(shape, input, grad_output, grad_weight);
  weight_gradient<bf16>(shape, input, grad_output, grad_weight);
}

}  // namespace atrous::cpu
