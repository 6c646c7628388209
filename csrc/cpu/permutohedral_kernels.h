// The inner loops of the permutohedral lattice and of mean field inference, as a table per instruction set (tables.h).
//
// Values of points and of vertices are rows of `channels` neighbours.
#pragma once

#include "tables.h"

namespace atrous::cpu {

// dst[r] = factor * sum over the terms k of row r of weight[k] * scale[index[k]] * src[index[k]]: points into vertices, and back.
template <class T> struct WeightedRows {
  int64_t first, last;   // rows
  const int64_t* begin;  // of every row's terms; null: row r has `terms` from r * terms on
  int64_t terms;
  const int32_t* index;
  const T *weight, *scale, *src;  // scale: one per row of src, or null
  int64_t src_stride;             // between its rows
  const T* factor;                // one per channel, or null
  T* dst;
  int64_t channels;
};

// dst[r] = src[r] + (src[a] + src[b]) / 2, a and b being the neighbours of r along one axis.
template <class T> struct BlurRows {
  int64_t first, last;
  const int32_t* neighbours;  // [rows][2]
  const T* src;
  T* dst;
  int64_t channels;
};

// The same in place: the rows of `order` follow each other along the axis, but for the first of a chain, which stands as its
// complement. Whole chains only.
template <class T> struct BlurChains {
  const int32_t* order;
  int64_t count;
  T* values;
  int64_t channels;
};

// dst[r][k] = scale * (grad[r] . blurred[index[r][k]] + values[r] . reversed[index[r][k]])
template <class T> struct WeightGradientRows {
  int64_t first, last, terms;
  const int32_t* index;
  const T *grad, *blurred, *values, *reversed;
  T scale;
  T* dst;
  int64_t channels;
};

// values[r] times a matrix [channels][channels], transposed, in place: values[r][i] = sum over j of values[r][j] * matrix[j][i].
template <class T> struct MixRows {
  int64_t first, last;
  T* values;
  const T* matrix;
  T* row;  // room for one
  int64_t channels;
};

// dst[r] = unary[r] - sum over the parts of scale[r] * sum over their terms of weight * src[index], or the softmax of minus that.
template <class T> struct MeanFieldRows {
  struct Part {
    int64_t terms;
    const int32_t* index;
    const T *weight, *src;
    const T* scale;  // one per row, or null
  };
  int64_t first, last, channels;
  const T* unary;
  int64_t unary_row, unary_channel;  // strides
  const Part* parts;
  int64_t count;  // of parts
  bool softmax;
  T* dst;  // may be unary
  int64_t dst_stride;
  T* scratch;  // mean_field_scratch(channels) elements
};

constexpr int64_t mean_field_rows = 16;  // updated at a time
constexpr int64_t mean_field_scratch(int64_t channels) { return 2 * mean_field_rows * (channels + 16); }

template <class T> struct PermutohedralKernels {
  void (*weighted)(const WeightedRows<T>&);
  void (*blur)(const BlurRows<T>&);
  void (*blur_chains)(const BlurChains<T>&);
  void (*weight_gradient)(const WeightGradientRows<T>&);
  void (*mix)(const MixRows<T>&);
  void (*mean_field)(const MeanFieldRows<T>&);
};

struct PermutohedralTable {
  PermutohedralKernels<float> f32;
  PermutohedralKernels<double> f64;
};

ATROUS_DECLARE_TABLES(PermutohedralTable)

}  // namespace atrous::cpu
