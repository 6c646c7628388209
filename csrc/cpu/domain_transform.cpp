// A pass filters all rows, or all columns, of all planes, in tiles: a few sequences are copied side by side (rows are transposed),
// run forwards and backwards in the cache and copied back. A tile's weights serve all channels of its image. Every tile has one
// writer, which takes the channels in their order.
#include "domain_transform.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "domain_transform_kernels.h"
#include "typed.h"

namespace atrous::cpu {
namespace {

constexpr double operations_per_value = 12;         // of a pass, that reading, filtering and writing one value cost about as much as
constexpr int64_t tile_bytes = int64_t{1} << 19;    // of all tiles of a task: they stay in the second-level cache
constexpr int64_t widest_tile = 64;                 // sequences
constexpr double largest = 1e30;                    // rate or slope: the weight is 0, and it is a number in float
constexpr int64_t saved_bytes = int64_t{128} << 20; // of what a gradient keeps between its passes

template <class T> const TransformKernels<T>& transform_kernels() {
  const TransformTable& all = table<TransformTable>();
  if constexpr (std::is_same_v<T, double>) return all.f64;
  else return all.f32;
}

// One pass: sequences of `length` values `step` apart, of which a plane has `across`, `cross` apart.
struct Pass {
  int64_t length, step, across, cross;
  int64_t axis;        // of the edges: 0 along rows, 1 along columns
  double rate, slope;  // weights are exp(-rate - slope * edge)

  Pass(const TransformShape& s, int64_t index) : axis(index % 2) {
    length = axis == 0 ? s.width : s.height;
    across = axis == 0 ? s.height : s.width;
    step = axis == 0 ? 1 : s.width;
    cross = axis == 0 ? s.width : 1;
    rate = std::sqrt(2.0 / 3.0 * (1.0 - std::pow(4.0, -static_cast<double>(s.iterations)))) *
           std::ldexp(1.0, static_cast<int>(index / 2) + 1) / s.sigma_s;
    slope = std::min(rate * s.sigma_s / s.sigma_r, largest);
    rate = std::min(rate, largest);
  }
};

// Sequences of a tile where a task holds `tiles` of them.
template <class T> int64_t tile_width(const Pass& pass, int64_t tiles) {
  int64_t width = widest_tile;
  while (width > transform_lanes && tiles * pass.length * width * static_cast<int64_t>(sizeof(T)) > tile_bytes) width /= 2;
  return width;
}

// Edges of one image.
template <class T> ConstTensor edge_of(const ConstTensor& edge, int64_t image) {
  return {static_cast<const T*>(edge.data) + image * edge.strides.n, edge.strides};
}

template <class T> struct Tile {
  const Pass& pass;
  int64_t width, begin, valid;  // sequences begin to begin + valid of a plane

  int64_t size() const { return pass.length * width; }
  void load(const T* plane, T* tile) const {
    copy_matrix<T, T>(pass.length, valid, plane + begin * pass.cross, pass.step, pass.cross, tile, width, 1);
  }
  void store(const T* tile, T* plane) const {
    copy_matrix<T, T>(pass.length, valid, tile, width, 1, plane + begin * pass.cross, pass.step, pass.cross);
  }
  void weights(const ConstTensor& edge, int64_t image, T* tile) const {
    const int64_t step = pass.axis == 0 ? edge.strides.w : edge.strides.h, cross = pass.axis == 0 ? edge.strides.h : edge.strides.w;
    const T* from = static_cast<const T*>(edge.data) + image * edge.strides.n + pass.axis * edge.strides.c + begin * cross;
    copy_matrix<T, T>(pass.length, valid, from, step, cross, tile, width, 1);
    transform_kernels<T>().weights(size(), static_cast<T>(pass.rate), static_cast<T>(pass.slope), tile);
    std::fill_n(tile, width, T{0});
    std::fill_n(tile + size(), width, T{0});
  }
  void add_edge_gradient(const T* weights, const T* grad_weights, T* plane) const {
    const auto add = [&](int64_t i, int64_t j) {
      const int64_t at = i * width + j;
      plane[i * pass.step + (begin + j) * pass.cross] -= static_cast<T>(pass.slope) * weights[at] * grad_weights[at];
    };
    if (pass.axis == 0) {
      for (int64_t j = 0; j < valid; ++j)
        for (int64_t i = 0; i < pass.length; ++i) add(i, j);
    } else {
      for (int64_t i = 0; i < pass.length; ++i)
        for (int64_t j = 0; j < valid; ++j) add(i, j);
    }
  }
};

// body(first, last) over the tiles of all images, with the number of tiles per image.
template <class T, class Body> void over_tiles(const TransformShape& s, const Pass& pass, int64_t width, const Body& body) {
  const int64_t tiles = (pass.across + width - 1) / width;
  const double values = static_cast<double>(s.batch * s.channels) * static_cast<double>(s.height * s.width);
  parallel(s.batch * tiles, threads_for(operations_per_value * values), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % tiles * width;
      body(Tile<T>{pass, width, begin, std::min(width, pass.across - begin)}, task / tiles);
    }
  });
}

