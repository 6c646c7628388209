// Dense weight gradient: for every tap a matrix product of source channels by written channels whose depth is the pixels
// of the one rectangle of the output in which the tap is valid.
//
// Both operands are staged (NHWC, in stretches of channels, float or double) a slab of images or rows at a time. A task is
// one tap, one stretch of source channels and one panel of written channels; nobody else adds to its sums, so there is no
// reduction across threads and the order of every sum is fixed: slab by slab, block of rows by block of rows.
#include "correlate.h"
#include "typed.h"

namespace atrous::cpu {
namespace {

constexpr int64_t stretch_channels = 48;     // whole tiles of 6 rows, and whole squares of the transpose
constexpr int64_t slab_bytes = 4 << 20;      // of each operand
constexpr int64_t pixels_per_block = 128;    // times a panel: what stays in the first-level cache

template <class S> class DenseWeightGradient {
 public:
  using Acc = Accumulator<S>;

  DenseWeightGradient(const Conv2dShape& s, ConstTensor input, ConstTensor grad_output, MutableTensor grad_weight)
      : s_(s),
        input_(input),
        grad_(grad_output),
        weight_(grad_weight),
        outer_(outer_kernels<Acc>()),
        h_(forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h)),
        w_(forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w)),
        src_channels_(s.in_channels / s.groups),
        dst_channels_(s.out_channels / s.groups),
        taps_(s.kernel_h * s.kernel_w) {
    stretch_ = std::min(stretch_channels, ceil_div(src_channels_, outer_.rows) * outer_.rows);
    stretches_ = ceil_div(src_channels_, stretch_);
    int64_t vectors = ceil_div(dst_channels_, outer_.lanes), first = 0;
    for (int64_t left = ceil_div(vectors, outer_.vectors); left > 0; --left) {
      const int64_t mine = ceil_div(vectors, left), width = mine * outer_.lanes;
      panels_.push_back({first, std::min(width, dst_channels_ - first), width, static_cast<int>(mine)});
      first += width;
      vectors -= mine;
    }
    dst_padded_ = first;
    src_padded_ = stretches_ * stretch_;
    threads_ = threads_for(2.0 * static_cast<double>(s.batch * s.out_h * s.out_w * taps_) *
                           static_cast<double>(s.in_channels * dst_channels_));
  }

  void run() {
    plan_slabs();
    const int64_t sums_size = taps_ * src_padded_ * dst_padded_;
    const int64_t src_pixels = images_ * src_rows_ * s_.in_w;
    const int64_t stretch_bytes = std::max<int64_t>(src_pixels * stretch_ * static_cast<int64_t>(sizeof(Acc)), 1);
    const int64_t together = std::clamp<int64_t>(slab_bytes / stretch_bytes, 1, stretches_);
    Scratch sums(static_cast<size_t>(sums_size) * sizeof(Acc));
    Scratch src(static_cast<size_t>(together * src_pixels * stretch_) * sizeof(Acc));
    Scratch grad(static_cast<size_t>(images_ * rows_ * s_.out_w * dst_padded_) * sizeof(Acc));
    sums_ = sums.as<Acc>();
    src_ = src.as<Acc>();
    staged_grad_ = grad.as<Acc>();
    for (group_ = 0; group_ < s_.groups; ++group_) {
      parallel(sums_size, threads_, [&](int64_t begin, int64_t end) { std::fill(sums_ + begin, sums_ + end, Acc{0}); });
      for (int64_t image = 0; image < s_.batch; image += images_)
        for (int64_t row = 0; row < s_.out_h; row += rows_) {
          Slab slab{image, std::min(image + images_, s_.batch), row, std::min(row + rows_, s_.out_h), 0, 0};
          slab.src_row = std::clamp<int64_t>(slab.row * h_.src_step + h_.src_offset, 0, s_.in_h);
          slab.src_row_end = std::clamp<int64_t>(
              (slab.row_end - 1) * h_.src_step + h_.src_offset + (h_.taps - 1) * h_.tap_step + 1, slab.src_row, s_.in_h);
          stage_grad(slab);
          for (int64_t first = 0; first < stretches_; first += together) {
            const int64_t last = std::min(first + together, stretches_);
            stage_source(slab, first, last);
            accumulate(slab, first, last);
          }
        }
      write_out();
    }
  }

 private:
  struct Panel {
    int64_t first, columns, width;
    int vectors;
  };
  struct Slab {
    int64_t image, image_end, row, row_end, src_row, src_row_end;
  };

