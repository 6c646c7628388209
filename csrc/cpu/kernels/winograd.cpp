// Winograd's transforms for 3x3 kernels. Compiled once per instruction set (see conv2d.cpp beside it).
#include "cpu/winograd_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"

// The matrices of F(m, 3) from m + 1 points and infinity (Cook and Toom): a polynomial product through its values.
template <int m> struct Matrices {
  static constexpr int side = m + 2;
  float input[side][side] = {};  // B^T: coefficients of the Lagrange numerators
  float weight[side][3] = {};    // G: values of the weight's polynomial, over the Lagrange denominators
  float output[m][side] = {};    // A^T: powers of the points
};

template <int m> constexpr Matrices<m> cook_toom(const double (&points)[m + 1]) {
  constexpr int side = m + 2;
  Matrices<m> matrices;
  for (int i = 0; i < side; ++i) {  // the last row stands for infinity
    double numerator[side] = {1};
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
template <int m> struct Tile;
template <> struct Tile<2> { static constexpr Matrices<2> by = cook_toom<2>({0, 1, -1}); };
template <> struct Tile<3> { static constexpr Matrices<3> by = cook_toom<3>({0, 1, -1, 2}); };
template <> struct Tile<4> { static constexpr Matrices<4> by = cook_toom<4>({0, 0.75, -0.75, 1.5, -1.5}); };

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

// to(i, j) = (matrix d matrix^T)[i][j].
template <int rows, int columns, class From, class To>
inline void both_sides(const float (&matrix)[rows][columns], const From& from, const To& to) {
  Vec<float> half[rows][columns];
#pragma GCC unroll 6
  for (int j = 0; j < columns; ++j) {
    Vec<float> d[columns];
#pragma GCC unroll 6
    for (int i = 0; i < columns; ++i) d[i] = from(i, j);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) half[i][j] = row_times(matrix[i], [&](int k) { return d[k]; });
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < rows; ++j) to(i, j, row_times(matrix[j], [&](int k) { return half[i][k]; }));
  }
}

template <int m>
void weight_transform(const float* taps, int64_t tap_step, int64_t vectors, float* u, int64_t point_step) {
  constexpr int side = m + 2;
  for (int64_t c = 0; c < vectors; ++c, taps += lanes<float>, u += lanes<float>)
    both_sides(
        Tile<m>::by.weight, [&](int i, int j) { return load(taps + (3 * i + j) * tap_step); },
        [&](int i, int j, Vec<float> v) { store(u + (side * i + j) * point_step, v); });
}

template <int m> void input_transform(const float* const* pixels, int64_t vectors, float* v, int64_t point_step) {
  constexpr int side = m + 2;
  for (int64_t c = 0; c < vectors * lanes<float>; c += lanes<float>)
    both_sides(
        Tile<m>::by.input, [&](int i, int j) { return load(pixels[side * i + j] + c); },
        [&](int i, int j, Vec<float> value) { store(v + (side * i + j) * point_step + c, value); });
}

template <int m>
void output_transform(const float* sums, int64_t point_step, int64_t vectors, const float* bias, float* const* pixels) {
  constexpr int side = m + 2;
  for (int64_t c = 0; c < vectors * lanes<float>; c += lanes<float>) {
    const Vec<float> add = load(bias + c);
    both_sides(
        Tile<m>::by.output, [&](int i, int j) { return load(sums + (side * i + j) * point_step + c); },
        [&](int i, int j, Vec<float> value) { store(pixels[m * i + j] + c, value + add); });
  }
}

template <int rows, int columns> struct Matrix {
  float at[rows][columns];
};
template <int rows, int columns> constexpr Matrix<columns, rows> transposed(const float (&matrix)[rows][columns]) {
  Matrix<columns, rows> result{};
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) result.at[j][i] = matrix[i][j];
  return result;
}

template <int m> void gradient_transform(const float* const* pixels, int64_t vectors, float* v, int64_t point_step) {
  constexpr int side = m + 2;
  static constexpr Matrix<side, m> by = transposed(Tile<m>::by.output);
  for (int64_t c = 0; c < vectors * lanes<float>; c += lanes<float>)
    both_sides(
        by.at, [&](int i, int j) { return load(pixels[m * i + j] + c); },
        [&](int i, int j, Vec<float> value) { store(v + (side * i + j) * point_step + c, value); });
}

template <int m>
void weight_gradient_transform(const float* u, int64_t point_step, int64_t vectors, float* taps, int64_t tap_step) {
  constexpr int side = m + 2;
  static constexpr Matrix<3, side> by = transposed(Tile<m>::by.weight);
  for (int64_t c = 0; c < vectors; ++c, u += lanes<float>, taps += lanes<float>)
    both_sides(
        by.at, [&](int i, int j) { return load(u + (side * i + j) * point_step); },
        [&](int i, int j, Vec<float> value) { store(taps + (3 * i + j) * tap_step, value); });
}

template <int m> constexpr WinogradTransforms transforms() {
  return {weight_transform<m>, input_transform<m>, output_transform<m>, gradient_transform<m>,
          weight_gradient_transform<m>};
}

WinogradKernels make_winograd() {
  return {lanes<float>, {{}, {}, transforms<2>(), transforms<3>(), transforms<4>()}};
}

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(WinogradKernels, make_winograd)

}  // namespace atrous::cpu
