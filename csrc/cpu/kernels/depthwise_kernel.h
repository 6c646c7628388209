// Depthwise inner loops and data movement. Included only by the files of kernels/, inside the namespace of its instruction set.

// NHWC, any geometry: the pixels of a block share each load of the weights. Eight sums hide the latency of an addition.
template <class T, int pixels, int vectors>
inline void depthwise_block(const DepthwiseRun& run, int64_t pixel, int64_t channel) {
  using Acc = Accumulator<T>;
  constexpr int width = lanes<Acc>;
  const T* src = static_cast<const T*>(run.src) + pixel * run.src_step + channel;
  const Acc* weight = static_cast<const Acc*>(run.weight) + channel;
  T* dst = static_cast<T*>(run.dst) + pixel * run.dst_step + channel;
  Vec<Acc> sum[pixels][vectors];
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) {
    const Vec<Acc> bias = load(static_cast<const Acc*>(run.bias) + channel + j * width);
#pragma GCC unroll 8
    for (int p = 0; p < pixels; ++p) sum[p][j] = bias;
  }
  for (int64_t row = 0; row < run.tap_rows; ++row, src += run.src_tap_row, weight += run.weight_tap_row) {
    const T* from = src;
    const Acc* w = weight;
    for (int64_t column = 0; column < run.tap_columns; ++column, from += run.src_tap_column, w += run.channels) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        const Vec<Acc> tap = load(w + j * width);
#pragma GCC unroll 8
        for (int p = 0; p < pixels; ++p) sum[p][j] += load(from + p * run.src_step + j * width) * tap;
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j)
      store(dst + p * run.dst_step + j * width, run.clamp.on ? between<Acc>(sum[p][j], run.clamp.low, run.clamp.high) : sum[p][j]);
  }
}

// NHWC, neighbouring taps read neighbouring pixels: each pixel is loaded once per row of the kernel, whose weights stay in
// registers.
template <class T, int pixels, int taps>
inline void depthwise_window(const DepthwiseRun& run, int64_t pixel, int64_t channel) {
  using Acc = Accumulator<T>;
  const T* src = static_cast<const T*>(run.src) + pixel * run.src_step + channel;
  const Acc* weight = static_cast<const Acc*>(run.weight) + channel;
  T* dst = static_cast<T*>(run.dst) + pixel * run.dst_step + channel;
  Vec<Acc> sum[pixels];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) sum[p] = load(static_cast<const Acc*>(run.bias) + channel);
  for (int64_t row = 0; row < run.tap_rows; ++row, src += run.src_tap_row, weight += run.weight_tap_row) {
    Vec<Acc> w[taps];
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) w[t] = load(weight + t * run.channels);
#pragma GCC unroll 16
    for (int q = 0; q < pixels + taps - 1; ++q) {
      const Vec<Acc> value = load(src + q * run.src_step);
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t)
        if (q >= t && q - t < pixels) sum[q - t] += value * w[t];
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) store(dst + p * run.dst_step, run.clamp.on ? between<Acc>(sum[p], run.clamp.low, run.clamp.high) : sum[p]);
}

// All channels of `pixels` pixels: blocks of `vectors` vectors, then of fewer.
template <class T, int pixels, int vectors>
inline int64_t depthwise_channels(const DepthwiseRun& run, int64_t pixel, int64_t channel) {
  constexpr int width = lanes<Accumulator<T>>;
  for (; channel + vectors * width <= run.channels; channel += vectors * width)
    depthwise_block<T, pixels, vectors>(run, pixel, channel);
  if constexpr (vectors > 1) return depthwise_channels<T, pixels, vectors / 2>(run, pixel, channel);
  return channel;
}

template <class T, int pixels> inline void depthwise_pixels(const DepthwiseRun& run, int64_t pixel) {
  using Acc = Accumulator<T>;
  constexpr int width = lanes<Acc>;
  const bool window = run.src_tap_column == run.src_step;
  int64_t channel = 0;
  if (pixels >= 4 && window && run.tap_columns == 3) {
    for (; channel + width <= run.channels; channel += width) depthwise_window<T, pixels, 3>(run, pixel, channel);
  } else if (pixels >= 4 && window && run.tap_columns == 5) {
    for (; channel + width <= run.channels; channel += width) depthwise_window<T, pixels, 5>(run, pixel, channel);
  } else {
    channel = depthwise_channels<T, pixels, 8 / pixels>(run, pixel, 0);
  }
  if (channel == run.channels) return;
  if (run.channels >= width) {  // the last vector overlaps its neighbour: those lanes are written twice, alike
    depthwise_block<T, pixels, 1>(run, pixel, run.channels - width);
    return;
  }
  for (; channel < run.channels; ++channel) {
    for (int64_t p = pixel; p < pixel + pixels; ++p) {
      Acc sum = static_cast<const Acc*>(run.bias)[channel];
      for (int64_t row = 0; row < run.tap_rows; ++row) {
        const T* src = static_cast<const T*>(run.src) + p * run.src_step + row * run.src_tap_row + channel;
        const Acc* weight = static_cast<const Acc*>(run.weight) + row * run.weight_tap_row + channel;
        for (int64_t column = 0; column < run.tap_columns; ++column)
          sum += value_of(src[column * run.src_tap_column]) * weight[column * run.channels];
      }
      if (run.clamp.on) sum = between<Acc>(sum, run.clamp.low, run.clamp.high);
      assign(static_cast<T*>(run.dst) + p * run.dst_step + channel, sum);
    }
  }
}

