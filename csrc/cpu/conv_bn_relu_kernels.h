// The passes of a batch normalisation with activation, as a table of functions per instruction set (tables.h).
#pragma once

#include "tables.h"

namespace atrous::cpu {

// With y = (x - mean) * scale + shift (+ residual): the output is y held between low and high, and y's gradient is zero where it was held.
// A pass runs over `rows` of `channels` neighbours. NHWC: a row is a pixel and every column has parameters of its own. NCHW:
// `channels` counts the pixels of one plane and the parameters are single values (the functions ending in _plane).
// x, residual, grad and out have the storage type; everything else the accumulator type.
struct NormPass {
  int64_t rows, channels;
  const void *x, *residual, *grad;  // residual: of apply, or null
  const int64_t* at;  // statistics: elements from x to every row; null: rows follow each other
  void* out;
  const void *mean, *scale, *shift;
  const void *slope, *offset;  // input gradient: scale * grad + slope * (x - mean) + offset
  double low, high;
  void *sum, *product;  // [channels] or one value, overwritten
};

struct NormKernels {
  // sum = mean of x; product = sum of (x - that mean)^2. Reads x twice: callers give pieces that fit the cache.
  void (*statistics)(const NormPass&);
  void (*apply)(const NormPass&);           // out = y held between low and high
  void (*sums)(const NormPass&);            // sum = sum of y's gradient, product = sum of y's gradient * (x - mean)
  void (*input_gradient)(const NormPass&);  // out = scale * y's gradient + slope * (x - mean) + offset
  void (*statistics_plane)(const NormPass&);
  void (*apply_plane)(const NormPass&);
  void (*sums_plane)(const NormPass&);
  void (*input_gradient_plane)(const NormPass&);
};

struct NormTable {
  NormKernels f32, f64, bf16;
};

ATROUS_DECLARE_TABLES(NormTable)

}  // namespace atrous::cpu
