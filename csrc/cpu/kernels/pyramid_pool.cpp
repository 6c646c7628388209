// Compiled once per instruction set: CMake sets the compiler flags and ATROUS_ISA (a namespace).
#include "cpu/pyramid_pool_kernels.h"

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"

template <class T> struct MaskOf { using type = int32_t; };
template <> struct MaskOf<double> { using type = int64_t; };
template <class T> using Mask = Vec<typename MaskOf<T>::type>;  // what comparing two vectors gives; also holds indices

// One vector of 32-bit indices per vector of values: half as wide for double.
template <class A> inline Mask<A> load_index(const int32_t* from) {
  Mask<A> v;
  for (int i = 0; i < lanes<A>; ++i) v[i] = from[i];
  return v;
}
template <class A> inline void store_index(int32_t* to, Mask<A> v) {
  for (int i = 0; i < lanes<A>; ++i) to[i] = static_cast<int32_t>(v[i]);
}

// The framework's rule: a larger value or any NaN takes over, so the first maximum wins, and among NaNs the last.
template <class V> inline auto takes(V x, V best) { return (x > best) | (x != x); }

template <int vectors, class S> inline void sum_block(const PixelRun& run, int64_t c) {
  using A = Accumulator<S>;
  constexpr int n = lanes<A>;
  const S* src = static_cast<const S*>(run.src) + c;
  A* value = static_cast<A*>(run.value) + c;
  Vec<A> sum[vectors] = {};
  for (int64_t p = 0; p < run.pixels; ++p, src += run.step)
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sum[i] += load(src + i * n);
#pragma GCC unroll 8
  for (int i = 0; i < vectors; ++i) store(value + i * n, load(value + i * n) + sum[i]);
}

template <class S> void sum_pixels(const PixelRun& run) {
  using A = Accumulator<S>;
  constexpr int n = lanes<A>;
  int64_t c = 0;
  for (; c + 4 * n <= run.channels; c += 4 * n) sum_block<4, S>(run, c);
  for (; c + n <= run.channels; c += n) sum_block<1, S>(run, c);
  for (; c < run.channels; ++c) {
    const S* src = static_cast<const S*>(run.src) + c;
    A sum = 0;
    for (int64_t p = 0; p < run.pixels; ++p) sum += value_of(src[p * run.step]);
    static_cast<A*>(run.value)[c] += sum;
  }
}

template <class S> void max_pixels(const PixelRun& run) {
  using A = Accumulator<S>;
  constexpr int n = lanes<A>;
  A* value = static_cast<A*>(run.value);
  int64_t c = 0;
  for (; c + n <= run.channels; c += n) {
    const S* src = static_cast<const S*>(run.src) + c;
    Vec<A> best = load(value + c);
    Mask<A> at = load_index<A>(run.index + c), here = Mask<A>{} + run.first;
    for (int64_t p = 0; p < run.pixels; ++p, here += 1) {
      const Vec<A> x = load(src + p * run.step);
      const Mask<A> take = takes(x, best);
      best = take ? x : best;
      at = take ? here : at;
    }
    store(value + c, best);
    store_index<A>(run.index + c, at);
  }
  for (; c < run.channels; ++c) {
    const S* src = static_cast<const S*>(run.src) + c;
    for (int64_t p = 0; p < run.pixels; ++p) {
      const A x = value_of(src[p * run.step]);
      if (!takes(x, value[c])) continue;
      value[c] = x;
      run.index[c] = run.first + static_cast<int32_t>(p);
    }
  }
}

// Four vectors of columns at a time, so that rows are read in stretches; body(positions of the vectors). A row that is no
// whole number of them ends with vectors that overlap: a column computed twice has the same value twice.
constexpr int side_by_side = 4;

template <class Body, class Scalar> inline void over_columns(int64_t columns, int n, Body body, Scalar scalar) {
  if (columns < n) {
    for (int64_t x = 0; x < columns; ++x) scalar(x);
    return;
  }
  for (int64_t x = 0; x < columns; x += side_by_side * n) {
    int64_t at[side_by_side];
    for (int i = 0; i < side_by_side; ++i) at[i] = x + (i + 1) * n <= columns ? x + i * n : columns - n;
    body(at);
  }
}

