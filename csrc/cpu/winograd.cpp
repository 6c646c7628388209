// Winograd's convolution on phase grids.
//
// With rate r, written pixels whose positions are equal modulo r form a grid (a phase) on which the convolution has rate 1,
// so a tile of F(m x m, 3 x 3) takes its (m + 2)^2 source pixels r apart, where they lie: nothing is rearranged. Per block
// of tiles: transform the source, one matrix product per point (tiles x source channels x written channels), transform
// back. Where the rate is so large that a phase has one or two pixels, three products do for them (TileForm::phase2), and
// tiles that reach beyond the image leave out the points that only their missing pixels need.
#include "winograd.h"

#include <array>

#include "pack_weight.h"
#include "typed.h"
#include "winograd_kernels.h"

namespace atrous::cpu {
namespace {

// Transformed source and sums of one block of tiles stay in the caches of their cores (a shared one may be busy with others),
// unless the weights, which every block reads anew, are larger than that.
constexpr int64_t block_bytes = 2 << 20, most_block_bytes = 64 << 20;
constexpr int64_t staged_channels = 64;
constexpr int64_t max_pixels = max_tile_side * max_tile_side;

const WinogradKernels& winograd_kernels() { return table<WinogradKernels>(); }

int64_t round_up(int64_t size, int64_t step) { return ceil_div(size, step) * step; }

// The tiles along one axis.
struct Tiling {
  Axis axis;
  TileForm form;
  TileSizes size;
  std::vector<int64_t> starts;  // first written positions, ascending
  int64_t whole;                // of these, the leading ones whose pixels all lie in the image

  Tiling(const Axis& of, int64_t tile) : axis(of), form(form_of(of, tile)), size(tile_sizes[form]), whole(0) {
    for (int64_t phase = 0; phase < std::min(axis.tap_step, axis.n_out); ++phase)
      for (int64_t first = phase; first < axis.n_out; first += size.written * axis.tap_step) starts.push_back(first);
    std::sort(starts.begin(), starts.end());
    for (const int64_t start : starts) whole += start + (size.written - 1) * axis.tap_step < axis.n_out;
  }

  int64_t tiles() const { return static_cast<int64_t>(starts.size()); }
  bool needs(int64_t tile, int64_t point) const { return tile < (point < size.shared ? tiles() : whole); }
  int64_t first_read() const { return axis.src_offset + size.first_tap * axis.tap_step; }  // by the tile at position 0

 private:
  // Its twin in Python is problem.py's short_phases.
  static TileForm form_of(const Axis& a, int64_t tile) {
    const int64_t rate = a.tap_step;
    const bool none_before = a.src_offset + std::min(rate, a.n_out) <= 0;
    const bool none_behind = std::max<int64_t>(a.n_out - rate, 0) + a.src_offset + 2 * rate >= a.n_src;
    return a.n_out <= 2 * rate && none_before && none_behind ? phase2 : static_cast<TileForm>(f2 + tile - 2);
  }
};

// Transformed weights of one group: [point][panel][source channel][column].
struct Layout {
  WeightLayout taps;  // of the untransformed weights
  int64_t depth, columns, point_step;

  Layout(const Correlation& job)
      : taps(WeightLayout::make<float>(job.dst_channels, job.src_channels, 9)),
        depth(round_up(job.src_channels, winograd_kernels().lanes)),
        columns(taps.panels.empty() ? 0 : taps.panels.back().first + taps.panels.back().width),
        point_step(depth * columns + winograd_kernels().lanes) {}  // as in Points
};

// A tensor of which tiles of rows x columns pixels are brought into the transformed domain, a row of tiles at a time.
struct Reader {
  ConstTensor tensor;        // of the group
  int64_t channels, padded;  // as they are, and in whole vectors
  int64_t height, width;
  int64_t rows, columns;
  int64_t top, left;         // first pixel of the tile that starts at position 0
  void (*transform)(const float* const* pixels, int64_t vectors, float* points, int64_t point_step);

  bool in_place() const { return tensor.strides.c == 1 && channels == padded; }
};

// Rows of values in the transformed domain, [point][tile][channel]. One vector more per tile and per point: a power of two
// apart, they would compete for the same few cache sets.
struct Points {
  int64_t channels, tile_step, point_step;