  // Slabs depend on the problem alone, never on the number of threads: they set the order of the sums.
  void plan_slabs() {
    const int64_t size = sizeof(Acc);
    const int64_t src_row = s_.in_w * stretch_ * size, grad_row = s_.out_w * dst_padded_ * size;
    const int64_t image_bytes = std::max<int64_t>({src_row * s_.in_h, grad_row * s_.out_h, 1});
    images_ = std::clamp<int64_t>(slab_bytes / image_bytes, 1, std::max<int64_t>(s_.batch, 1));
    rows_ = s_.out_h;
    src_rows_ = s_.in_h;
    if (image_bytes > slab_bytes) {
      const int64_t halo = (h_.taps - 1) * h_.tap_step;
      const int64_t by_grad = slab_bytes / std::max<int64_t>(grad_row, 1);
      const int64_t by_src = (slab_bytes / std::max<int64_t>(src_row, 1) - halo) / h_.src_step;
      rows_ = std::clamp<int64_t>(std::max<int64_t>(std::min(by_grad, by_src), 4 + halo / h_.src_step), 1, s_.out_h);
      src_rows_ = std::min(s_.in_h, (rows_ - 1) * h_.src_step + halo + 1);
    }
  }

  // [panel][pixel][width]
  void stage_grad(const Slab& slab) {
    const Strides& g = grad_.strides;
    const int64_t rows = slab.row_end - slab.row, images = slab.image_end - slab.image;
    const bool flat = g.h == g.w * s_.out_w;
    const int64_t line = flat ? rows * s_.out_w : s_.out_w, lines = flat ? 1 : rows;
    const S* from = static_cast<const S*>(grad_.data) + group_ * dst_channels_ * g.c;
    stage(images, lines, line, static_cast<int64_t>(panels_.size()), [&](const Piece& piece) {
      const auto& [image, row, first, pixels, part] = piece;
      const Panel& panel = panels_[part];
      const S* at = from + (slab.image + image) * g.n + (slab.row + row) * g.h + first * g.w + panel.first * g.c;
      Acc* to = staged_grad_ + panel.first * images * rows * s_.out_w;
      to += ((image * lines + row) * line + first) * panel.width;
      if (panel.columns < panel.width) std::fill_n(to, pixels * panel.width, Acc{0});
      copy_matrix(pixels, panel.columns, at, g.w, g.c, to, panel.width, 1);
    });
  }

  // [stretch][pixel][stretch_ channels]
  void stage_source(const Slab& slab, int64_t first_stretch, int64_t last_stretch) {
    const Strides& x = input_.strides;
    const int64_t rows = slab.src_row_end - slab.src_row, images = slab.image_end - slab.image;
    const bool flat = x.h == x.w * s_.in_w;
    const int64_t line = flat ? rows * s_.in_w : s_.in_w, lines = flat ? 1 : rows;
    const S* from = static_cast<const S*>(input_.data) + group_ * src_channels_ * x.c;
    stage(images, lines, line, last_stretch - first_stretch, [&](const Piece& piece) {
      const auto& [image, row, first, pixels, part] = piece;
      const int64_t channel = (first_stretch + part) * stretch_, channels = std::min(stretch_, src_channels_ - channel);
      const S* at = from + (slab.image + image) * x.n + (slab.src_row + row) * x.h + first * x.w + channel * x.c;
      Acc* to = src_ + (part * images * rows * s_.in_w + (image * lines + row) * line + first) * stretch_;
      if (channels < stretch_) std::fill_n(to, pixels * stretch_, Acc{0});
      copy_matrix(pixels, channels, at, x.w, x.c, to, stretch_, 1);
    });
  }