template <class S> void sum_rows(const PlaneRows& rows) {
  using A = Accumulator<S>;
  const S* src = static_cast<const S*>(rows.src);
  A* value = static_cast<A*>(rows.value);
  over_columns(
      rows.columns, lanes<A>,
      [&](const int64_t* at) {
        Vec<A> sum[side_by_side] = {};
        for (int64_t y = 0; y < rows.rows; ++y)
#pragma GCC unroll 4
          for (int i = 0; i < side_by_side; ++i) sum[i] += load(src + y * rows.row + at[i]);
#pragma GCC unroll 4
        for (int i = 0; i < side_by_side; ++i) store(value + at[i], sum[i]);
      },
      [&](int64_t x) {
        value[x] = 0;
        for (int64_t y = 0; y < rows.rows; ++y) value[x] += value_of(src[y * rows.row + x]);
      });
}

template <class S> void max_rows(const PlaneRows& rows) {
  using A = Accumulator<S>;
  const S* src = static_cast<const S*>(rows.src);
  A* value = static_cast<A*>(rows.value);
  Mask<A> column;
  for (int i = 0; i < lanes<A>; ++i) column[i] = i;
  over_columns(
      rows.columns, lanes<A>,
      [&](const int64_t* at) {
        Vec<A> best[side_by_side];
        Mask<A> best_at[side_by_side], here[side_by_side];
#pragma GCC unroll 4
        for (int i = 0; i < side_by_side; ++i) {
          best[i] = load(src + at[i]);
          best_at[i] = here[i] = column + (rows.first + static_cast<int32_t>(at[i]));
        }
        for (int64_t y = 1; y < rows.rows; ++y)
#pragma GCC unroll 4
          for (int i = 0; i < side_by_side; ++i) {
            const Vec<A> next = load(src + y * rows.row + at[i]);
            here[i] += rows.row_index;
            const Mask<A> take = takes(next, best[i]);
            best[i] = take ? next : best[i];
            best_at[i] = take ? here[i] : best_at[i];
          }
#pragma GCC unroll 4
        for (int i = 0; i < side_by_side; ++i) {
          store(value + at[i], best[i]);
          store_index<A>(rows.index + at[i], best_at[i]);
        }
      },
      [&](int64_t x) {
        value[x] = value_of(src[x]);
        rows.index[x] = rows.first + static_cast<int32_t>(x);
        for (int64_t y = 1; y < rows.rows; ++y) {
          const A next = value_of(src[y * rows.row + x]);
          if (!takes(next, value[x])) continue;
          value[x] = next;
          rows.index[x] = rows.first + static_cast<int32_t>(y * rows.row_index + x);
        }
      });
}

template <class S> void narrow(int64_t size, const Accumulator<S>* src, S* dst) {
  constexpr int n = lanes<Accumulator<S>>;
  int64_t i = 0;
  for (; i + n <= size; i += n) store(dst + i, load(src + i));
  for (; i < size; ++i) assign(dst + i, src[i]);
}

template <class S>
void blend(int64_t size, const Accumulator<S>* a, const Accumulator<S>* b, Accumulator<S> weight_a, Accumulator<S> weight_b,
           S* dst) {
  constexpr int n = lanes<Accumulator<S>>;
  int64_t i = 0;
  for (; i + n <= size; i += n) store(dst + i, load(a + i) * weight_a + load(b + i) * weight_b);
  for (; i < size; ++i) assign(dst + i, a[i] * weight_a + b[i] * weight_b);
}

template <class S> PyramidKernels<S> kernels_of() {
  return {sum_pixels<S>, max_pixels<S>, sum_rows<S>, max_rows<S>, narrow<S>, blend<S>};
}

PyramidTable make() { return {kernels_of<float>(), kernels_of<double>(), kernels_of<bf16>()}; }

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(PyramidTable, make)

}  // namespace atrous::cpu