  Points(int64_t tiles, int64_t padded_channels)
      : channels(padded_channels),
        tile_step(padded_channels + winograd_kernels().lanes),
        point_step(tiles * tile_step + winograd_kernels().lanes) {}
  size_t bytes(int64_t points) const { return static_cast<size_t>(points * point_step) * sizeof(float); }
};

// What forward pass, input gradient and weight gradient share: the tiles, cut into blocks of whole rows of tiles.
class Winograd {
 protected:
  // weight_passes: how often a block moves the weights of src_channels x dst_channels.
  Winograd(const Axis& h, const Axis& w, int64_t batch, int64_t tile, int64_t src_channels, int64_t dst_channels,
           int64_t weight_passes, double flops)
      : h_(h, tile),
        w_(w, tile),
        points_(h_.size.points * w_.size.points),
        lanes_(winograd_kernels().lanes),
        transforms_(winograd_kernels().by[h_.form][w_.form]),
        tiles_per_row_(w_.tiles()),
        total_rows_(batch * h_.tiles()),
        threads_(threads_for(flops)) {
    const int64_t point_bytes = points_ * static_cast<int64_t>(sizeof(float));
    const int64_t bytes = total_rows_ * tiles_per_row_ * (src_channels + dst_channels) * point_bytes;
    const int64_t weight_bytes = weight_passes * src_channels * dst_channels * point_bytes;
    const int64_t block = std::clamp(weight_bytes, block_bytes, most_block_bytes);
    const int64_t blocks = std::clamp<int64_t>(ceil_div(bytes, block), 1, std::max<int64_t>(total_rows_, 1));
    rows_per_block_ = ceil_div(total_rows_, blocks);
    zeros_.resize(static_cast<size_t>(src_channels + dst_channels));
  }

  Reader source_reader(ConstTensor tensor, int64_t channels) const {
    return {tensor,         channels,      round_up(channels, lanes_), h_.axis.n_src,   w_.axis.n_src,
            h_.size.read,   w_.size.read,  h_.first_read(),            w_.first_read(), transforms_.input};
  }

  // body(first row of tiles, rows) per block.
  template <class Body> void for_blocks(const Body& body) {
    for (first_row_ = 0; first_row_ < total_rows_; first_row_ += rows_per_block_)
      body(std::min(rows_per_block_, total_rows_ - first_row_));
  }

  // body(row of tiles, first channel, channels, stage): all channels at once in place, else a piece through a stage.
  template <class Body> void for_pieces(int64_t rows, int64_t channels, bool in_place, const Body& body) const {
    const int64_t piece = in_place ? channels : std::min(staged_channels, channels);
    const int64_t pieces = ceil_div(channels, piece);
    const int64_t pixels = in_place ? 0 : max_tile_side * std::max(w_.axis.n_src, w_.axis.n_out);
    parallel(rows * pieces, threads_, [&](int64_t begin, int64_t end) {
      Scratch stage(static_cast<size_t>(pixels * piece) * sizeof(float));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % pieces * piece;
        body(task / pieces, first, std::min(piece, channels - first), stage.as<float>());
      }
    });
  }

  int64_t image_of(int64_t row) const { return (first_row_ + row) / h_.tiles(); }
  int64_t tile_of(int64_t row) const { return (first_row_ + row) % h_.tiles(); }
  int64_t start_of(int64_t row) const { return h_.starts[tile_of(row)]; }

  // The block's tiles of a tensor, transformed.
  void read(const Reader& from, int64_t rows, const Points& points, float* to) const {
    for_pieces(rows, from.padded, from.in_place(), [&](int64_t row, int64_t first, int64_t channels, float* stage) {
      read_row(from, row, first, channels, stage, points, to + row * tiles_per_row_ * points.tile_step + first);
    });
  }