  // Pixels [first, first + pixels) of a line of an image, times one stretch or panel.
  struct Piece {
    int64_t image, line, first, pixels, part;
  };
  template <class Copy> void stage(int64_t images, int64_t lines, int64_t line, int64_t parts, const Copy& copy) const {
    constexpr int64_t piece = 128;
    const int64_t pieces = ceil_div(line, piece);
    parallel(images * lines * pieces * parts, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, first = task / parts % pieces * piece, row = task / parts / pieces;
        copy(Piece{row / lines, row % lines, first, std::min(piece, line - first), part});
      }
    });
  }

  void accumulate(const Slab& slab, int64_t first_stretch, int64_t last_stretch) {
    const int64_t panels = static_cast<int64_t>(panels_.size()), stretches = last_stretch - first_stretch;
    std::vector<int64_t> cost;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const Rectangle r = rectangle(slab, tap);
      for (int64_t i = 0; i < stretches * panels; ++i)
        cost.push_back((r.y_end - r.y) * (r.x_end - r.x) * panels_[i % panels].vectors + 1);
    }
    parallel_by_cost(cost, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        accumulate_one(slab, task / panels / stretches, first_stretch, task / panels % stretches,
                       panels_[task % panels]);
    });
  }

  struct Rectangle {
    int64_t y, y_end, x, x_end;
  };
  Rectangle rectangle(const Slab& slab, int64_t tap) const {
    Rectangle r;
    tap_range(h_, tap / s_.kernel_w, r.y, r.y_end);
    tap_range(w_, tap % s_.kernel_w, r.x, r.x_end);
    r.y = std::max(r.y, slab.row);
    r.y_end = std::max(r.y, std::min(r.y_end, slab.row_end));
    return r;
  }

  void accumulate_one(const Slab& slab, int64_t tap, int64_t first_stretch, int64_t i, const Panel& panel) const {
    const Rectangle r = rectangle(slab, tap);
    if (r.y == r.y_end || r.x == r.x_end) return;
    const int64_t images = slab.image_end - slab.image, rows = slab.row_end - slab.row;
    const int64_t src_rows = slab.src_row_end - slab.src_row;
    const int64_t channel = (first_stretch + i) * stretch_;
    const int64_t tiles = ceil_div(std::min(stretch_, src_channels_ - channel), outer_.rows);
    const int64_t block = std::max<int64_t>(pixels_per_block / (r.x_end - r.x), 1);
    const int64_t x0 = r.x * w_.src_step + w_.src_offset + tap % s_.kernel_w * w_.tap_step;
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t y = r.y; y < r.y_end; y += block) {
        const int64_t y0 = y * h_.src_step + h_.src_offset + tap / s_.kernel_w * h_.tap_step - slab.src_row;
        const Acc* a = src_ + (((i * images + image) * src_rows + y0) * s_.in_w + x0) * stretch_;
        const Acc* b = staged_grad_ + panel.first * images * rows * s_.out_w +
                       ((image * rows + y - slab.row) * s_.out_w + r.x) * panel.width;
        Acc* c = sums_ + (tap * src_padded_ + channel) * dst_padded_ + panel.first;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          outer_.kernel[panel.vectors](OuterTile{std::min(block, r.y_end - y), r.x_end - r.x, a + tile * outer_.rows, b,
                                                 h_.src_step * s_.in_w * stretch_, w_.src_step * stretch_,
                                                 s_.out_w * panel.width, panel.width,
                                                 c + tile * outer_.rows * dst_padded_, dst_padded_});
        }
      }
    }
  }

  // From [tap][source channel][written channel] to the weight's own layout, some source channels at a time.
  void write_out() const {
    const Strides& d = weight_.strides;
    const bool fused = d.w == 1 && d.h == s_.kernel_w && d.c == taps_;
    constexpr int64_t strip = 16;
    S* weight = static_cast<S*>(weight_.data) + group_ * dst_channels_ * d.n;
    parallel(ceil_div(src_channels_, strip), threads_, [&](int64_t begin, int64_t end) {
      Scratch scratch(fused ? static_cast<size_t>(strip * taps_ * dst_padded_) * sizeof(Acc) : 0);
      Acc* rows = scratch.as<Acc>();
      for (int64_t first = begin * strip; first < std::min(end * strip, src_channels_); first += strip) {
        const int64_t channels = std::min(strip, src_channels_ - first);
        for (int64_t tap = 0; tap < taps_; ++tap) {
          const Acc* from = sums_ + (tap * src_padded_ + first) * dst_padded_;
          S* to = weight + first * d.c + tap / s_.kernel_w * d.h + tap % s_.kernel_w * d.w;
          if (fused) {
            for (int64_t c = 0; c < channels; ++c)
              std::copy_n(from + c * dst_padded_, dst_padded_, rows + (c * taps_ + tap) * dst_padded_);
          } else {
            copy_matrix(channels, dst_channels_, from, dst_padded_, 1, to, d.c, d.n);
          }
        }
        if (fused) copy_matrix(channels * taps_, dst_channels_, rows, dst_padded_, 1, weight + first * d.c, 1, d.n);
      }
    });
  }

  const Conv2dShape& s_;
  const ConstTensor input_, grad_;
  const MutableTensor weight_;
  const OuterKernels& outer_;
  const Axis h_, w_;
  const int64_t src_channels_, dst_channels_, taps_;
  int64_t stretch_, stretches_, src_padded_, dst_padded_, threads_;
  int64_t images_ = 0, rows_ = 0, src_rows_ = 0, group_ = 0;
  std::vector<Panel> panels_;
  Acc *sums_ = nullptr, *src_ = nullptr, *staged_grad_ = nullptr;
};

}  // namespace

void dense_weight_gradient(const Conv2dShape& shape, DType dtype, ConstTensor input, ConstTensor grad_output,
                           MutableTensor grad_weight) {
  if (dtype == DType::float32) return DenseWeightGradient<float>(shape, input, grad_output, grad_weight).run();
  if (dtype == DType::float64) return DenseWeightGradient<double>(shape, input, grad_output, grad_weight).run();
  DenseWeightGradient<bf16>(shape, input, grad_output, grad_weight).run();
}

}  // namespace atrous::cpu
