// Weight gradient of Winograd's convolution on phase grids: the transpose of the forward algorithm (winograd.cpp) in its weight.
#include <cstring>

#include "winograd.h"
#include "winograd_tiles.h"

namespace atrous::cpu {
namespace {

// Per point a product over tiles of the transformed input and the
// output gradient, which takes the output transform's transpose; then the weight transform's transpose. A task takes a strip of
// source channels from input to weights, so that their tiles and sums stay in the caches of its core.
class WinogradWeightGradient : Winograd {
 public:
  WinogradWeightGradient(const Conv2dShape& s, int64_t tile, ConstTensor input, ConstTensor grad_output,
                         MutableTensor grad_weight)
      : Winograd(forward_axis(s.in_h, s.out_h, 3, 1, s.padding_h, s.dilation_h),
                 forward_axis(s.in_w, s.out_w, 3, 1, s.padding_w, s.dilation_w), s.batch, tile,
                 most_strip + round_up(s.out_channels / s.groups, winograd_kernels().lanes),
                 // A block adds to nine taps: reading and writing them moves about as much as one weight per point.
                 s.in_channels / s.groups * (s.out_channels / s.groups),
                 18.0 * static_cast<double>(s.batch * s.out_h * s.out_w * s.out_channels) *
                     static_cast<double>(s.in_channels / s.groups)),
        groups_(s.groups),
        input_(source_reader(input, s.in_channels / s.groups)),
        grad_output_{grad_output, s.out_channels / s.groups, round_up(s.out_channels / s.groups, lanes_), s.out_h, s.out_w,
                     h_.size.written, w_.size.written, 0, 0, transforms_.gradient},
        grad_weight_(grad_weight),
        strip_(std::min(most_strip, round_up(ceil_div(input_.padded, 4 * threads_), lanes_))),
        columns_(grad_output_.padded) {
    input_.crowded = input.strides.w * static_cast<int64_t>(sizeof(float)) % cache_alias == 0;
  }

  void run() {
    const Points grad_points(rows_per_block_ * tiles_per_row_, columns_);
    const bool one_block = rows_per_block_ >= total_rows_;
    Scratch grad(grad_points.bytes(points_));
    Scratch sums(one_block ? 0 : static_cast<size_t>(input_.padded * 9 * columns_) * sizeof(float));
    for (int64_t group = 0; group < groups_; ++group) {
      if (total_rows_ == 0) write_zeros();
      for_blocks([&](int64_t rows) {
        read(grad_output_, rows, grad_points, grad.as<float>());
        const auto tiles = tiles_of_points(rows);
        parallel(ceil_div(input_.padded, strip_), threads_, [&](int64_t begin, int64_t end) {
          Strip strip(*this);
          for (int64_t task = begin; task < end; ++task)
            strip.run(task * strip_, rows, tiles, grad_points, grad.as<float>(), one_block ? nullptr : sums.as<float>());
        });
      });
      input_.tensor.data = static_cast<const float*>(input_.tensor.data) + input_.channels * input_.tensor.strides.c;
      grad_output_.tensor.data =
          static_cast<const float*>(grad_output_.tensor.data) + grad_output_.channels * grad_output_.tensor.strides.c;
      grad_weight_.data = static_cast<float*>(grad_weight_.data) + grad_output_.channels * grad_weight_.strides.n;
    }
  }

 private:
  static constexpr int64_t most_strip = 48;  // a multiple of the rows and the lanes of every kernel

  // Of a point: runs [first, last) of the block's rows of tiles that need it, all or per image the leading ones; and how many
  // tiles of each row do.
  struct Tiles {
    std::vector<std::pair<int64_t, int64_t>> runs;
    int64_t columns;
  };
  std::vector<Tiles> tiles_of_points(int64_t rows) const {
    std::vector<Tiles> all;
    for (int64_t point = 0; point < points_; ++point)
      all.push_back({row_runs(rows, point / w_.size.points),
                     point % w_.size.points < w_.size.shared ? tiles_per_row_ : w_.whole});
    return all;
  }
  std::vector<std::pair<int64_t, int64_t>> row_runs(int64_t rows, int64_t point) const {
    if (point < h_.size.shared || h_.whole == h_.tiles()) return {{0, rows}};
    std::vector<std::pair<int64_t, int64_t>> runs;
    for (int64_t row = 0; row < rows; row += h_.tiles() - tile_of(row)) {
      const int64_t last = std::min(row + h_.whole - tile_of(row), rows);
      if (last > row) runs.emplace_back(row, last);
    }
    return runs;
  }

