#include "upsample_cross_entropy.h"

#include <atomic>

namespace atrous::cpu {
namespace {

// A task is an interval: the output rows between two neighbouring low-resolution rows. It owes both rows a part of the gradient,
// so a row of the gradient is the sum of two parts: the same bits in either order, however the tasks are shared out.
template <class T, class From> class Worker {
 public:
  Worker(const UpsampleCrossEntropy& job, const UpsampleGrid<T>& grid, const UpsampleAxis<T>& axis)
      : job_(job), s_(job.shape), grid_(grid), axis_(axis), rows_(s_, grid.classes, job.logits),
        row_size_(s_.in_w * grid.classes), parts_(job.gradient.data ? 2 * row_size_ * sizeof(T) : 0),
        tile_width_(upsample_tile_vectors * upsample_kernels<T>().lanes), tile_size_(grid.classes * tile_width_),
        tile_(5 * tile_size_ * sizeof(T)),
        labels_(upsample_rows_at_once * grid.columns * sizeof(T)),
        scale_(job.scale ? upsample_rows_at_once * grid.columns * sizeof(T) : 0),
        loss_(job.pixel_loss ? upsample_rows_at_once * grid.columns * sizeof(T) : 0),
        here_(parts_.as<T>()), below_(here_ + row_size_) {
    const T* weight = static_cast<const T*>(job.weight);
    for (int64_t c = 0; c < s_.classes; ++c) weight_sum_ += weight[c];
  }

  // Adds the interval's loss to sums; here() and below() become its parts of the gradient.
  void interval(int64_t image, int64_t row, double* sums) {
    rows_.move_to(image, row);
    if (job_.gradient.data) std::fill_n(here_, 2 * row_size_, T{0});
    for (int64_t y = axis_.first[row]; y < axis_.first[row + 1]; y += upsample_rows_at_once)
      chunk(image, y, std::min(axis_.first[row + 1] - y, upsample_rows_at_once), sums);
  }
  T* here() const { return here_; }
  const T* below() const { return below_; }
  int64_t row_size() const { return row_size_; }
  bool failed() const { return failed_; }
  int64_t bad_label() const { return bad_label_; }

 private:
  void chunk(int64_t image, int64_t y, int64_t rows, double* sums) {
    const int64_t first = (image * s_.out_h + y) * s_.out_w;
    for (int64_t r = 0; r < rows; ++r) {
      read_labels(static_cast<const From*>(job_.labels) + first + r * s_.out_w, labels_.as<Label<T>>() + r * grid_.columns);
      if (job_.scale) {
        T* scale = scale_.as<T>() + r * grid_.columns;
        std::copy_n(static_cast<const T*>(job_.scale) + first + r * s_.out_w, s_.out_w, scale);
        std::fill(scale + s_.out_w, scale + grid_.columns, T{0});
      }
    }
    if (failed_) return;
    for (int64_t x = 0; x < grid_.columns; x += tile_width_) tile(x, y, rows, sums);
    if (!job_.pixel_loss) return;
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(loss_.as<T>() + r * grid_.columns, s_.out_w, static_cast<T*>(job_.pixel_loss) + first + r * s_.out_w);
  }

  void tile(int64_t x, int64_t y, int64_t rows, double* sums) {
    const auto& kernels = upsample_kernels<T>();
    const int64_t lanes = kernels.lanes, width = x + tile_width_ <= grid_.columns ? tile_width_ : lanes;
    if (job_.scale && !job_.pixel_loss && all_zero(x, width, rows)) return;
    const UpsampleColumns<T> columns = grid_.tile(x, width);
    T *base = tile_.as<T>(), *delta = base + tile_size_, *exponentials = delta + tile_size_;
    T *sum = exponentials + tile_size_, *slope = sum + tile_size_;
    const bool gradient = job_.gradient.data != nullptr;
    if (gradient) std::fill_n(sum, 2 * tile_size_, T{0});
    kernels.interpolate(columns, rows_.upper(), rows_.lower(), base, delta);
    kernels.loss(UpsampleLossTile<T>{
        s_.classes, rows, width, base, delta, axis_.share.data() + y, labels_.as<Label<T>>() + x, grid_.columns,
        static_cast<const T*>(job_.weight), weight_sum_, static_cast<T>(job_.smoothing),
        job_.scale ? scale_.as<T>() + x : nullptr, job_.pixel_loss ? loss_.as<T>() + x : nullptr, sums,
        gradient ? sum : nullptr, slope, exponentials});
    if (gradient) kernels.spread(columns, sum, slope, here_, below_);
  }

  // Whether no pixel of the tile takes part: most tiles, where few hard pixels do.
  bool all_zero(int64_t x, int64_t width, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = x; i < x + width; ++i)
        if (scale_.as<T>()[r * grid_.columns + i] != 0) return false;
    return true;
  }