  void read_row(const Reader& from, int64_t row, int64_t first, int64_t channels, float* stage, const Points& points,
                float* to) const {
    const Strides& s = from.tensor.strides;
    const float* image = static_cast<const float*>(from.tensor.data) + image_of(row) * s.n + first * s.c;
    const int64_t pixel_step = from.in_place() ? s.w : channels;
    std::array<const float*, max_tile_side> lines;
    for (int64_t i = 0; i < from.rows; ++i) {
      const int64_t y = start_of(row) + i * h_.axis.tap_step + from.top;
      const bool inside = y >= 0 && y < from.height;
      lines[i] = inside ? image + y * s.h : nullptr;
      if (from.in_place() || !inside) continue;
      float* line = stage + i * from.width * channels;
      const int64_t real = std::min(channels, from.channels - first);
      copy_matrix(from.width, real, lines[i], s.w, s.c, line, channels, 1);
      if (real < channels)
        for (int64_t x = 0; x < from.width; ++x) std::fill(line + x * channels + real, line + (x + 1) * channels, 0.0f);
      lines[i] = line;
    }
    std::array<const float*, max_pixels> pixels;
    for (const int64_t start : w_.starts) {
      for (int64_t j = 0; j < from.columns; ++j) {
        const int64_t x = start + j * w_.axis.tap_step + from.left;
        const bool inside = x >= 0 && x < from.width;
        for (int64_t i = 0; i < from.rows; ++i)
          pixels[i * from.columns + j] = inside && lines[i] != nullptr ? lines[i] + x * pixel_step : zeros_.data();
      }
      from.transform(pixels.data(), channels / lanes_, to, points.point_step);
      to += points.tile_step;
    }
  }

  const Tiling h_, w_;
  const int64_t points_, lanes_;
  const WinogradTransforms transforms_;
  const int64_t tiles_per_row_, total_rows_, threads_;
  int64_t rows_per_block_ = 0, first_row_ = 0;
  std::vector<float> zeros_;
};

class WinogradCorrelation : Winograd {
 public:
  WinogradCorrelation(const Correlation& job, int64_t tile)
      : Winograd(job.h, job.w, job.batch, tile, Layout(job).depth, Layout(job).columns, 1, job.flops()),
        job_(job),
        layout_(job),
        write_in_place_(job.dst.strides.c == 1 && job.dst_channels % lanes_ == 0) {}

  void run(const float* transformed) {
    const int64_t tiles = rows_per_block_ * tiles_per_row_;
    const Points source_points(tiles, layout_.depth), sums_points(tiles, layout_.columns);
    Scratch source(source_points.bytes(points_)), sums(sums_points.bytes(points_));
    std::vector<float> bias(static_cast<size_t>(layout_.columns)), scale(bias), shift(bias);
    Reader from = source_reader(job_.src, job_.src_channels);
    for (int64_t group = 0; group < job_.groups; ++group) {
      from.tensor.data = static_cast<const float*>(job_.src.data) + group * job_.src_channels * job_.src.strides.c;
      float* dst = static_cast<float*>(job_.dst.data) + group * job_.dst_channels * job_.dst.strides.c;
      if (job_.bias != nullptr)
        std::copy_n(static_cast<const float*>(job_.bias) + group * job_.dst_channels, job_.dst_channels, bias.data());
      if (job_.finish.scale != nullptr) {
        std::copy_n(static_cast<const float*>(job_.finish.scale) + group * job_.dst_channels, job_.dst_channels, scale.data());
        std::copy_n(static_cast<const float*>(job_.finish.shift) + group * job_.dst_channels, job_.dst_channels, shift.data());
      }
      for_blocks([&](int64_t rows) {
        read(from, rows, source_points, source.as<float>());
        multiply(rows, source_points, source.as<float>(),
                 transformed + group * points_ * layout_.point_step, sums_points, sums.as<float>());
        for_pieces(rows, layout_.columns, write_in_place_, [&](int64_t row, int64_t first, int64_t channels, float* stage) {
          Finish finish = job_.finish;
          if (finish.scale != nullptr) finish.scale = scale.data() + first, finish.shift = shift.data() + first;
          write_row(row, first, channels, stage, sums_points, sums.as<float>(), bias.data() + first, finish,
                    dst + first * job_.dst.strides.c);
        });
      });
    }
  }

 private:
  // The block's tiles that need a point, or do not.
  std::vector<int64_t> tiles_by_need(int64_t rows, int64_t point, bool needed) const {
    std::vector<int64_t> found;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < tiles_per_row_; ++column) {
        const bool needs = h_.needs(tile_of(row), point / w_.size.points) && w_.needs(column, point % w_.size.points);
        if (needs == needed) found.push_back(row * tiles_per_row_ + column);
      }
    return found;
  }

