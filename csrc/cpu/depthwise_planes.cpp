// Depthwise convolution plane by plane: vectors run along the rows of one channel.
//
// A plane is staged in the accumulator type with its columns split by their residue modulo the step of the source
// (x = step * i + residue goes to [residue][i]), so that a strided convolution reads neighbours too. Rows of a staged
// plane carry some slack: kernels read and write whole vectors, and what runs past a rectangle is overwritten or ignored.
#include "depthwise.h"

namespace atrous::cpu {
namespace {

// Where a source column lies in a staged row.
struct PhaseRow {
  int64_t step, length;  // columns of one residue, with slack
  PhaseRow(const Axis& w) : step(w.src_step), length(ceil_div(w.n_src, w.src_step) + slack) {}
  int64_t size() const { return step * length; }
  // of source column o * step + offset, relative to o
  int64_t at(int64_t offset) const {
    const int64_t whole = floor_div(offset, step);
    return (offset - whole * step) * length + whole;
  }
};

// An axis with its border made part of the source, so that all taps are valid everywhere. For the narrow borders of usual
// kernels one rectangle with a few zeros is faster than many rectangles of a column or two; wide ones stay outside.
struct Border {
  int64_t before, after;
  Border(Axis& axis) : before(0), after(0) {
    if (axis.taps == 0 || axis.n_out == 0) return;
    const int64_t first = axis.src_offset, last = (axis.n_out - 1) * axis.src_step + first + (axis.taps - 1) * axis.tap_step;
    constexpr int64_t widest = 8;
    const int64_t low = std::max<int64_t>(-first, 0), high = std::max<int64_t>(last + 1 - axis.n_src, 0);
    if (low > widest || high > widest) return;
    before = low;
    after = high;
    axis.n_src += before + after;
    axis.src_offset += before;
  }
};

// Source [rows, columns] into the staged plane, inside its border.
template <class S>
void stage_plane(const S* from, const Strides& s, int64_t rows, int64_t columns, int64_t border_h, int64_t border_w,
                 const PhaseRow& phase, Accumulator<S>* to) {
  using Acc = Accumulator<S>;
  to += border_h * phase.size();
  for (int64_t y = 0; y < rows; ++y, from += s.h, to += phase.size()) {
    if (phase.step == 1 && s.w == 1) {
      copy_row(columns, from, to + border_w);
      continue;
    }
    for (int64_t first = 0; first < phase.step; ++first) {
      Acc* row = to + phase.at(border_w + first);
      for (int64_t x = first; x < columns; x += phase.step) *row++ = convert_value<S, Acc>(from[x * s.w]);
    }
  }
}

template <class S> void correlate(const Correlation& job) {
  using Acc = Accumulator<S>;
  const int64_t channels = job.groups, taps = job.taps();
  const Strides &s = job.src.strides, &d = job.dst.strides;
  Axis h = job.h, w = job.w;
  const Border border_h(h), border_w(w);
  const PhaseRow phase(w);
  const int64_t dst_row = job.w.n_out + slack;
  Scratch scratch(static_cast<size_t>((taps + 1) * channels) * sizeof(Acc));
  Acc* weight = scratch.as<Acc>();
  Acc* bias = weight + taps * channels;
  pack_depthwise_weight<S>(job, weight, taps, 1);
  pack_depthwise_bias<S>(job, bias);

  // Rectangles with the offsets of their taps, the same for every plane.
  struct Rectangle {
    Segment h, w;
    std::vector<int64_t> offset, tap;
  };
  std::vector<Rectangle> rectangles;
  for (const Segment& rows : axis_segments(h))
    for (const Segment& columns : axis_segments(w)) {
      Rectangle r{rows, columns, {}, {}};
      for (int64_t i = rows.tap_start; i < rows.tap_stop; ++i)
        for (int64_t j = columns.tap_start; j < columns.tap_stop; ++j) {
          const int64_t y = rows.start * h.src_step + h.src_offset + i * h.tap_step;
          r.offset.push_back(y * phase.size() + phase.at(w.src_offset + j * w.tap_step) + columns.start);
          r.tap.push_back(i * w.taps + j);
        }
      rectangles.push_back(std::move(r));
    }

  parallel(job.batch * channels, threads_for(memory_weight * job.flops()), [&](int64_t begin, int64_t end) {
    Scratch staged(static_cast<size_t>(h.n_src * phase.size() + slack) * sizeof(Acc));
    Scratch result(static_cast<size_t>(job.h.n_out * dst_row + slack) * sizeof(Acc));
    std::fill_n(staged.as<Acc>(), h.n_src * phase.size(), Acc{0});  // the border stays so
    std::vector<Acc> weights(taps);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / channels, c = plane % channels;
      stage_plane(static_cast<const S*>(job.src.data) + n * s.n + c * s.c, s, job.h.n_src, job.w.n_src,
                  border_h.before, border_w.before, phase, staged.as<Acc>());
      for (const Rectangle& r : rectangles) {
        for (size_t i = 0; i < r.tap.size(); ++i) weights[i] = weight[c * taps + r.tap[i]];
        plane_kernels<Acc>().correlate(PlaneCorrelation{
            r.h.stop - r.h.start, r.w.stop - r.w.start, static_cast<int64_t>(r.tap.size()), staged.as<Acc>(),
            h.src_step * phase.size(), r.offset.data(), weights.data(), bias + c,
            result.as<Acc>() + r.h.start * dst_row + r.w.start, dst_row, clamp_of(job)});
      }
      S* to = static_cast<S*>(job.dst.data) + n * d.n + c * d.c;
      copy_matrix(job.h.n_out, job.w.n_out, result.as<Acc>(), dst_row, 1, to, d.h, d.w);
    }
  });
}

template <class S>
void weight_gradient(const Conv2dShape& shape, ConstTensor input, ConstTensor grad, MutableTensor grad_weight) {
  using Acc = Accumulator<S>;
  const Axis h = forward_axis(shape.in_h, shape.out_h, shape.kernel_h, shape.stride_h, shape.padding_h, shape.dilation_h);
  const Axis w = forward_axis(shape.in_w, shape.out_w, shape.kernel_w, shape.stride_w, shape.padding_w, shape.dilation_w);
  const int64_t channels = shape.groups, taps = h.taps * w.taps;
  const PhaseRow phase(w), grad_phase(Axis{0, shape.out_w, 0, 1, 0, 1});
  const double work = 2.0 * static_cast<double>(shape.batch * shape.out_h * shape.out_w) * static_cast<double>(channels * taps);

  // One channel is one task, its images in order: nothing is added across threads.
  parallel(channels, threads_for(memory_weight * work), [&](int64_t begin, int64_t end) {
    Scratch staged(static_cast<size_t>(h.n_src * phase.size() + slack) * sizeof(Acc));
    Scratch staged_grad(static_cast<size_t>(shape.out_h * grad_phase.size() + slack) * sizeof(Acc));
    std::vector<Acc> sums(taps * slack);
    const Strides &s = input.strides, &g = grad.strides, &d = grad_weight.strides;
    for (int64_t c = begin; c < end; ++c) {
      std::fill(sums.begin(), sums.end(), Acc{0});
      for (int64_t n = 0; n < shape.batch; ++n) {
        const S* source = static_cast<const S*>(input.data) + n * s.n + c * s.c;
        const S* gradient = static_cast<const S*>(grad.data) + n * g.n + c * g.c;
        stage_plane(source, s, h.n_src, w.n_src, 0, 0, phase, staged.as<Acc>());
        stage_plane(gradient, g, shape.out_h, shape.out_w, 0, 0, grad_phase, staged_grad.as<Acc>());
        for (int64_t tap = 0; tap < taps; ++tap) {
          int64_t y, y_end, x, x_end;
          tap_range(h, tap / w.taps, y, y_end);
          tap_range(w, tap % w.taps, x, x_end);
          if (y == y_end || x == x_end) continue;
          const int64_t y0 = y * h.src_step + h.src_offset + tap / w.taps * h.tap_step;
          plane_kernels<Acc>().dot(PlaneDot{
              y_end - y, x_end - x,
              staged.as<Acc>() + y0 * phase.size() + phase.at(w.src_offset + tap % w.taps * w.tap_step) + x,
              staged_grad.as<Acc>() + y * grad_phase.size() + x, h.src_step * phase.size(), grad_phase.size(),
              sums.data() + tap * slack});
        }
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        Acc total = 0;
        for (int64_t lane = 0; lane < slack; ++lane) total += sums[tap * slack + lane];
        static_cast<S*>(grad_weight.data)[c * d.n + tap / w.taps * d.h + tap % w.taps * d.w] = convert_value<Acc, S>(total);
      }
    }
  });
}

}  // namespace

void depthwise_correlate(const Correlation& job, DType dtype) {
  if (job.src.strides.c == 1 && job.dst.strides.c == 1) return depthwise_correlate_nhwc(job, dtype);
  if (dtype == DType::float32) return correlate<float>(job);
  if (dtype == DType::float64) return correlate<double>(job);
  correlate<bf16>(job);
}

void depthwise_weight_gradient(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                               MutableTensor grad_weight) {
  if (input.strides.c == 1 && grad_output.strides.c == 1)
    return depthwise_weight_gradient_nhwc(shape, dtype, input, grad_output, grad_weight);
  if (dtype == DType::float32) return weight_gradient<float>(shape, input, grad_output, grad_weight);
  if (dtype == DType::float64) return weight_gradient<double>(shape, input, grad_output, grad_weight);
  weight_gradient<bf16>(shape, input, grad_output, grad_weight);
}

}  // namespace atrous::cpu
