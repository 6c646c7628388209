// Winograd's transforms for 3x3 kernels. Compiled once per instruction set (see conv2d.cpp beside it).
#include "cpu/winograd_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"

// What an axis is multiplied by: B^T for the source, G for the weight, A^T for the result.
template <int written, int read, int points> struct Matrices {
  float input[points][read] = {};
  float weight[points][3] = {};
  float output[written][points] = {};
};

// F(m, 3) from m + 1 points and infinity (Cook and Toom): a polynomial product through its values.
template <int m> constexpr Matrices<m, m + 2, m + 2> cook_toom(const double (&points)[m + 1]) {
  constexpr int side = m + 2;
  Matrices<m, side, side> matrices;
  for (int i = 0; i < side; ++i) {  // the last row stands for infinity
    double numerator[side] = {1};    // coefficients of the Lagrange numerator
    double denominator = 1;
    int degree = 0;
    for (int j = 0; j < m + 1; ++j) {
      if (j == i) continue;
      for (int k = ++degree; k > 0; --k) numerator[k] = numerator[k - 1] - points[j] * numerator[k];
      numerator[0] *= -points[j];
      if (i <= m) denominator *= points[i] - points[j];
    }
    for (int k = 0; k < side; ++k) matrices.input[i][k] = static_cast<float>(numerator[k]);
    double power = 1;
    for (int k = 0; k < (3 > m ? 3 : m); ++k) {
      const bool last = i == m + 1;
      if (k < 3) matrices.weight[i][k] = static_cast<float>(last ? (k == 2 ? 1 : 0) : power / denominator);
      if (k < m) matrices.output[k][i] = static_cast<float>(last ? (k == m - 1 ? 1 : 0) : power);
      if (!last) power *= points[i];
    }
  }
  return matrices;
}

// Points near 1 in size keep rounding errors small; these for m = 4 have less than half the error of 0, 1, -1, 2, -2.
template <int form> struct Form;
template <> struct Form<f2> { static constexpr auto by = cook_toom<2>({0, 1, -1}); };
template <> struct Form<f3> { static constexpr auto by = cook_toom<3>({0, 1, -1, 2}); };
template <> struct Form<f4> { static constexpr auto by = cook_toom<4>({0, 0.75, -0.75, 1.5, -1.5}); };
// w1 x0 + w2 x1 and w0 x0 + w1 x1 by three products: w1 (x0 + x1), (w2 - w1) x1, (w0 - w1) x0.
template <> struct Form<phase2> {
  static constexpr Matrices<2, 2, 3> by{
      {{1, 1}, {0, 1}, {1, 0}}, {{0, 1, 0}, {0, -1, 1}, {1, -1, 0}}, {{1, 1, 0}, {1, 0, 1}}};
};

template <int rows, int columns> struct Matrix {
  float at[rows][columns];
};
template <int rows, int columns> constexpr Matrix<columns, rows> transposed(const float (&matrix)[rows][columns]) {
  Matrix<columns, rows> result{};
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) result.at[j][i] = matrix[i][j];
  return result;
}
template <int form> struct Transposed {
  static constexpr auto weight = transposed(Form<form>::by.weight);
  static constexpr auto output = transposed(Form<form>::by.output);
};

// One row of a product with a constant matrix; the loops unroll, and zeros of the matrix cost nothing.
template <int terms, class At> inline Vec<float> row_times(const float (&row)[terms], const At& at) {
  Vec<float> sum{};
  bool first = true;
#pragma GCC unroll 6
  for (int k = 0; k < terms; ++k) {
    if (row[k] == 0) continue;
    const Vec<float> term = row[k] == 1 ? at(k) : at(k) * row[k];
    sum = first ? term : sum + term;
    first = false;
  }
  return sum;
}