template <class T> void filter(const TransformShape& s, const Pass& pass, const ConstTensor& edge, const T* src, T* dst) {
  const int64_t plane = s.height * s.width;
  over_tiles<T>(s, pass, tile_width<T>(pass, 2), [&](const Tile<T>& tile, int64_t image) {
    Scratch scratch(static_cast<size_t>(2 * tile.size() + tile.width) * sizeof(T));
    T *const values = scratch.as<T>(), *const weights = values + tile.size();
    tile.weights(edge, image, weights);
    for (int64_t at = image * s.channels * plane, c = 0; c < s.channels; ++c, at += plane) {
      tile.load(src + at, values);
      transform_kernels<T>().filter({tile.pass.length, tile.width, weights, values, nullptr, nullptr, nullptr});
      tile.store(values, dst + at);
    }
  });
}

// src: what the pass read. grad: of what it wrote; grad_src may be the same memory.
template <class T>
void gradient(const TransformShape& s, const Pass& pass, const ConstTensor& edge, const T* src, const T* grad, T* grad_src,
              T* grad_edge) {
  const int64_t plane = s.height * s.width;
  over_tiles<T>(s, pass, tile_width<T>(pass, 5), [&](const Tile<T>& tile, int64_t image) {
    const int64_t size = tile.size(), ended = size + tile.width;
    Scratch scratch(static_cast<size_t>(3 * size + 2 * ended) * sizeof(T));
    T *const weights = scratch.as<T>(), *const grad_weights = weights + ended, *const values = grad_weights + ended;
    T *const grads = values + size, *const spare = grads + size;
    tile.weights(edge, image, weights);
    std::fill_n(grad_weights, ended, T{0});
    for (int64_t at = image * s.channels * plane, c = 0; c < s.channels; ++c, at += plane) {
      tile.load(src + at, values);
      tile.load(grad + at, grads);
      transform_kernels<T>().gradient({tile.pass.length, tile.width, weights, values, grads, grad_weights, spare});
      tile.store(grads, grad_src + at);
    }
    tile.add_edge_gradient(weights, grad_weights, grad_edge + (2 * image + pass.axis) * plane);
  });
}

// All passes; the first reads src, the others dst.
template <class T> void filter_all(const TransformShape& s, const ConstTensor& edge, const T* src, T* dst) {
  for (int64_t index = 0; index < 2 * s.iterations; ++index) filter(s, Pass(s, index), edge, index == 0 ? src : dst, dst);
}

