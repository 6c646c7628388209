// Compiled once per instruction set: CMake sets the compiler flags, ATROUS_ISA (a namespace) and ATROUS_ISA_NAME.
#include "cpu/upsample_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"

#include "exp_log.h"

// Interpolation along rows: vectors run over classes, then a transpose turns them over columns.
template <class T>
void interpolate(const UpsampleColumns<T>& at, const T* upper, const T* lower, T* base, T* delta) {
  constexpr int width = lanes<T>;
  for (int64_t c = 0; c < at.classes; c += width) {
    for (int64_t x = 0; x < at.columns; x += width) {
      const auto columns_of = [&](const T* row, Vec<T>* square) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
          const Vec<T> left = load(row + at.left[x + i] + c), right = load(row + at.right[x + i] + c);
          square[i] = left + (right - left) * at.share[x + i];
        }
        transpose_square<T>(square);
      };
      Vec<T> square[width];
      columns_of(upper, square);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) store(base + (c + i) * at.columns + x, square[i]);
      columns_of(lower, square);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i)
        store(delta + (c + i) * at.columns + x, square[i] - load(base + (c + i) * at.columns + x));
    }
  }
}

template <class T> void spread(const UpsampleColumns<T>& at, const T* sum, const T* slope, T* upper, T* lower) {
  constexpr int width = lanes<T>;
  for (int64_t c = 0; c < at.classes; c += width) {
    for (int64_t x = 0; x < at.columns; x += width) {
      const auto add_columns = [&](Vec<T>* square, T* row) {
        transpose_square<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
          T *left = row + at.left[x + i] + c, *right = row + at.right[x + i] + c;
          const Vec<T> to_right = square[i] * at.share[x + i];
          store(left, load(left) + (square[i] - to_right));
          store(right, load(right) + to_right);
        }
      };
      Vec<T> square[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i)
        square[i] = load(sum + (c + i) * at.columns + x) - load(slope + (c + i) * at.columns + x);
      add_columns(square, upper);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) square[i] = load(slope + (c + i) * at.columns + x);
      add_columns(square, lower);
    }
  }
}

// Per pixel, with s the smoothing, w the class weights, W their sum, t the label and z the logits:
//   loss     = (1 - s) w[t] (lse - z[t]) + s / C (W lse - sum over c of w[c] z[c])
//   gradient = ((1 - s) w[t] + s W / C) softmax(z) - (1 - s) w[t] onehot(t) - s / C w
template <class T, int vectors> void loss_tile(const UpsampleLossTile<T>& tile) {
  constexpr int width = lanes<T>, columns = vectors * width;
  const T smooth = tile.smoothing / static_cast<T>(tile.classes), hard = 1 - tile.smoothing;
  const Vec<T> zero{};

  // sum over c of w[c] z[c] is interpolated like z itself. It also carries a NaN of any class into the loss.
  Vec<T> mean_base[vectors] = {}, mean_delta[vectors] = {};
  for (int64_t c = 0; c < tile.classes; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      mean_base[v] += load(tile.base + c * columns + v * width) * tile.weight[c];
      mean_delta[v] += load(tile.delta + c * columns + v * width) * tile.weight[c];
    }
  }

  Vec<T> total_loss[vectors] = {}, total_weight[vectors] = {}, total_scale[vectors] = {}, total_slope[vectors] = {};
  for (int64_t row = 0; row < tile.rows; ++row) {
    const T share = tile.row_share[row];
    const Label<T>* labels = tile.labels + row * tile.row_step;
    Int<T> label[vectors], all_uncounted = Int<T>{} - 1;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      label[v] = load(labels + v * width);
      all_uncounted &= label[v];
    }
    Label<T> sign = -1;
    for (int i = 0; i < width; ++i) sign &= all_uncounted[i];
    if (sign < 0) {
      if (tile.loss)
        for (int v = 0; v < vectors; ++v) store(tile.loss + row * tile.row_step + v * width, zero);
      continue;
    }

    Vec<T> largest[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) largest[v] = load(tile.base + v * width) + load(tile.delta + v * width) * share;
    for (int64_t c = 1; c < tile.classes; ++c) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = c * columns + v * width;
        const Vec<T> z = load(tile.base + at) + load(tile.delta + at) * share;
        largest[v] = z > largest[v] ? z : largest[v];
      }
    }

    Vec<T> exponentials[vectors] = {}, wanted[vectors] = {};  // wanted: z[t] - largest
    for (int64_t c = 0; c < tile.classes; ++c) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = c * columns + v * width;
        const Vec<T> z = load(tile.base + at) + load(tile.delta + at) * share - largest[v];
        const Vec<T> e = exp_vector<T>(z);
        store(tile.exponentials + at, e);
        exponentials[v] += e;
        wanted[v] = label[v] == static_cast<Label<T>>(c) ? z : wanted[v];
      }
    }

    Vec<T> factor[vectors], onehot[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Vec<T> weight, scale = zero + 1;
      for (int i = 0; i < width; ++i) weight[i] = tile.weight[label[v][i] < 0 ? 0 : label[v][i]];
      if (tile.scale) scale = load(tile.scale + row * tile.row_step + v * width);
      scale = label[v] < 0 ? zero : scale;
      weight *= scale;
      const Vec<T> log_sum = log_vector<T>(exponentials[v]);
      const Vec<T> mean = mean_base[v] + mean_delta[v] * share;
      const Vec<T> soft = (log_sum + largest[v]) * tile.weight_sum - mean;
      onehot[v] = hard * weight;
      Vec<T> loss = onehot[v] * (log_sum - wanted[v]) + smooth * scale * soft;
      loss = label[v] < 0 ? zero : loss;
      if (tile.loss) store(tile.loss + row * tile.row_step + v * width, loss);
      total_loss[v] += loss;
      total_weight[v] += weight;
      total_scale[v] += scale;
      total_slope[v] += scale * share;
      factor[v] = (onehot[v] + smooth * tile.weight_sum * scale) / exponentials[v];
    }
    if (!tile.sum) continue;
    for (int64_t c = 0; c < tile.classes; ++c) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = c * columns + v * width;
        const Vec<T> hot = label[v] == static_cast<Label<T>>(c) ? onehot[v] : zero;
        const Vec<T> gradient = load(tile.exponentials + at) * factor[v] - hot;
        store(tile.sum + at, load(tile.sum + at) + gradient);
        store(tile.slope + at, load(tile.slope + at) + gradient * share);
      }
    }
  }

  for (int v = 0; v < vectors; ++v) {
    for (int i = 0; i < width; ++i) {
      tile.sums[0] += total_loss[v][i];
      tile.sums[1] += total_weight[v][i];
    }
    if (!tile.sum || tile.smoothing == 0) continue;
    for (int64_t c = 0; c < tile.classes; ++c) {
      const int64_t at = c * columns + v * width;
      store(tile.sum + at, load(tile.sum + at) - total_scale[v] * (smooth * tile.weight[c]));
      store(tile.slope + at, load(tile.slope + at) - total_slope[v] * (smooth * tile.weight[c]));
    }
  }
}