template <class T> void depthwise_run(const DepthwiseRun& run) {
  // At rate r, every r-th pixel shares its source pixels with the next but r: r runs of neighbouring taps.
  const int64_t rate = run.src_tap_column / run.src_step;
  const bool interleaved = rate > 1 && run.src_tap_column == rate * run.src_step && run.pixels >= 4 * rate;
  if (interleaved && (run.tap_columns == 3 || run.tap_columns == 5)) {
    for (int64_t phase = 0; phase < rate; ++phase) {
      DepthwiseRun one = run;
      one.pixels = (run.pixels - phase + rate - 1) / rate;
      one.src = static_cast<const T*>(run.src) + phase * run.src_step;
      one.dst = static_cast<T*>(run.dst) + phase * run.dst_step;
      one.src_step = rate * run.src_step;
      one.dst_step = rate * run.dst_step;
      depthwise_run<T>(one);
    }
    return;
  }
  int64_t pixel = 0;
  for (; pixel + 8 <= run.pixels; pixel += 8) depthwise_pixels<T, 8>(run, pixel);
  // One more block of eight, which writes some pixels twice, alike, costs less than blocks of four, two and one.
  if (run.pixels > 8 && run.pixels - pixel > 4) return depthwise_pixels<T, 8>(run, run.pixels - 8);
  for (; pixel + 4 <= run.pixels; pixel += 4) depthwise_pixels<T, 4>(run, pixel);
  for (; pixel + 2 <= run.pixels; pixel += 2) depthwise_pixels<T, 2>(run, pixel);
  for (; pixel < run.pixels; ++pixel) depthwise_pixels<T, 1>(run, pixel);
}

// NHWC weight gradient: the sums of a few taps and vectors of channels stay in registers along the row.
template <class T, int taps, int vectors>
inline void depthwise_weight_block(const DepthwiseWeightRun& run, int64_t first_tap, int64_t channel) {
  using Acc = Accumulator<T>;
  constexpr int width = lanes<Acc>;
  const T* src = static_cast<const T*>(run.src) + first_tap * run.src_tap_step + channel;
  const T* grad = static_cast<const T*>(run.grad) + channel;
  Acc* to = static_cast<Acc*>(run.sum) + first_tap * run.sum_step + channel;
  Vec<Acc> sum[taps][vectors] = {};
  for (int64_t p = 0; p < run.pixels; ++p, src += run.src_step, grad += run.grad_step) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const Vec<Acc> g = load(grad + j * width);
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) sum[t][j] += load(src + t * run.src_tap_step + j * width) * g;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < taps; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      Acc* at = to + t * run.sum_step + j * width;
      store(at, load(at) + sum[t][j]);
    }
  }
}

template <class T, int taps> inline void depthwise_weight_taps(const DepthwiseWeightRun& run, int64_t first_tap) {
  using Acc = Accumulator<T>;
  constexpr int width = lanes<Acc>;
  int64_t channel = 0;
  for (; channel + 2 * width <= run.channels; channel += 2 * width)
    depthwise_weight_block<T, taps, 2>(run, first_tap, channel);
  for (; channel + width <= run.channels; channel += width) depthwise_weight_block<T, taps, 1>(run, first_tap, channel);
  for (; channel < run.channels; ++channel) {
    for (int64_t t = first_tap; t < first_tap + taps; ++t) {
      const T* src = static_cast<const T*>(run.src) + t * run.src_tap_step + channel;
      const T* grad = static_cast<const T*>(run.grad) + channel;
      Acc sum = 0;
      for (int64_t p = 0; p < run.pixels; ++p) sum += value_of(src[p * run.src_step]) * value_of(grad[p * run.grad_step]);
      static_cast<Acc*>(run.sum)[t * run.sum_step + channel] += sum;
    }
  }
}