  void read_labels(const From* from, Label<T>* to) {
    for (int64_t x = 0; x < s_.out_w; ++x) {
      const int64_t label = from[x];
      const bool counted = label != job_.ignore_index;
      if (counted && (label < 0 || label >= s_.classes)) {
        failed_ = true;
        bad_label_ = label;
      }
      to[x] = static_cast<Label<T>>(counted ? label : -1);
    }
    std::fill(to + s_.out_w, to + grid_.columns, Label<T>{-1});
  }

  const UpsampleCrossEntropy& job_;
  const UpsampleShape& s_;
  const UpsampleGrid<T>& grid_;
  const UpsampleAxis<T>& axis_;
  UpsampleRows<T> rows_;
  int64_t row_size_;
  Scratch parts_;
  int64_t tile_width_, tile_size_;
  Scratch tile_, labels_, scale_, loss_;
  T *here_, *below_;
  T weight_sum_ = 0;
  bool failed_ = false;
  int64_t bad_label_ = 0;
};

template <class T, class From> bool run(const UpsampleCrossEntropy& job, int64_t& bad_label) {
  const UpsampleShape& s = job.shape;
  const UpsampleGrid<T> grid(s);
  const UpsampleAxis<T> axis(s.in_h, s.out_h, s.align_corners);
  const Strides& g = job.gradient.strides;
  const auto gradient_row = [&](int64_t task) {
    return static_cast<T*>(job.gradient.data) + task / s.in_h * g.n + task % s.in_h * g.h;
  };
  const int64_t tasks = s.batch * s.in_h;
  std::vector<double> sums(2 * tasks, 0.0);
  std::vector<std::vector<T>> carried(tasks);  // part of this task's row, left by the thread that worked above it
  std::atomic<bool> failed{false};
  std::atomic<int64_t> bad{0};

  const double work = 30.0 * static_cast<double>(s.out_pixels()) * static_cast<double>(s.classes);
  parallel_by_cost(upsample_costs(s, axis), threads_for(work), [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    Worker<T, From> worker(job, grid, axis);
    const int64_t size = worker.row_size();
    std::vector<T> above(job.gradient.data ? size : 0);
    for (int64_t task = begin; task < end; ++task) {
      worker.interval(task / s.in_h, task % s.in_h, sums.data() + 2 * task);
      if (!job.gradient.data) continue;
      T* here = worker.here();
      if (task != begin && task % s.in_h != 0)
        for (int64_t i = 0; i < size; ++i) here[i] += above[i];
      copy_matrix(s.in_w, s.classes, here, grid.classes, 1, gradient_row(task), g.w, g.c);
      std::copy_n(worker.below(), size, above.data());
    }
    if (job.gradient.data && end < tasks && end % s.in_h != 0) carried[end] = std::move(above);
    if (worker.failed()) {
      bad = worker.bad_label();
      failed = true;
    }
  });

  for (int64_t task = 0; task < tasks; ++task) {
    if (carried[task].empty()) continue;
    T* row = gradient_row(task);
    for (int64_t x = 0; x < s.in_w; ++x)
      for (int64_t c = 0; c < s.classes; ++c) row[x * g.w + c * g.c] += carried[task][x * grid.classes + c];
  }
  job.sums[0] = job.sums[1] = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    job.sums[0] += sums[2 * task];
    job.sums[1] += sums[2 * task + 1];
  }
  bad_label = bad;
  return !failed;
}

template <class T> bool run_labels(const UpsampleCrossEntropy& job, int64_t& bad_label) {
  switch (job.label_type) {
    case LabelType::uint8: return run<T, uint8_t>(job, bad_label);
    case LabelType::int32: return run<T, int32_t>(job, bad_label);
    default: return run<T, int64_t>(job, bad_label);
  }
}

}  // namespace

bool upsample_cross_entropy(const UpsampleCrossEntropy& job, int64_t& bad_label) {
  if (job.dtype == DType::float64) return run_labels<double>(job, bad_label);
  return run_labels<float>(job, bad_label);
}

}  // namespace atrous::cpu
