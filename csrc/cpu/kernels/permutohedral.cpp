// Compiled once per instruction set: CMake sets the compiler flags and ATROUS_ISA (a namespace).
#include "cpu/permutohedral_kernels.h"

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"

#include "exp_log.h"

// Vectors no wider than a row. A row that is no whole number of them ends with two that overlap: a channel computed twice has
// the same value twice, and no neighbouring row is touched.
template <class T, int width> struct PartOf {
  typedef T type __attribute__((vector_size(width * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(width * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int width> using Part = typename PartOf<T, width>::type;

template <int width, class T> inline Part<T, width> load_part(const T* from) {
  return *reinterpret_cast<const typename PartOf<T, width>::unaligned*>(from);
}
template <int width, class T> inline void store_part(T* to, Part<T, width> v) {
  *reinterpret_cast<typename PartOf<T, width>::unaligned*>(to) = v;
}

constexpr int most_parts = 4;  // of a row at a time

template <class T, int width, int parts, class Body> inline void parts_from(int64_t channels, int64_t first, const Body& body) {
  int64_t at[parts];
  for (int i = 0; i < parts; ++i) {
    const int64_t from = first + i * width;
    at[i] = from + width <= channels ? from : channels - width;
  }
  body.template operator()<width, parts>(at);
}

// Only the last two parts of a row overlap, and they are in one group: what a group overwrites no later one reads.
template <class T, int width, class Body> inline void with_width(int64_t channels, const Body& body) {
  int64_t first = 0;
  for (; channels - first > (most_parts + 1) * width; first += most_parts * width)
    parts_from<T, width, most_parts>(channels, first, body);
  if (channels - first > most_parts * width) {
    parts_from<T, width, most_parts - 1>(channels, first, body);
    first += (most_parts - 1) * width;
  }
  const int64_t left = channels - first;
  if (left > 3 * width) parts_from<T, width, 4>(channels, first, body);
  else if (left > 2 * width) parts_from<T, width, 3>(channels, first, body);
  else if (left > width) parts_from<T, width, 2>(channels, first, body);
  else if (left > 0) parts_from<T, width, 1>(channels, first, body);
}

// body.operator()<width, parts>(positions of the parts), for groups of parts that together cover a row.
template <class T, int width = lanes<T>, class Body> inline void over_row(int64_t channels, const Body& body) {
  if constexpr (width > 1)
    if (channels < width) return over_row<T, width / 2>(channels, body);
  with_width<T, width>(channels, body);
}

// Long sums go by blocks, so that their rounding errors grow with the root of the length only.
constexpr int64_t block_terms = 256;

template <class T> void weighted(const WeightedRows<T>& rows) {
  over_row<T>(rows.channels, [&]<int width, int parts>(const int64_t* at) {
    Part<T, width> factor[parts];
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) factor[i] = rows.factor ? load_part<width>(rows.factor + at[i]) : Part<T, width>{} + 1;
    for (int64_t r = rows.first; r < rows.last; ++r) {
      int64_t k = rows.begin ? rows.begin[r] : r * rows.terms;
      const int64_t end = rows.begin ? rows.begin[r + 1] : k + rows.terms;
      Part<T, width> total[parts] = {};
      while (k < end) {
        const int64_t stop = end - k > block_terms ? k + block_terms : end;
        Part<T, width> sum[parts] = {};
        for (; k < stop; ++k) {
          const T* src = rows.src + static_cast<int64_t>(rows.index[k]) * rows.src_stride;
          const T weight = rows.scale ? rows.weight[k] * rows.scale[rows.index[k]] : rows.weight[k];
#pragma GCC unroll 4
          for (int i = 0; i < parts; ++i) sum[i] += load_part<width>(src + at[i]) * weight;
        }
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) total[i] += sum[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) store_part<width>(rows.dst + r * rows.channels + at[i], total[i] * factor[i]);
    }
  });
}

template <class T> void blur(const BlurRows<T>& rows) {
  over_row<T>(rows.channels, [&]<int width, int parts>(const int64_t* at) {
    for (int64_t r = rows.first; r < rows.last; ++r) {
      const T* src = rows.src + r * rows.channels;
      const T* a = rows.src + static_cast<int64_t>(rows.neighbours[2 * r]) * rows.channels;
      const T* b = rows.src + static_cast<int64_t>(rows.neighbours[2 * r + 1]) * rows.channels;
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) {
        const Part<T, width> around = load_part<width>(a + at[i]) + load_part<width>(b + at[i]);
        store_part<width>(rows.dst + r * rows.channels + at[i], load_part<width>(src + at[i]) + around * static_cast<T>(0.5));
      }
    }
  });
}

template <class T> void blur_chains(const BlurChains<T>& chains) {
  over_row<T>(chains.channels, [&]<int width, int parts>(const int64_t* at) {
    const auto row = [&](int32_t vertex) { return chains.values + static_cast<int64_t>(vertex) * chains.channels; };
    for (int64_t k = 0; k < chains.count;) {
      T* here = row(~chains.order[k]);
      Part<T, width> before[parts] = {}, now[parts], after[parts];
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) now[i] = load_part<width>(here + at[i]);
      for (++k; k < chains.count && chains.order[k] >= 0; ++k) {
        T* const next = row(chains.order[k]);
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) after[i] = load_part<width>(next + at[i]);
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) {
          store_part<width>(here + at[i], now[i] + (before[i] + after[i]) * static_cast<T>(0.5));
          before[i] = now[i];
          now[i] = after[i];
        }
        here = next;
      }
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) store_part<width>(here + at[i], now[i] + before[i] * static_cast<T>(0.5));
    }
  });
}

