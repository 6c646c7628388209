// The inner loops of pyramid pooling and of the upsampling into a concatenation, as a table per instruction set (tables.h).
#pragma once

#include "tables.h"

namespace atrous::cpu {

// A run of pixels with their channels side by side. Steps are in elements.
struct PixelRun {
  int64_t pixels, channels;
  const void* src;
  int64_t step;            // from pixel to pixel
  void* value;             // [channels], accumulator type
  int32_t* index;          // [channels], of the largest; maximum only
  int32_t first;           // index of the first pixel; the next ones follow
};

// Rows of one plane. Steps are in elements.
struct PlaneRows {
  int64_t rows, columns;
  const void* src;
  int64_t row;             // from row to row
  void* value;             // [columns], accumulator type
  int32_t* index;          // [columns], of the largest; maximum only
  int32_t first;           // index of the first pixel; row by row, `row_index` apart
  int32_t row_index;
};

template <class T> struct PyramidKernels {
  using Acc = Accumulator<T>;
  void (*sum_pixels)(const PixelRun&);      // value[c] += the run's sum
  void (*max_pixels)(const PixelRun&);      // value[c], index[c] = the larger; the earlier on a tie, the last NaN
  void (*sum_rows)(const PlaneRows&);       // value[x] = sum over the rows
  void (*max_rows)(const PlaneRows&);       // value[x], index[x] = the largest of the rows
  void (*narrow)(int64_t size, const Acc* src, T* dst);
  void (*blend)(int64_t size, const Acc* a, const Acc* b, Acc weight_a, Acc weight_b, T* dst);  // weighted sum
};

struct PyramidTable {
  PyramidKernels<float> f32;
  PyramidKernels<double> f64;
  PyramidKernels<bf16> b16;
};

ATROUS_DECLARE_TABLES(PyramidTable)

}  // namespace atrous::cpu