template <class T> void loss(const UpsampleLossTile<T>& tile) {
  if (tile.columns == lanes<T>) return loss_tile<T, 1>(tile);
  loss_tile<T, upsample_tile_vectors>(tile);
}

template <class T> struct WideOf { typedef int64_t type __attribute__((vector_size(lanes<T> * 8))); };

// The first of the largest; NaN counts as largest.
template <class T, int rows> void argmax_rows(const UpsampleArgmaxTile<T>& tile, int64_t row) {
  constexpr int width = lanes<T>;
  Vec<T> best[rows];
  Int<T> found[rows] = {};
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) best[r] = load(tile.base) + load(tile.delta) * tile.row_share[row + r];
  for (int64_t c = 1; c < tile.classes; ++c) {
    const Vec<T> base = load(tile.base + c * width), delta = load(tile.delta + c * width);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec<T> z = base + delta * tile.row_share[row + r];
      const Int<T> better = ~(z <= best[r]) & (best[r] == best[r]);
      best[r] = better ? z : best[r];
      found[r] = better ? Int<T>{} + static_cast<Label<T>>(c) : found[r];
    }
  }
  for (int r = 0; r < rows; ++r) {
    int64_t* out = tile.out + (row + r) * tile.out_step;
    if (tile.columns < width) {
      for (int i = 0; i < tile.columns; ++i) out[i] = found[r][i];
    } else {
      using Wide = typename WideOf<T>::type;
      const Wide wide = __builtin_convertvector(found[r], Wide);
      __builtin_memcpy(out, &wide, sizeof wide);
    }
  }
}

template <class T> void argmax(const UpsampleArgmaxTile<T>& tile) {
  int64_t row = 0;
  for (; row + 4 <= tile.rows; row += 4) argmax_rows<T, 4>(tile, row);
  for (; row < tile.rows; ++row) argmax_rows<T, 1>(tile, row);
}

template <class T> UpsampleKernels<T> kernels_of() { return {lanes<T>, interpolate<T>, loss<T>, spread<T>, argmax<T>}; }

UpsampleTable make_table() { return {kernels_of<float>(), kernels_of<double>()}; }

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(UpsampleTable, make_table)

}  // namespace atrous::cpu
