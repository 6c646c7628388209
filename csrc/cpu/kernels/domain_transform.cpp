// Compiled once per instruction set: CMake sets the compiler flags and ATROUS_ISA (a namespace).
#include "cpu/domain_transform_kernels.h"

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"
#include "exp_log.h"

template <class T> void weights(int64_t size, T rate, T slope, T* edge) {
  for (int64_t i = 0; i < size; i += lanes<T>) store(edge + i, exp_vector<T>(-rate - slope * load(edge + i)));
}

// Vectors that are filtered together: a step has to wait for the one before it, that of other sequences has not.
constexpr int side_by_side = 4;

template <int vectors, class T, class Step> inline void over_rows(int64_t first, int64_t last, int64_t row, const Step& step) {
  const int64_t by = first <= last ? 1 : -1;
  for (int64_t i = first; i != last + by; i += by)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) step(i * row + v * lanes<T>, v);
}

template <int vectors, class T> inline void filter_columns(const TransformTile<T>& tile, int64_t at) {
  const int64_t row = tile.width, last = tile.length - 1;
  const T* w = tile.weights + at;
  T* x = tile.values + at;
  Vec<T> y[vectors] = {};  // the weight of what comes before the first position is 0
  over_rows<vectors, T>(0, last, row, [&](int64_t i, int v) {
    const Vec<T> here = load(x + i);
    y[v] = here + load(w + i) * (y[v] - here);
    store(x + i, y[v]);
  });
  over_rows<vectors, T>(last, 0, row, [&](int64_t i, int v) {
    const Vec<T> here = load(x + i);
    y[v] = here + load(w + row + i) * (y[v] - here);
    store(x + i, y[v]);
  });
}

// With y the forward and z the backward recurrence: y[i] = x[i] + w[i] f[i], f[i] = y[i - 1] - x[i], and
// z[i] = y[i] + w[i + 1] e[i], e[i] = z[i + 1] - y[i]. The gradient of w[i] is that of z[i - 1] times e[i - 1], and that of y[i]
// times f[i]. f takes the place of x, e that of y.
template <int vectors, class T> inline void gradient_of_columns(const TransformTile<T>& tile, int64_t at) {
  const int64_t row = tile.width, last = tile.length - 1;
  const T* w = tile.weights + at;
  T *f = tile.values + at, *e = tile.scratch + at, *g = tile.grad + at, *grad_w = tile.grad_weights + at;
  Vec<T> y[vectors] = {}, sum[vectors] = {};
  over_rows<vectors, T>(0, last, row, [&](int64_t i, int v) {
    const Vec<T> here = load(f + i), difference = y[v] - here;
    store(f + i, difference);
    y[v] = here + load(w + i) * difference;
    store(e + i, y[v]);
  });
  over_rows<vectors, T>(last, 0, row, [&](int64_t i, int v) {
    const Vec<T> here = load(e + i), difference = y[v] - here;
    store(e + i, difference);
    y[v] = here + load(w + row + i) * difference;
  });
  over_rows<vectors, T>(0, last, row, [&](int64_t i, int v) {  // grad_w has a row more than the tile, as the weights have
    const Vec<T> next = load(w + row + i);
    sum[v] = load(g + i) + load(w + i) * sum[v];
    store(grad_w + row + i, load(grad_w + row + i) + sum[v] * load(e + i));
    store(g + i, sum[v] - next * sum[v]);
  });
  for (int v = 0; v < vectors; ++v) sum[v] = Vec<T>{};
  over_rows<vectors, T>(last, 0, row, [&](int64_t i, int v) {
    const Vec<T> here = load(w + i);
    sum[v] = load(g + i) + load(w + row + i) * sum[v];
    store(grad_w + i, load(grad_w + i) + sum[v] * load(f + i));
    store(g + i, sum[v] - here * sum[v]);
  });
}

template <class T> void filter(const TransformTile<T>& tile) {
  constexpr int n = lanes<T>;
  int64_t at = 0;
  for (; at + side_by_side * n <= tile.width; at += side_by_side * n) filter_columns<side_by_side>(tile, at);
  for (; at < tile.width; at += n) filter_columns<1>(tile, at);
}

template <class T> void gradient(const TransformTile<T>& tile) {
  constexpr int n = lanes<T>;
  int64_t at = 0;
  for (; at + 2 * n <= tile.width; at += 2 * n) gradient_of_columns<2>(tile, at);
  for (; at < tile.width; at += n) gradient_of_columns<1>(tile, at);
}

template <class T> TransformKernels<T> kernels_of() { return {weights<T>, filter<T>, gradient<T>}; }

TransformTable make() { return {kernels_of<float>(), kernels_of<double>()}; }

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(TransformTable, make)

}  // namespace atrous::cpu