// One image at a time, and as many of its channels as `saved_bytes` hold between all passes.
template <class T>
void gradient_of_image(const TransformShape& s, const ConstTensor& edge, const T* grad, const T* src, T* grad_src, T* grad_edge) {
  const int64_t plane = s.height * s.width, passes = 2 * s.iterations;
  const int64_t most = std::max<int64_t>(1, saved_bytes / (passes * plane * static_cast<int64_t>(sizeof(T))));
  const int64_t chunk = std::min(most, s.channels);
  Scratch scratch(static_cast<size_t>((passes - 1) * chunk * plane) * sizeof(T));
  TransformShape part = s;
  for (int64_t c = 0; c < s.channels; c += chunk) {
    part.channels = std::min(chunk, s.channels - c);
    const auto saved = [&](int64_t index) {
      return index == 0 ? const_cast<T*>(src) + c * plane : scratch.as<T>() + (index - 1) * chunk * plane;
    };
    for (int64_t index = 0; index + 1 < passes; ++index) filter(part, Pass(s, index), edge, saved(index), saved(index + 1));
    const T* of_result = grad + c * plane;
    for (int64_t index = passes - 1; index >= 0; --index, of_result = grad_src + c * plane)
      gradient(part, Pass(s, index), edge, saved(index), of_result, grad_src + c * plane, grad_edge);
  }
}

// One image, [pixels, channels] to [channels, pixels] or back: as [rows, columns] to [columns, rows].
template <class T> void turn(const T* src, T* dst, int64_t rows, int64_t columns, bool by_rows) {
  const int64_t threads = threads_for(operations_per_value * static_cast<double>(rows * columns));
  parallel(by_rows ? rows : columns, threads, [&](int64_t begin, int64_t end) {
    if (by_rows) copy_matrix<T, T>(end - begin, columns, src + begin * columns, columns, 1, dst + begin, 1, rows);
    else copy_matrix<T, T>(rows, end - begin, src + begin, columns, 1, dst + begin * rows, 1, rows);
  });
}

template <class T>
void run(const TransformShape& s, const ConstTensor& edge, const T* src, T* dst, bool channels_last) {
  if (!channels_last) return filter_all(s, edge, src, dst);
  const int64_t pixels = s.height * s.width, image = s.channels * pixels;
  Scratch scratch(static_cast<size_t>(image) * sizeof(T));
  TransformShape one = s;
  one.batch = 1;
  for (int64_t n = 0; n < s.batch; ++n) {
    turn(src + n * image, scratch.as<T>(), pixels, s.channels, true);
    filter_all(one, edge_of<T>(edge, n), scratch.as<T>(), scratch.as<T>());
    turn(scratch.as<T>(), dst + n * image, s.channels, pixels, false);
  }
}

template <class T>
void run_backward(const TransformShape& s, const ConstTensor& edge, const T* grad, const T* src, T* grad_src, T* grad_edge,
                  bool channels_last) {
  const int64_t pixels = s.height * s.width, image = s.channels * pixels;
  std::fill_n(grad_edge, s.batch * 2 * pixels, T{0});
  Scratch scratch(channels_last ? static_cast<size_t>(2 * image) * sizeof(T) : 0);
  T *const planes = scratch.as<T>(), *const grads = planes + image;
  TransformShape one = s;
  one.batch = 1;
  for (int64_t n = 0; n < s.batch; ++n, src += image, grad += image, grad_src += image, grad_edge += 2 * pixels) {
    const ConstTensor edges = edge_of<T>(edge, n);
    if (!channels_last) {
      gradient_of_image(one, edges, grad, src, grad_src, grad_edge);
      continue;
    }
    turn(src, planes, pixels, s.channels, true);
    turn(grad, grads, pixels, s.channels, true);
    gradient_of_image<T>(one, edges, grads, planes, grads, grad_edge);
    turn(grads, grad_src, s.channels, pixels, false);
  }
}

}  // namespace

void domain_transform(const TransformShape& shape, DType dtype, const void* input, ConstTensor edge, void* output,
                      bool channels_last) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    run(shape, edge, static_cast<const T*>(input), static_cast<T*>(output), channels_last);
  };
  dtype == DType::float64 ? typed(double{}) : typed(float{});
}

void domain_transform_backward(const TransformShape& shape, DType dtype, const void* grad, const void* input, ConstTensor edge,
                               void* grad_input, void* grad_edge, bool channels_last) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    run_backward(shape, edge, static_cast<const T*>(grad), static_cast<const T*>(input), static_cast<T*>(grad_input),
                 static_cast<T*>(grad_edge), channels_last);
  };
  dtype == DType::float64 ? typed(double{}) : typed(float{});
}

}  // namespace atrous::cpu
