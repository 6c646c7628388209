// Depthwise inner loops and data movement. Included only by kernels.cpp, inside the namespace of its instruction set.

// NHWC: four pixels share each load of the weights.
template <class T, int pixels, int vectors>
inline void depthwise_block(const DepthwiseRun& run, int64_t pixel, int64_t channel) {
  using Acc = Accumulator<T>;
  constexpr int width = lanes<Acc>;
  const T* src = static_cast<const T*>(run.src) + pixel * run.src_step + channel;
  T* dst = static_cast<T*>(run.dst) + pixel * run.dst_step + channel;
  Vec<Acc> sum[pixels][vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    const Vec<Acc> bias = load(static_cast<const Acc*>(run.bias) + channel + j * width);
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p) sum[p][j] = bias;
  }
  for (int64_t tap = 0; tap < run.taps; ++tap) {
    const Acc* weight = static_cast<const Acc*>(run.weight[tap]) + channel;
    const T* from = src + run.src_offset[tap];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const Vec<Acc> w = load(weight + j * width);
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) sum[p][j] += load(from + p * run.src_step + j * width) * w;
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(dst + p * run.dst_step + j * width, sum[p][j]);
  }
}

template <class T, int pixels> inline void depthwise_pixels(const DepthwiseRun& run, int64_t pixel) {
  using Acc = Accumulator<T>;
  constexpr int width = lanes<Acc>;
  int64_t channel = 0;
  for (; channel + 2 * width <= run.channels; channel += 2 * width) depthwise_block<T, pixels, 2>(run, pixel, channel);
  for (; channel + width <= run.channels; channel += width) depthwise_block<T, pixels, 1>(run, pixel, channel);
  if (channel == run.channels) return;
  if (run.channels >= width) {  // the last vector overlaps its neighbour: those lanes are written twice, alike
    depthwise_block<T, pixels, 1>(run, pixel, run.channels - width);
    return;
  }
  for (; channel < run.channels; ++channel) {
    for (int64_t p = pixel; p < pixel + pixels; ++p) {
      Acc sum = static_cast<const Acc*>(run.bias)[channel];
      for (int64_t tap = 0; tap < run.taps; ++tap)
        sum += value_of(static_cast<const T*>(run.src)[p * run.src_step + run.src_offset[tap] + channel]) *
               static_cast<const Acc*>(run.weight[tap])[channel];
      assign(static_cast<T*>(run.dst) + p * run.dst_step + channel, sum);
    }
  }
}

template <class T> void depthwise_run(const DepthwiseRun& run) {
  int64_t pixel = 0;
  for (; pixel + 4 <= run.pixels; pixel += 4) depthwise_pixels<T, 4>(run, pixel);
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

// NCHW: vectors along the row, several rows at a time share each load of a weight.
template <class T, int rows> inline void correlate_rows(const PlaneCorrelation& plane, int64_t y) {
  constexpr int width = lanes<T>;
  const T* src = static_cast<const T*>(plane.src) + y * plane.src_row;
  const T* weight = static_cast<const T*>(plane.weight);
  T* dst = static_cast<T*>(plane.dst) + y * plane.dst_row;
  for (int64_t x = 0; x < plane.columns; x += width) {
    Vec<T> sum[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sum[r] = Vec<T>{} + *static_cast<const T*>(plane.bias);
    for (int64_t tap = 0; tap < plane.taps; ++tap) {
      const T* from = src + plane.src_offset[tap] + x;
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum[r] += load(from + r * plane.src_row) * weight[tap];
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) store(dst + r * plane.dst_row + x, sum[r]);
  }
}

template <class T> void correlate_plane(const PlaneCorrelation& plane) {
  int64_t y = 0;
  for (; y + 4 <= plane.rows; y += 4) correlate_rows<T, 4>(plane, y);
  for (; y < plane.rows; ++y) correlate_rows<T, 1>(plane, y);
}

template <class T> void dot_plane(const PlaneDot& plane) {
  constexpr int width = lanes<T>;
  Vec<T> lane;
  for (int i = 0; i < width; ++i) lane[i] = static_cast<T>(i);
  const auto in_tail = lane < static_cast<T>(plane.columns % width);
  const int64_t whole = plane.columns - plane.columns % width;
  Vec<T> sum = load(static_cast<const T*>(plane.lanes_sum)), tail{};
  for (int64_t y = 0; y < plane.rows; ++y) {
    const T* a = static_cast<const T*>(plane.a) + y * plane.a_row;
    const T* b = static_cast<const T*>(plane.b) + y * plane.b_row;
    for (int64_t x = 0; x < whole; x += width) sum += load(a + x) * load(b + x);
    if (whole < plane.columns) tail += in_tail ? load(a + whole) * load(b + whole) : Vec<T>{};
  }
  store(static_cast<T*>(plane.lanes_sum), sum + tail);
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