template <class T> void depthwise_weight_run(const DepthwiseWeightRun& run) {
  int64_t tap = 0;
  for (; tap + 5 <= run.taps; tap += 5) depthwise_weight_taps<T, 5>(run, tap);
  for (; tap + 3 <= run.taps; tap += 3) depthwise_weight_taps<T, 3>(run, tap);
  for (; tap < run.taps; ++tap) depthwise_weight_taps<T, 1>(run, tap);
}

// NCHW: vectors along the row; the rows and vectors of a block share each load of a weight.
template <class T, int rows, int vectors> inline void correlate_block(const PlaneCorrelation& plane, int64_t y, int64_t x) {
  constexpr int width = lanes<T>;
  const T* src = static_cast<const T*>(plane.src) + y * plane.src_row + x;
  const T* weight = static_cast<const T*>(plane.weight);
  T* dst = static_cast<T*>(plane.dst) + y * plane.dst_row + x;
  Vec<T> sum[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sum[r][j] = Vec<T>{} + *static_cast<const T*>(plane.bias);
  }
  for (int64_t tap = 0; tap < plane.taps; ++tap) {
    const T* from = src + plane.src_offset[tap];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sum[r][j] += load(from + r * plane.src_row + j * width) * weight[tap];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j)
      store(dst + r * plane.dst_row + j * width,
            plane.clamp.on ? between<T>(sum[r][j], plane.clamp.low, plane.clamp.high) : sum[r][j]);
  }
}

template <class T, int rows> inline void correlate_rows(const PlaneCorrelation& plane, int64_t y) {
  constexpr int width = lanes<T>;
  int64_t x = 0;
  for (; x + width < plane.columns; x += 2 * width) correlate_block<T, rows, 2>(plane, y, x);
  if (x < plane.columns) correlate_block<T, rows, 1>(plane, y, x);
}

template <class T> void correlate_plane(const PlaneCorrelation& plane) {
  int64_t y = 0;
  for (; y + 4 <= plane.rows; y += 4) correlate_rows<T, 4>(plane, y);
  for (; y < plane.rows; ++y) correlate_rows<T, 1>(plane, y);
}

// The sum has one order whatever the rows at a time: row after row in each of four interleaved sums.
template <class T> void dot_plane(const PlaneDot& plane) {
  constexpr int width = lanes<T>;
  Vec<T> lane;
  for (int i = 0; i < width; ++i) lane[i] = static_cast<T>(i);
  const auto in_tail = lane < static_cast<T>(plane.columns % width);
  const int64_t whole = plane.columns - plane.columns % width;
  const T* a = static_cast<const T*>(plane.a);
  const T* b = static_cast<const T*>(plane.b);
  const Vec<T> none{};
  Vec<T> sum[4] = {};
  int64_t y = 0;
  for (; y + 4 <= plane.rows; y += 4, a += 4 * plane.a_row, b += 4 * plane.b_row) {
    for (int64_t x = 0; x < whole; x += width) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sum[r] += load(a + r * plane.a_row + x) * load(b + r * plane.b_row + x);
    }
    if (whole == plane.columns) continue;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      sum[r] += in_tail ? load(a + r * plane.a_row + whole) * load(b + r * plane.b_row + whole) : none;
  }
  for (; y < plane.rows; ++y, a += plane.a_row, b += plane.b_row) {
    for (int64_t x = 0; x < whole; x += width) sum[0] += load(a + x) * load(b + x);
    if (whole < plane.columns) sum[0] += in_tail ? load(a + whole) * load(b + whole) : none;
  }
  T* to = static_cast<T*>(plane.lanes_sum);
  store(to, load(to) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

// Data movement: squares through registers, the rest one by one.
template <class From, class To>
void transpose(int64_t rows, int64_t columns, const From* src, int64_t src_step, To* dst, int64_t dst_step) {
  using Value = Accumulator<From>;
  constexpr int width = lanes<Value>;
  int64_t i = 0;
  for (; i + width <= rows; i += width) {
    int64_t j = 0;
    for (; j + width <= columns; j += width) {
      Vec<Value> square[width];
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) square[r] = load(src + (i + r) * src_step + j);
      transpose_square<Value>(square);
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) store(dst + (j + r) * dst_step + i, square[r]);
    }
    for (; j < columns; ++j)
      for (int r = 0; r < width; ++r) assign(dst + j * dst_step + i + r, value_of(src[(i + r) * src_step + j]));
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) assign(dst + j * dst_step + i, value_of(src[i * src_step + j]));
}

template <class From, class To> void convert(int64_t size, const From* src, To* dst) {
  constexpr int width = lanes<float>;
  int64_t i = 0;
  for (; i + width <= size; i += width) store(dst + i, load(src + i));
  for (; i < size; ++i) assign(dst + i, value_of(src[i]));
}