  void multiply(int64_t rows, const Points& source_points, const float* source, const float* transformed,
                const Points& sums_points, float* sums) const {
    const int64_t panels = static_cast<int64_t>(layout_.taps.panels.size());
    std::vector<std::vector<int64_t>> tiles, others;
    std::vector<int64_t> cost;
    for (int64_t point = 0; point < points_; ++point) {
      tiles.push_back(tiles_by_need(rows, point, true));
      others.push_back(tiles_by_need(rows, point, false));
      for (const Panel& panel : layout_.taps.panels)
        cost.push_back(static_cast<int64_t>(tiles.back().size() + 1) * panel.vectors);
    }
    parallel_by_cost(cost, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / panels;
        const Panel& panel = layout_.taps.panels[task % panels];
        float* to = sums + point * sums_points.point_step + panel.first;
        for (const int64_t tile : others[point]) std::fill_n(to + tile * sums_points.tile_step, panel.width, 0.0f);
        multiply_point(tiles[point], panel, source + point * source_points.point_step, source_points.tile_step,
                       transformed + point * layout_.point_step + layout_.depth * panel.first, to, sums_points.tile_step);
      }
    });
  }

  void multiply_point(const std::vector<int64_t>& tiles, const Panel& panel, const float* source, int64_t source_step,
                      const float* weight, float* sums, int64_t sums_step) const {
    const MatmulKernels& mm = matmul_kernels<float>();
    constexpr int64_t depth_piece = 512;  // of a panel of weights that stays in a second-level cache
    const int64_t zero = 0, count = static_cast<int64_t>(tiles.size()), tall = mm.rows_of[panel.vectors];
    const char* a[max_rows];
    void* c[max_rows];
    for (int64_t k = 0; k < layout_.depth; k += depth_piece) {
      const void* b = weight + k * panel.width;
      const int64_t depth = std::min(depth_piece, layout_.depth - k);
      const MatmulTile product{1, depth, &zero, &b, a, c, k == 0 ? zeros_.data() : nullptr, panel.width, {}};
      for (int64_t first = 0; first < count; first += tall) {
        const int64_t rows = std::min(tall, count - first);
        for (int64_t i = 0; i < rows; ++i) {
          a[i] = reinterpret_cast<const char*>(source + tiles[first + i] * source_step + k);
          c[i] = sums + tiles[first + i] * sums_step;
        }
        mm.kernel[panel.vectors][rows](product);
      }
    }
  }

  void write_row(int64_t row, int64_t first, int64_t channels, float* stage, const Points& points, float* sums,
                 const float* bias, const Finish& finish, float* dst) const {
    const Strides& d = job_.dst.strides;
    float* image = dst + image_of(row) * d.n;
    const int64_t pixel_step = write_in_place_ ? d.w : channels;
    const int64_t rate = h_.axis.tap_step, width = w_.axis.n_out;
    std::array<float*, max_tile_side> lines;
    for (int64_t i = 0; i < h_.size.written; ++i) {
      const int64_t y = start_of(row) + i * rate;
      lines[i] = y >= h_.axis.n_out ? nullptr : write_in_place_ ? image + y * d.h : stage + i * width * channels;
    }
    std::array<float*, max_pixels> pixels;
    float* from = sums + row * tiles_per_row_ * points.tile_step + first;
    for (const int64_t start : w_.starts) {
      // Of a tile that reaches beyond the image, the pixels outside go where its first sums were, which are read by then.
      for (int64_t j = 0; j < w_.size.written; ++j) {
        const int64_t x = start + j * w_.axis.tap_step;
        for (int64_t i = 0; i < h_.size.written; ++i)
          pixels[i * w_.size.written + j] = lines[i] != nullptr && x < width ? lines[i] + x * pixel_step : from;
      }
      transforms_.output(from, points.point_step, channels / lanes_, bias, finish, pixels.data());
      from += points.tile_step;
    }
    if (write_in_place_) return;
    const int64_t real = std::min(channels, job_.dst_channels - first);
    for (int64_t i = 0; i < h_.size.written; ++i)
      if (lines[i] != nullptr)
        copy_matrix(width, real, lines[i], channels, 1, image + (start_of(row) + i * rate) * d.h, d.w, d.c);
  }

  const Correlation& job_;
  const Layout layout_;
  const bool write_in_place_;
};

