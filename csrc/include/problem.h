// A convolution as numbers: which taps are valid where. Shared by the CPU and the CUDA kernels; no torch headers.
//
// The same arithmetic in Python is atrous_kernels/problem.py; tests/test_problem.py holds the two against each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace atrous {

// Positions [start, stop) of the written axis whose valid taps are exactly [tap_start, tap_stop).
// A tap is valid where it reads inside the source; the valid taps of one position are always contiguous.
struct Segment {
  int64_t start, stop;
  int64_t tap_start, tap_stop;
};

// One spatial axis seen from the tensor that is written: position o reads source o * src_step + src_offset + t * tap_step
// for taps t in [0, taps). Padding is a negative src_offset. This one form covers the forward pass (src_step = stride,
// src_offset = -padding, tap_step = dilation) and, per residue of the stride, the input gradient (src_step = 1).
struct Axis {
  int64_t n_out;       // positions written
  int64_t n_src;       // positions readable
  int64_t taps;
  int64_t src_step;
  int64_t src_offset;
  int64_t tap_step;    // may be negative
};

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - ((a % b != 0) && ((a < 0) != (b < 0))); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
inline int64_t round_up(int64_t size, int64_t step) { return ceil_div(size, step) * step; }

// The positions [first, last) at which tap t reads inside the source.
inline void tap_range(const Axis& axis, int64_t t, int64_t& first, int64_t& last) {
  const int64_t offset = axis.src_offset + t * axis.tap_step;
  first = std::clamp<int64_t>(ceil_div(-offset, axis.src_step), 0, axis.n_out);
  last = std::clamp<int64_t>(ceil_div(axis.n_src - offset, axis.src_step), first, axis.n_out);
}

// Cuts [0, n_out) where the set of valid taps changes. Segments without any valid tap are kept (tap_start == tap_stop):
// their outputs still have to be written.
inline std::vector<Segment> axis_segments(const Axis& axis) {
  std::vector<int64_t> cuts{0, axis.n_out};
  for (int64_t t = 0; t < axis.taps; ++t) {
    int64_t first, last;
    tap_range(axis, t, first, last);
    cuts.push_back(first);
    cuts.push_back(last);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<Segment> segments;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    Segment s{cuts[i], cuts[i + 1], 0, 0};
    bool any = false;
    for (int64_t t = 0; t < axis.taps; ++t) {
      int64_t first, last;
      tap_range(axis, t, first, last);
      if (first <= s.start && s.start < last) {
        if (!any) s.tap_start = t;
        any = true;
        s.tap_stop = t + 1;
      }
    }
    if (!segments.empty() && segments.back().tap_start == s.tap_start && segments.back().tap_stop == s.tap_stop)
      segments.back().stop = s.stop;
    else
      segments.push_back(s);
  }
  return segments;
}

inline Axis forward_axis(int64_t n_in, int64_t n_out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return Axis{n_out, n_in, kernel, stride, -padding, dilation};
}

// The input gradient for the input positions stride * q + residue: which taps contribute, and where they read.
// Tap first_tap + j * tap_stride of the kernel contributes at output position q + axis.src_offset + j * axis.tap_step.
struct InputGradAxis {
  Axis axis;
  int64_t first_tap, tap_stride;
};

inline InputGradAxis input_grad_axis(int64_t n_in, int64_t n_out, int64_t kernel, int64_t stride, int64_t padding,
                                     int64_t dilation, int64_t residue) {
  const int64_t positions = residue < n_in ? ceil_div(n_in - residue, stride) : 0;
  // Input i meets tap t at output (i + padding - t * dilation) / stride, if that divides.
  int64_t first = 0;
  while (first < kernel && (residue + padding - first * dilation) % stride != 0) ++first;
  int64_t period = 1;
  while ((period * dilation) % stride != 0) ++period;
  const int64_t taps = first < kernel ? ceil_div(kernel - first, period) : 0;
  const int64_t offset = floor_div(residue + padding - first * dilation, stride);
  return InputGradAxis{Axis{positions, n_out, taps, 1, offset, -(period * dilation / stride)}, first, period};
}

}  // namespace atrous