// to(i, j) = (left d right^T)[i][j] of d(i, j) = from(i, j).
template <int rows, int height, int columns, int width, class From, class To>
inline void both_sides(const float (&left)[rows][height], const float (&right)[columns][width], const From& from,
                       const To& to) {
  Vec<float> half[rows][width];
#pragma GCC unroll 6
  for (int j = 0; j < width; ++j) {
    Vec<float> d[height];
#pragma GCC unroll 6
    for (int i = 0; i < height; ++i) d[i] = from(i, j);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) half[i][j] = row_times(left[i], [&](int k) { return d[k]; });
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < columns; ++j) to(i, j, row_times(right[j], [&](int k) { return half[i][k]; }));
  }
}

template <int h, int w> struct Transforms {
  static constexpr auto& rows = Form<h>::by;
  static constexpr auto& columns = Form<w>::by;
  static constexpr int points = tile_sizes[w].points, read = tile_sizes[w].read, written = tile_sizes[w].written;

  static void weight(const float* taps, int64_t tap_step, int64_t vectors, float* u, int64_t point_step) {
    for (int64_t c = 0; c < vectors; ++c, taps += lanes<float>, u += lanes<float>)
      both_sides(
          rows.weight, columns.weight, [&](int i, int j) { return load(taps + (3 * i + j) * tap_step); },
          [&](int i, int j, Vec<float> v) { store(u + (points * i + j) * point_step, v); });
  }
  static void input(const float* const* pixels, int64_t vectors, float* v, int64_t point_step) {
    for (int64_t c = 0; c < vectors * lanes<float>; c += lanes<float>)
      both_sides(
          rows.input, columns.input, [&](int i, int j) { return load(pixels[read * i + j] + c); },
          [&](int i, int j, Vec<float> value) { store(v + (points * i + j) * point_step + c, value); });
  }
  static void output(const float* sums, int64_t point_step, int64_t vectors, const float* bias, const Finish& finish,
                     float* const* pixels) {
    for (int64_t c = 0; c < vectors * lanes<float>; c += lanes<float>) {
      const Vec<float> add = load(bias + c);
      both_sides(
          rows.output, columns.output, [&](int i, int j) { return load(sums + (points * i + j) * point_step + c); },
          [&](int i, int j, Vec<float> value) {
            float* const to = pixels[written * i + j] + c;
            store(to, finished<float>(value + add, finish, c, to));
          });
    }
  }
  static void gradient(const float* const* pixels, int64_t vectors, float* v, int64_t point_step) {
    for (int64_t c = 0; c < vectors * lanes<float>; c += lanes<float>)
      both_sides(
          Transposed<h>::output.at, Transposed<w>::output.at, [&](int i, int j) { return load(pixels[written * i + j] + c); },
          [&](int i, int j, Vec<float> value) { store(v + (points * i + j) * point_step + c, value); });
  }
  static void weight_gradient(const float* u, int64_t point_step, int64_t vectors, float* taps, int64_t tap_step) {
    for (int64_t c = 0; c < vectors; ++c, u += lanes<float>, taps += lanes<float>)
      both_sides(
          Transposed<h>::weight.at, Transposed<w>::weight.at,
          [&](int i, int j) { return load(u + (points * i + j) * point_step); },
          [&](int i, int j, Vec<float> value) { store(taps + (3 * i + j) * tap_step, value); });
  }
};

template <int h, int w> void fill(WinogradKernels& kernels) {
  using T = Transforms<h, w>;
  kernels.by[h][w] = {T::weight, T::input, T::output, T::gradient, T::weight_gradient};
}

WinogradKernels make_winograd() {
  WinogradKernels kernels{};
  kernels.lanes = lanes<float>;
  fill<f2, f2>(kernels), fill<f3, f3>(kernels), fill<f4, f4>(kernels);
  fill<phase2, phase2>(kernels);
  fill<phase2, f2>(kernels), fill<phase2, f3>(kernels), fill<phase2, f4>(kernels);
  fill<f2, phase2>(kernels), fill<f3, phase2>(kernels), fill<f4, phase2>(kernels);
  return kernels;
}

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(WinogradKernels, make_winograd)

}  // namespace atrous::cpu