// The transpose of the forward algorithm in its weight: per point a product over tiles of the transformed input and the
// output gradient, which takes the output transform's transpose; then the weight transform's transpose.
class WinogradWeightGradient : Winograd {
 public:
  WinogradWeightGradient(const Conv2dShape& s, int64_t tile, ConstTensor input, ConstTensor grad_output,
                         MutableTensor grad_weight)
      : Winograd(forward_axis(s.in_h, s.out_h, 3, 1, s.padding_h, s.dilation_h),
                 forward_axis(s.in_w, s.out_w, 3, 1, s.padding_w, s.dilation_w), s.batch, tile,
                 round_up(s.in_channels / s.groups, winograd_kernels().lanes),
                 round_up(s.out_channels / s.groups, winograd_kernels().lanes), 2,
                 18.0 * static_cast<double>(s.batch * s.out_h * s.out_w * s.out_channels) *
                     static_cast<double>(s.in_channels / s.groups)),
        groups_(s.groups),
        input_(source_reader(input, s.in_channels / s.groups)),
        grad_output_{grad_output, s.out_channels / s.groups, round_up(s.out_channels / s.groups, lanes_), s.out_h, s.out_w,
                     h_.size.written, w_.size.written, 0, 0, transforms_.gradient},
        grad_weight_(grad_weight) {}

  void run() {
    const OuterKernels& outer = outer_kernels<float>();
    const int64_t tiles = rows_per_block_ * tiles_per_row_;
    const Points input_points(tiles, input_.padded), grad_points(tiles, grad_output_.padded);
    const int64_t rows = round_up(input_.channels, outer.rows);
    const Points weight_points(rows, grad_output_.padded);
    // The last rows of a product reach past the channels that exist, into the vector between tiles; nobody reads their sums.
    Scratch input(input_points.bytes(points_)), grad(grad_points.bytes(points_)), weight(weight_points.bytes(points_));
    for (int64_t group = 0; group < groups_; ++group) {
      std::memset(weight.as<float>(), 0, weight_points.bytes(points_));
      for_blocks([&](int64_t tile_rows) {
        read(input_, tile_rows, input_points, input.as<float>());
        read(grad_output_, tile_rows, grad_points, grad.as<float>());
        multiply(tile_rows, input_points, input.as<float>(), grad_points, grad.as<float>(), weight_points, weight.as<float>());
      });
      write(group, weight_points, weight.as<float>());
      input_.tensor.data = static_cast<const float*>(input_.tensor.data) + input_.channels * input_.tensor.strides.c;
      grad_output_.tensor.data =
          static_cast<const float*>(grad_output_.tensor.data) + grad_output_.channels * grad_output_.tensor.strides.c;
    }
  }

 private:
  // Runs [first, last) of the block's rows of tiles that need a point: all, or per image the leading ones.
  std::vector<std::pair<int64_t, int64_t>> row_runs(int64_t rows, int64_t point) const {
    if (point < h_.size.shared || h_.whole == h_.tiles()) return {{0, rows}};
    std::vector<std::pair<int64_t, int64_t>> runs;
    for (int64_t row = 0; row < rows; row += h_.tiles() - tile_of(row)) {
      const int64_t last = std::min(row + h_.whole - tile_of(row), rows);
      if (last > row) runs.emplace_back(row, last);
    }
    return runs;
  }

