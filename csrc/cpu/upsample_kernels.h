// The inner loops of the losses and class maps taken at an upsampled resolution, as a table per instruction set (tables.h).
//
// A tile is a few whole vectors of output columns, lanes side by side, times all classes. Arrays of a tile are
// [classes, padded to whole vectors][columns]. T is the type of the arithmetic.
#pragma once

#include "tables.h"

namespace atrous::cpu {

// Labels travel as integers as wide as T, so that lanes match; -1: not counted.
template <class T> struct LabelOf { using type = int32_t; };
template <> struct LabelOf<double> { using type = int64_t; };
template <class T> using Label = typename LabelOf<T>::type;

// Where the output columns of a tile lie between low-resolution columns, whose classes are neighbours in memory.
template <class T> struct UpsampleColumns {
  int64_t classes;              // padded to whole vectors
  int64_t columns;              // of the tile: whole vectors
  const int64_t *left, *right;  // [columns] first class of the two neighbours, in elements
  const T* share;               // [columns] weight of the right one
};

// The logits of an output row are base + row_share * delta.
template <class T> struct UpsampleLossTile {
  int64_t classes, rows, columns;
  const T *base, *delta;
  const T* row_share;  // [rows]
  const Label<T>* labels;
  int64_t row_step;    // from row to row of labels, scale and loss
  const T* weight;     // [classes]
  T weight_sum;
  T smoothing;
  const T* scale;      // per pixel; null: 1
  T* loss;             // per pixel; null: not wanted
  double* sums;        // += the loss, += weight of the label times scale
  T *sum, *slope;      // += the gradient, += row_share times the gradient; null: not wanted
  T* exponentials;     // [classes][columns], scratch
};

template <class T> struct UpsampleArgmaxTile {
  int64_t classes, rows, columns;  // columns that exist: at most one vector
  const T *base, *delta;           // one vector of columns
  const T* row_share;
  int64_t* out;
  int64_t out_step;
};

template <class T> struct UpsampleKernels {
  int lanes;
  // base = upper row at the output columns, delta = lower row there - base.
  void (*interpolate)(const UpsampleColumns<T>& at, const T* upper, const T* lower, T* base, T* delta);
  void (*loss)(const UpsampleLossTile<T>& tile);
  // The transposed interpolation: upper += that of (sum - slope), lower += that of slope.
  void (*spread)(const UpsampleColumns<T>& at, const T* sum, const T* slope, T* upper, T* lower);
  void (*argmax)(const UpsampleArgmaxTile<T>& tile);
};

struct UpsampleTable {
  UpsampleKernels<float> f32;
  UpsampleKernels<double> f64;
};

ATROUS_DECLARE_TABLES(UpsampleTable)

constexpr int64_t upsample_tile_vectors = 2;  // of the loss: two sums at a time hide the latency of an addition

}  // namespace atrous::cpu