template <class T> inline T dot(int64_t channels, const T* a, const T* b) {
  Vec<T> sum{};
  int64_t c = 0;
  for (; c + lanes<T> <= channels; c += lanes<T>) sum += load(a + c) * load(b + c);
  T total = 0;
  for (int i = 0; i < lanes<T>; ++i) total += sum[i];
  for (; c < channels; ++c) total += a[c] * b[c];
  return total;
}

template <class T> void weight_gradient(const WeightGradientRows<T>& rows) {
  const int64_t n = rows.channels;
  for (int64_t r = rows.first; r < rows.last; ++r)
    for (int64_t k = r * rows.terms; k < (r + 1) * rows.terms; ++k) {
      const int64_t vertex = rows.index[k];
      rows.dst[k] = rows.scale * (dot(n, rows.grad + r * n, rows.blurred + vertex * n) +
                                  dot(n, rows.values + r * n, rows.reversed + vertex * n));
    }
}

template <class T> void mix(const MixRows<T>& rows) {
  for (int64_t r = rows.first; r < rows.last; ++r) {
    T* const values = rows.values + r * rows.channels;
    for (int64_t j = 0; j < rows.channels; ++j) rows.row[j] = values[j];
    over_row<T>(rows.channels, [&]<int width, int parts>(const int64_t* at) {
      Part<T, width> sum[parts] = {};
      for (int64_t j = 0; j < rows.channels; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) sum[i] += load_part<width>(rows.matrix + j * rows.channels + at[i]) * rows.row[j];
      }
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) store_part<width>(values + at[i], sum[i]);
    });
  }
}

// The vector of the other halves at a distance: after one step per power of two below its width, every lane has the total.
template <int distance, class T> inline Vec<T> swapped(Vec<T> v) {
  Int<T> index;
  for (int i = 0; i < lanes<T>; ++i) index[i] = i ^ distance;
  return __builtin_shuffle(v, index);
}
template <int distance, class T> inline Vec<T> sum_of_lanes(Vec<T> v) {
  if constexpr (distance == 0) return v;
  else return sum_of_lanes<distance / 2, T>(v + swapped<distance, T>(v));
}
template <int distance, class T> inline Vec<T> largest_of_lanes(Vec<T> v) {
  if constexpr (distance == 0) return v;
  else {
    const Vec<T> other = swapped<distance, T>(v);
    return largest_of_lanes<distance / 2, T>(v > other ? v : other);
  }
}

// In place, over whole vectors; what pads the row is -inf.
template <class T> inline void softmax(T* row, int64_t padded) {
  constexpr int n = lanes<T>;
  Vec<T> largest = load(row);
  for (int64_t c = n; c < padded; c += n) {
    const Vec<T> x = load(row + c);
    largest = x > largest ? x : largest;
  }
  largest = largest_of_lanes<n / 2, T>(largest);
  Vec<T> sum{};
  for (int64_t c = 0; c < padded; c += n) {
    const Vec<T> e = exp_vector<T>(load(row + c) - largest);
    store(row + c, e);
    sum += e;
  }
  const Vec<T> factor = 1 / sum_of_lanes<n / 2, T>(sum);
  for (int64_t c = 0; c < padded; c += n) store(row + c, load(row + c) * factor);
}

// The unary energies of some rows, one channel after the other: where they are, or gathered.
template <class T> struct Unary {
  const T* first;
  int64_t stride;
};

template <class T> inline Unary<T> unary_of(const MeanFieldRows<T>& rows, int64_t from, int64_t count, T* scratch) {
  const T* const first = rows.unary + from * rows.unary_row;
  if (rows.unary_channel == 1) return {first, rows.unary_row};
  for (int64_t c = 0; c < rows.channels; ++c)
    for (int64_t i = 0; i < count; ++i)
      scratch[i * rows.channels + c] = first[i * rows.unary_row + c * rows.unary_channel];
  return {scratch, rows.channels};
}

// Minus the energies of row r, at the given positions.
template <int width, int parts, class T>
inline void exponents(const MeanFieldRows<T>& rows, int64_t r, const T* unary, const int64_t* at, Part<T, width>* sum) {
#pragma GCC unroll 4
  for (int i = 0; i < parts; ++i) sum[i] = -load_part<width>(unary + at[i]);
  for (int64_t p = 0; p < rows.count; ++p) {
    const auto& part = rows.parts[p];
    const int32_t* const index = part.index + r * part.terms;
    const T* const weight = part.weight + r * part.terms;
    Part<T, width> filtered[parts] = {};
    for (int64_t k = 0; k < part.terms; ++k) {
      const T* const src = part.src + static_cast<int64_t>(index[k]) * rows.channels;
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) filtered[i] += load_part<width>(src + at[i]) * weight[k];
    }
    const T scale = part.scale ? part.scale[r] : 1;
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) sum[i] += filtered[i] * scale;
  }
}

