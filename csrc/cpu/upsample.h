// Bilinear upsampling as the losses and class maps need it: where output rows and columns lie between low-resolution ones,
// and low-resolution rows laid out for the kernels. Positions are computed as the framework does, in the arithmetic type.
#pragma once

#include <type_traits>
#include <utility>

#include "conv2d.h"
#include "problem.h"
#include "typed.h"
#include "upsample_kernels.h"

namespace atrous::cpu {

struct UpsampleShape {
  int64_t batch, classes, in_h, in_w, out_h, out_w;
  bool align_corners;
  int64_t out_pixels() const { return batch * out_h * out_w; }
};

// Output rows are worked on this many at a time: bounds the scratch memory of very large factors.
constexpr int64_t upsample_rows_at_once = 32;

template <class T> const UpsampleKernels<T>& upsample_kernels() {
  if constexpr (std::is_same_v<T, double>) return table<UpsampleTable>().f64;
  else return table<UpsampleTable>().f32;
}

// One axis: output position o lies between left[o] and its right neighbour, with weight share[o] for the latter.
template <class T> struct UpsampleAxis {
  std::vector<int64_t> left;
  std::vector<T> share;
  std::vector<int64_t> first;  // [n_in + 1]: positions with left neighbour i are [first[i], first[i + 1])

  UpsampleAxis(int64_t n_in, int64_t n_out, bool align_corners) : left(n_out), share(n_out), first(n_in + 1, n_out) {
    const T scale = !align_corners ? static_cast<T>(n_in) / static_cast<T>(n_out)
                    : n_out > 1    ? static_cast<T>(n_in - 1) / static_cast<T>(n_out - 1)
                                   : T{0};
    for (int64_t o = n_out - 1; o >= 0; --o) {
      const T position = align_corners ? scale * static_cast<T>(o)
                                       : std::max(scale * (static_cast<T>(o) + T{0.5}) - T{0.5}, T{0});
      left[o] = std::min(static_cast<int64_t>(position), n_in - 1);
      // The last one has no right neighbour.
      share[o] = left[o] == n_in - 1 ? T{0} : std::clamp(position - static_cast<T>(left[o]), T{0}, T{1});
      first[left[o]] = o;
    }
    for (int64_t i = n_in - 1; i >= 0; --i) first[i] = std::min(first[i], first[i + 1]);
  }
  int64_t size_of(int64_t i) const { return first[i + 1] - first[i]; }
};

// The columns of the output, padded to whole vectors, as the kernels take them.
template <class T> struct UpsampleGrid {
  int64_t classes;  // padded to whole vectors
  int64_t columns;  // padded to whole vectors
  std::vector<int64_t> left, right;
  std::vector<T> share;

  UpsampleGrid(const UpsampleShape& s)
      : classes(round_up(s.classes, upsample_kernels<T>().lanes)), columns(round_up(s.out_w, upsample_kernels<T>().lanes)),
        left(columns), right(columns), share(columns) {
    const UpsampleAxis<T> axis(s.in_w, s.out_w, s.align_corners);
    for (int64_t x = 0; x < s.out_w; ++x) {
      left[x] = axis.left[x] * classes;
      right[x] = std::min(axis.left[x] + 1, s.in_w - 1) * classes;
      share[x] = axis.share[x];
    }
  }
  UpsampleColumns<T> tile(int64_t x, int64_t width) const {
    return {classes, width, left.data() + x, right.data() + x, share.data() + x};
  }
};

// Two neighbouring low-resolution rows of one image, [columns][padded classes]; going down, each row is read once.
template <class T> class UpsampleRows {
 public:
  UpsampleRows(const UpsampleShape& shape, int64_t classes, ConstTensor logits)
      : shape_(shape), classes_(classes), logits_(logits), size_(shape.in_w * classes),
        memory_(static_cast<size_t>(2 * size_) * sizeof(T)), upper_(memory_.as<T>()), lower_(upper_ + size_) {
    std::fill_n(upper_, 2 * size_, T{0});  // the padding stays so
  }

  void move_to(int64_t image, int64_t row) {
    const bool next = image == image_ && row == row_ + 1;
    if (next) std::swap(upper_, lower_);
    else read(image, row, upper_);
    image_ = image;
    row_ = row;
    read(image, std::min(row + 1, shape_.in_h - 1), lower_);
  }
  const T* upper() const { return upper_; }
  const T* lower() const { return lower_; }

 private:
  void read(int64_t image, int64_t row, T* to) const {
    const Strides& s = logits_.strides;
    const T* from = static_cast<const T*>(logits_.data) + image * s.n + row * s.h;
    copy_matrix(shape_.in_w, shape_.classes, from, s.w, s.c, to, classes_, 1);
  }

  UpsampleShape shape_;
  int64_t classes_;
  ConstTensor logits_;
  int64_t size_;
  Scratch memory_;
  T *upper_, *lower_;
  int64_t image_ = -1, row_ = -1;
};

// Output rows between low-resolution rows i and i + 1 of an image are one task; its cost is about its pixels.
template <class T> std::vector<int64_t> upsample_costs(const UpsampleShape& s, const UpsampleAxis<T>& rows) {
  std::vector<int64_t> cost;
  cost.reserve(s.batch * s.in_h);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t i = 0; i < s.in_h; ++i) cost.push_back(1 + rows.size_of(i));
  return cost;
}

}  // namespace atrous::cpu