  // What a thread needs for one strip after the other.
  class Strip {
   public:
    explicit Strip(const WinogradWeightGradient& of)
        : of_(of),
          input_points_(of.rows_per_block_ * of.tiles_per_row_, of.strip_),
          // The last rows of a product reach past the strip, into the vector between tiles; nobody reads their sums.
          sum_points_(round_up(of.strip_, outer_kernels<float>().rows), of.columns_),
          input_(input_points_.bytes(of.points_)),
          sums_(sum_points_.bytes(of.points_)),
          taps_(static_cast<size_t>(of.strip_ * 9 * of.columns_) * sizeof(float)),
          stage_(static_cast<size_t>(max_tile_side * of.input_.width * of.strip_) * sizeof(float)) {}

    // `total` [channel][tap][column] collects the blocks' sums; null where there is one block.
    void run(int64_t first, int64_t rows, const std::vector<Tiles>& tiles, const Points& grad_points, const float* grad,
             float* total) {
      const int64_t padded = std::min(of_.strip_, of_.input_.padded - first);
      for (int64_t row = 0; row < rows; ++row)
        of_.read_row(of_.input_, row, first, padded, stage_.as<float>(), input_points_,
                     input_.as<float>() + row * of_.tiles_per_row_ * input_points_.tile_step);
      std::memset(sums_.as<float>(), 0, sum_points_.bytes(of_.points_));
      for (int64_t point = 0; point < of_.points_; ++point)
        multiply(tiles[point], padded, input_.as<float>() + point * input_points_.point_step, grad_points,
                 grad + point * grad_points.point_step, sums_.as<float>() + point * sum_points_.point_step);
      const bool last_block = of_.first_row_ + rows == of_.total_rows_;
      write(first, std::min(of_.strip_, of_.input_.channels - first), sums_.as<float>(), total, last_block);
    }

   private:
    void multiply(const Tiles& tiles, int64_t channels, const float* input, const Points& grad_points, const float* grad,
                  float* sums) const {
      const OuterKernels& outer = outer_kernels<float>();
      const int64_t widest = outer.vectors * of_.lanes_;
      const int64_t input_row = of_.tiles_per_row_ * input_points_.tile_step, grad_row = of_.tiles_per_row_ * grad_points.tile_step;
      for (int64_t column = 0; column < of_.columns_; column += widest) {
        const int64_t vectors = std::min(widest, of_.columns_ - column) / of_.lanes_;
        for (int64_t channel = 0; channel < channels; channel += outer.rows)
          for (const auto& [first, last] : tiles.runs)
            outer.kernel[vectors]({last - first, tiles.columns, input + first * input_row + channel,
                                   grad + first * grad_row + column, input_row, input_points_.tile_step, grad_row,
                                   grad_points.tile_step, sums + channel * sum_points_.tile_step + column,
                                   sum_points_.tile_step});
      }
    }

    void write(int64_t channel, int64_t count, const float* sums, float* total, bool last_block) {
      const int64_t size = 9 * of_.columns_;
      float* taps = total ? total + channel * size : taps_.as<float>();
      for (int64_t i = 0; i < count; ++i) {
        const bool add = total && of_.first_row_ > 0;
        float* to = add ? taps_.as<float>() : taps + i * size;
        of_.transforms_.weight_gradient(sums + i * sum_points_.tile_step, sum_points_.point_step, of_.columns_ / of_.lanes_, to,
                                        of_.columns_);
        if (!add) continue;
        for (int64_t j = 0; j < size; ++j) taps[i * size + j] += to[j];
      }
      if (last_block) of_.write(channel, count, taps);
    }

    const WinogradWeightGradient& of_;
    const Points input_points_, sum_points_;
    Scratch input_, sums_, taps_, stage_;
  };

  // taps [channel][tap][column]
  void write(int64_t channel, int64_t count, const float* taps) const {
    const Strides& d = grad_weight_.strides;
    float* to = static_cast<float*>(grad_weight_.data) + channel * d.c;
    if (d.w == 1 && d.h == 3 && d.c == 9)
      return copy_matrix(grad_output_.channels, count * 9, taps, 1, columns_, to, d.n, 1);
    for (int64_t tap = 0; tap < 9; ++tap)
      copy_matrix(grad_output_.channels, count, taps + tap * columns_, 1, 9 * columns_, to + tap / 3 * d.h + tap % 3 * d.w, d.n,
                  d.c);
  }

  void write_zeros() const {
    const std::vector<float> zeros(static_cast<size_t>(9 * columns_));
    for (int64_t channel = 0; channel < input_.channels; ++channel) write(channel, 1, zeros.data());
  }

  const int64_t groups_;
  Reader input_, grad_output_;
  MutableTensor grad_weight_;
  const int64_t strip_, columns_;
};

}  // namespace

void winograd_weight_gradient(const Conv2dShape& shape, int64_t tile, ConstTensor input, ConstTensor grad_output,
                              MutableTensor grad_weight) {
  WinogradWeightGradient(shape, tile, input, grad_output, grad_weight).run();
}

}  // namespace atrous::cpu
