// The inner loops of the convolutions, as a table of functions per instruction set (tables.h).
#pragma once

#include "tables.h"

namespace atrous::cpu {

// Dense convolution ----------------------------------------------------------------------------------------------------

// c[row][column] (+)= sum over taps and depth of a[row][tap offset + k] * b[tap][k][column], for one tile of rows
// (pixels) by columns (written channels). For bf16, one step of depth is a pair of channels, side by side in a and in b.
struct MatmulTile {
  int64_t taps, depth;
  const int64_t* a_offset;  // [taps] bytes from a row's address to its source under this tap
  const void* const* b;     // [taps] packed weights [depth][vectors * lanes]
  const char* const* a;     // [rows]
  void* const* c;           // [rows]
  const void* bias;         // [columns], written together with the first products; null: add to c
  int64_t columns;          // columns of c that exist
  Finish finish;            // whole vectors of scale and shift can be read
};
using Matmul = void (*)(const MatmulTile&);

constexpr int max_vectors = 4;
constexpr int max_rows = 12;

// kernel[vectors][rows] for tiles as tall as the registers allow: rows up to rows_of[vectors].
struct MatmulKernels {
  int lanes;          // accumulators per vector; 0: this instruction set has none for the type
  int depth_channels; // channels per step of depth
  int vectors;        // widest tile
  int rows_of[max_vectors + 1];
  Matmul kernel[max_vectors + 1][max_rows + 1];
};

// c[i][j] += sum over the pixels of a rectangle of a[pixel][i] * b[pixel][j]; i < rows, j < vectors * lanes.
// Steps are in elements. a, b and c are padded to whole tiles.
struct OuterTile {
  int64_t rows, columns;  // of the rectangle
  const void *a, *b;
  int64_t a_row, a_column, b_row, b_column;
  void* c;
  int64_t c_row;
};
struct OuterKernels {
  int lanes, rows;
  int vectors;  // widest tile
  void (*kernel[max_vectors + 1])(const OuterTile&);
};

// Depthwise convolution ------------------------------------------------------------------------------------------------

struct Clamp {
  bool on;
  double low, high;
};

// NHWC: dst[p][c] = bias[c] + sum over taps of src[p][tap offset + c] * weight[tap][c], for a run of pixels that share
// their valid taps. Steps are in elements.
struct DepthwiseRun {
  int64_t pixels, channels;
  int64_t tap_rows, tap_columns;
  const void* src;                        // of the first pixel under the first tap
  int64_t src_step;                       // from pixel to pixel
  int64_t src_tap_row, src_tap_column;
  const void* weight;                     // [tap][channels], accumulator type, at the first tap
  int64_t weight_tap_row;                 // from one row of the kernel to the next
  const void* bias;                       // [channels], accumulator type
  void* dst;
  int64_t dst_step;
  Clamp clamp;
};

// NHWC: sum[tap][c] += sum over the pixels of src[p][tap * src_tap_step + c] * grad[p][c], for one row of the kernel.
struct DepthwiseWeightRun {
  int64_t pixels, channels, taps;
  const void *src, *grad;
  int64_t src_step, src_tap_step, grad_step;
  void* sum;
  int64_t sum_step;
};

// NCHW, one rectangle of one plane, in the accumulator type: dst[y][x] = bias + sum over taps of
// src[y * src_row + x + src_offset[tap]] * weight[tap]. Reads and writes whole vectors: up to `slack` elements past a row.
struct PlaneCorrelation {
  int64_t rows, columns, taps;
  const void* src;
  int64_t src_row;
  const int64_t* src_offset;  // [taps]
  const void* weight;         // [taps]
  const void* bias;           // one value
  void* dst;
  int64_t dst_row;
  Clamp clamp;
};

// lanes_sum[x % lanes] += sum over y of a[y][x] * b[y][x]. Reads up to `slack` elements past a row.
struct PlaneDot {
  int64_t rows, columns;
  const void *a, *b;
  int64_t a_row, b_row;
  void* lanes_sum;  // [slack], beyond the lanes untouched
};

template <class T> struct DepthwiseKernels {
  void (*run)(const DepthwiseRun&);
  void (*weight_run)(const DepthwiseWeightRun&);
};
struct PlaneKernels {
  void (*correlate)(const PlaneCorrelation&);
  void (*dot)(const PlaneDot&);
};

constexpr int64_t slack = 16;  // lanes of the widest vector

// Data movement --------------------------------------------------------------------------------------------------------

// dst[j * dst_step + i] = src[i * src_step + j] for i < rows, j < columns. Steps in elements.
template <class From, class To>
using Transpose = void (*)(int64_t rows, int64_t columns, const From* src, int64_t src_step, To* dst, int64_t dst_step);
template <class From, class To> using Convert = void (*)(int64_t size, const From* src, To* dst);

struct Kernels {
  const char* name;
  MatmulKernels matmul_f32, matmul_f64, matmul_bf16;
  OuterKernels outer_f32, outer_f64;
  DepthwiseKernels<float> depthwise_f32;
  DepthwiseKernels<double> depthwise_f64;
  DepthwiseKernels<bf16> depthwise_bf16;
  PlaneKernels plane_f32, plane_f64;
  Transpose<float, float> transpose_f32;
  Transpose<double, double> transpose_f64;
  Transpose<bf16, bf16> transpose_bf16;
  Transpose<bf16, float> transpose_widen;
  Transpose<float, bf16> transpose_narrow;
  Convert<bf16, float> widen;
  Convert<float, bf16> narrow;
};

ATROUS_DECLARE_TABLES(Kernels)

}  // namespace atrous::cpu