  void multiply(int64_t rows, const Points& input_points, const float* input, const Points& grad_points, const float* grad,
                const Points& weight_points, float* weight) const {
    const OuterKernels& outer = outer_kernels<float>();
    const int64_t widest = outer.vectors * lanes_;
    const int64_t strip = 16 * outer.rows;  // channels whose tiles stay in a second-level cache while all columns meet them
    const int64_t strips = ceil_div(input_.channels, strip);
    const int64_t input_row = tiles_per_row_ * input_points.tile_step, grad_row = tiles_per_row_ * grad_points.tile_step;
    std::vector<std::vector<std::pair<int64_t, int64_t>>> runs;
    std::vector<int64_t> cost, columns;
    for (int64_t point = 0; point < points_; ++point) {
      runs.push_back(row_runs(rows, point / w_.size.points));
      columns.push_back(point % w_.size.points < w_.size.shared ? tiles_per_row_ : w_.whole);
      int64_t tiles = 1;
      for (const auto& [first, last] : runs.back()) tiles += (last - first) * columns.back();
      cost.insert(cost.end(), strips, tiles);
    }
    parallel_by_cost(cost, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / strips, begin_channel = task % strips * strip;
        const int64_t end_channel = std::min(begin_channel + strip, input_.channels);
        const float* a = input + point * input_points.point_step;
        const float* b = grad + point * grad_points.point_step;
        float* c = weight + point * weight_points.point_step;
        for (int64_t column = 0; column < grad_output_.padded; column += widest) {
          const int64_t vectors = std::min(widest, grad_output_.padded - column) / lanes_;
          for (int64_t channel = begin_channel; channel < end_channel; channel += outer.rows)
            for (const auto& [first, last] : runs[point])
              outer.kernel[vectors]({last - first, columns[point], a + first * input_row + channel,
                                     b + first * grad_row + column, input_row, input_points.tile_step, grad_row,
                                     grad_points.tile_step, c + channel * weight_points.tile_step + column,
                                     weight_points.tile_step});
        }
      }
    });
  }

  void write(int64_t group, const Points& points, const float* weight) const {
    constexpr int64_t strip = 16;  // channels at a time
    const int64_t columns = grad_output_.padded;
    const Strides& d = grad_weight_.strides;
    float* to = static_cast<float*>(grad_weight_.data) + group * grad_output_.channels * d.n;
    parallel(ceil_div(input_.channels, strip), threads_, [&](int64_t begin, int64_t end) {
      Scratch scratch(static_cast<size_t>(strip * 9 * columns) * sizeof(float));
      float* taps = scratch.as<float>();  // [channel][tap][column]
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * strip, count = std::min(strip, input_.channels - first);
        for (int64_t i = 0; i < count; ++i)
          transforms_.weight_gradient(weight + (first + i) * points.tile_step, points.point_step, columns / lanes_,
                                      taps + i * 9 * columns, columns);
        if (d.w == 1 && d.h == 3 && d.c == 9) {
          copy_matrix(grad_output_.channels, count * 9, taps, 1, columns, to + first * d.c, d.n, 1);
          continue;
        }
        for (int64_t tap = 0; tap < 9; ++tap)
          copy_matrix(grad_output_.channels, count, taps + tap * columns, 1, 9 * columns,
                      to + first * d.c + tap / 3 * d.h + tap % 3 * d.w, d.n, d.c);
      }
    });
  }

  const int64_t groups_;
  Reader input_, grad_output_;
  const MutableTensor grad_weight_;
};

}  // namespace

int64_t winograd_weight_elements(const Correlation& job, int64_t tile) {
  return job.groups * Tiling(job.h, tile).size.points * Tiling(job.w, tile).size.points * Layout(job).point_step;
}

void winograd_weight(const Correlation& job, int64_t tile, float* transformed) {
  const Layout layout(job);
  const Tiling h(job.h, tile), w(job.w, tile);
  const WinogradTransforms& transforms = winograd_kernels().by[h.form][w.form];
  const int64_t points = h.size.points * w.size.points, lanes = winograd_kernels().lanes;
  const int64_t panels = static_cast<int64_t>(layout.taps.panels.size());
  const int64_t threads = threads_for(static_cast<double>(points * layout.point_step));
  Scratch scratch(static_cast<size_t>(layout.taps.elements) * sizeof(float));
  float* packed = scratch.as<float>();
  for (int64_t group = 0; group < job.groups; ++group, transformed += points * layout.point_step) {
    pack_weight<float, float>(job, layout.taps, static_cast<const float*>(job.weight) + group * job.weight_group, packed,
                              threads);
    parallel(panels * layout.depth, threads, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Panel& panel = layout.taps.panels[task / layout.depth];
        const int64_t channel = task % layout.depth;
        float* to = transformed + layout.depth * panel.first + channel * panel.width;
        if (channel >= job.src_channels) {
          for (int64_t point = 0; point < points; ++point) std::fill_n(to + point * layout.point_step, panel.width, 0.0f);
          continue;
        }
        const Chunk& chunk = layout.taps.chunks[channel / layout.taps.chunks[0].channels];
        const int64_t at = layout.taps.offset(panel, chunk, 9, 0) + (channel - chunk.first) * panel.width;
        transforms.weight(packed + at, chunk.padded * panel.width, panel.width / lanes, to, layout.point_step);
      }
    });
  }
}

void winograd_correlate(const Correlation& job, int64_t tile, const float* transformed) {
  if (transformed != nullptr) return WinogradCorrelation(job, tile).run(transformed);
  Scratch scratch(static_cast<size_t>(winograd_weight_elements(job, tile)) * sizeof(float));
  winograd_weight(job, tile, scratch.as<float>());
  WinogradCorrelation(job, tile).run(scratch.as<float>());
}

void winograd_weight_gradient(const Conv2dShape& shape, int64_t tile, ConstTensor input, ConstTensor grad_output,
                              MutableTensor grad_weight) {
  WinogradWeightGradient(shape, tile, input, grad_output, grad_weight).run();
}

}  // namespace atrous::cpu