// Rows of `parts` whole vectors, the last of which may overlap the one before, without leaving the registers.
template <int parts, class T>
inline void softmax_in_registers(const MeanFieldRows<T>& rows, int64_t from, int64_t count, const Unary<T>& unary) {
  constexpr int n = lanes<T>;
  int64_t at[parts];
  for (int i = 0; i < parts; ++i) at[i] = i + 1 < parts ? i * n : rows.channels - n;
  Vec<T> once{};  // 1 where a lane of the last vector is not in the one before
  for (int i = 0; i < n; ++i) once[i] = at[parts - 1] + i >= (parts - 1) * n;
  for (int64_t row = 0; row < count; ++row) {
    Vec<T> x[parts];
    exponents<n, parts>(rows, from + row, unary.first + row * unary.stride, at, x);
    Vec<T> largest = x[0], sum{};
#pragma GCC unroll 4
    for (int i = 1; i < parts; ++i) largest = x[i] > largest ? x[i] : largest;
    largest = largest_of_lanes<n / 2, T>(largest);
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) {
      x[i] = exp_vector<T>(x[i] - largest);
      sum += i + 1 < parts ? x[i] : x[i] * once;
    }
    const Vec<T> factor = 1 / sum_of_lanes<n / 2, T>(sum);
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) store(rows.dst + (from + row) * rows.dst_stride + at[i], x[i] * factor);
  }
}

// Rows of any length, through the scratch memory.
template <class T>
inline void softmax_in_memory(const MeanFieldRows<T>& rows, int64_t from, int64_t count, const Unary<T>& unary, T* scratch) {
  constexpr int n = lanes<T>;
  const int64_t channels = rows.channels, padded = (channels + n - 1) / n * n;
  for (int64_t i = 0; i < count; ++i)  // overwritten below but for the pads
    store(scratch + i * padded + padded - n, Vec<T>{} - static_cast<T>(__builtin_inf()));
  over_row<T>(channels, [&]<int width, int parts>(const int64_t* at) {
    for (int64_t i = 0; i < count; ++i) {
      Part<T, width> sum[parts];
      exponents<width, parts>(rows, from + i, unary.first + i * unary.stride, at, sum);
#pragma GCC unroll 4
      for (int k = 0; k < parts; ++k) store_part<width>(scratch + i * padded + at[k], sum[k]);
    }
  });
  for (int64_t i = 0; i < count; ++i) softmax(scratch + i * padded, padded);
  over_row<T>(channels, [&]<int width, int parts>(const int64_t* at) {
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
      for (int k = 0; k < parts; ++k)
        store_part<width>(rows.dst + (from + i) * rows.dst_stride + at[k], load_part<width>(scratch + i * padded + at[k]));
  });
}

template <class T>
inline void energies(const MeanFieldRows<T>& rows, int64_t from, int64_t count, const Unary<T>& unary) {
  over_row<T>(rows.channels, [&]<int width, int parts>(const int64_t* at) {
    for (int64_t i = 0; i < count; ++i) {
      Part<T, width> sum[parts];
      exponents<width, parts>(rows, from + i, unary.first + i * unary.stride, at, sum);
#pragma GCC unroll 4
      for (int k = 0; k < parts; ++k) store_part<width>(rows.dst + (from + i) * rows.dst_stride + at[k], -sum[k]);
    }
  });
}

template <class T> void mean_field(const MeanFieldRows<T>& rows) {
  const int64_t vectors = rows.channels < lanes<T> ? 0 : (rows.channels + lanes<T> - 1) / lanes<T>;
  T* const rest = rows.scratch + mean_field_rows * rows.channels;
  for (int64_t from = rows.first; from < rows.last; from += mean_field_rows) {
    const int64_t count = rows.last - from < mean_field_rows ? rows.last - from : mean_field_rows;
    const Unary<T> unary = unary_of(rows, from, count, rows.scratch);
    if (!rows.softmax) energies(rows, from, count, unary);
    else if (vectors == 1) softmax_in_registers<1>(rows, from, count, unary);
    else if (vectors == 2) softmax_in_registers<2>(rows, from, count, unary);
    else if (vectors == 3) softmax_in_registers<3>(rows, from, count, unary);
    else if (vectors == 4) softmax_in_registers<4>(rows, from, count, unary);
    else softmax_in_memory(rows, from, count, unary, rest);
  }
}

template <class T> PermutohedralKernels<T> kernels_of() {
  return {weighted<T>, blur<T>, blur_chains<T>, weight_gradient<T>, mix<T>, mean_field<T>};
}

PermutohedralTable make() { return {kernels_of<float>(), kernels_of<double>()}; }

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(PermutohedralTable, make)

}  // namespace atrous::cpu
