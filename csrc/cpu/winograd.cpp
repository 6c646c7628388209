// Winograd's convolution on phase grids.
//
// With rate r, written pixels whose positions are equal modulo r form a grid (a phase) on which the convolution has rate 1,
// so a tile of F(m x m, 3 x 3) takes its (m + 2)^2 source pixels r apart, where they lie: nothing is rearranged. Per block
// of tiles: transform the source, one matrix product per point (tiles x source channels x written channels), transform
// back.
#include "winograd.h"

#include <array>

#include "pack_weight.h"
#include "typed.h"
#include "winograd_kernels.h"

namespace atrous::cpu {
namespace {

// Transformed source and sums of one block of tiles: small enough to stay in a shared cache.
constexpr int64_t block_bytes = 16 << 20;
constexpr int64_t staged_channels = 64;
constexpr int64_t max_points = (max_winograd_tile + 2) * (max_winograd_tile + 2);

const WinogradKernels& winograd_kernels() { return table<WinogradKernels>(); }

int64_t round_up(int64_t size, int64_t step) { return ceil_div(size, step) * step; }

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

// First written positions of the tiles of one axis, from top to bottom.
std::vector<int64_t> tile_starts(const Axis& axis, int64_t tile) {
  std::vector<int64_t> starts;
  for (int64_t phase = 0; phase < std::min(axis.tap_step, axis.n_out); ++phase)
    for (int64_t first = phase; first < axis.n_out; first += tile * axis.tap_step) starts.push_back(first);
  std::sort(starts.begin(), starts.end());
  return starts;
}

// A tensor of which tiles of side x side pixels are brought into the transformed domain, a row of tiles at a time.
struct Reader {
  ConstTensor tensor;        // of the group
  int64_t channels, padded;  // as they are, and in whole vectors
  int64_t height, width;
  int64_t side, top, left;   // first pixel of the tile that starts at position 0
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
  Winograd(const Axis& h, const Axis& w, int64_t batch, int64_t tile, int64_t channels, double flops)
      : h_(h),
        w_(w),
        tile_(tile),
        side_(tile + 2),
        points_(side_ * side_),
        lanes_(winograd_kernels().lanes),
        transforms_(winograd_kernels().tile[tile]),
        rows_(tile_starts(h, tile)),
        columns_(tile_starts(w, tile)),
        tiles_per_row_(static_cast<int64_t>(columns_.size())),
        total_rows_(batch * static_cast<int64_t>(rows_.size())),
        threads_(threads_for(flops)) {
    const int64_t bytes = total_rows_ * points_ * tiles_per_row_ * channels * static_cast<int64_t>(sizeof(float));
    const int64_t blocks = std::clamp<int64_t>(ceil_div(bytes, block_bytes), 1, std::max<int64_t>(total_rows_, 1));
    rows_per_block_ = ceil_div(total_rows_, blocks);
    zeros_.resize(static_cast<size_t>(channels));
  }

  // The source pixels of a tile: two more than it writes, in each direction.
  Reader source_reader(ConstTensor tensor, int64_t channels) const {
    return {tensor, channels, round_up(channels, lanes_), h_.n_src, w_.n_src, side_, h_.src_offset, w_.src_offset,
            transforms_.input};
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
    const int64_t pixels = in_place ? 0 : side_ * std::max(w_.n_src, w_.n_out);
    parallel(rows * pieces, threads_, [&](int64_t begin, int64_t end) {
      Scratch stage(static_cast<size_t>(pixels * piece) * sizeof(float));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % pieces * piece;
        body(task / pieces, first, std::min(piece, channels - first), stage.as<float>());
      }
    });
  }

  int64_t image_of(int64_t row) const { return (first_row_ + row) / static_cast<int64_t>(rows_.size()); }
  int64_t start_of(int64_t row) const { return rows_[(first_row_ + row) % rows_.size()]; }

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
    std::array<const float*, max_winograd_tile + 2> lines;
    for (int64_t i = 0; i < from.side; ++i) {
      const int64_t y = start_of(row) + i * h_.tap_step + from.top;
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
    std::array<const float*, max_points> pixels;
    for (const int64_t start : columns_) {
      for (int64_t j = 0; j < from.side; ++j) {
        const int64_t x = start + j * w_.tap_step + from.left;
        const bool inside = x >= 0 && x < from.width;
        for (int64_t i = 0; i < from.side; ++i)
          pixels[i * from.side + j] = inside && lines[i] != nullptr ? lines[i] + x * pixel_step : zeros_.data();
      }
      from.transform(pixels.data(), channels / lanes_, to, points.point_step);
      to += points.tile_step;
    }
  }

  const Axis h_, w_;
  const int64_t tile_, side_, points_, lanes_;
  const WinogradTransforms transforms_;
  const std::vector<int64_t> rows_, columns_;
  const int64_t tiles_per_row_, total_rows_, threads_;
  int64_t rows_per_block_ = 0, first_row_ = 0;
  std::vector<float> zeros_;
};

class WinogradCorrelation : Winograd {
 public:
  WinogradCorrelation(const Correlation& job, int64_t tile)
      : Winograd(job.h, job.w, job.batch, tile, Layout(job).depth + Layout(job).columns, job.flops()),
        job_(job),
        layout_(job),
        write_in_place_(job.dst.strides.c == 1 && job.dst_channels % lanes_ == 0) {}

  void run(const float* transformed) {
    const int64_t tiles = rows_per_block_ * tiles_per_row_;
    const Points source_points(tiles, layout_.depth), sums_points(tiles, layout_.columns);
    Scratch source(source_points.bytes(points_)), sums(sums_points.bytes(points_));
    std::vector<float> bias(static_cast<size_t>(layout_.columns));
    Reader from = source_reader(job_.src, job_.src_channels);
    for (int64_t group = 0; group < job_.groups; ++group) {
      from.tensor.data = static_cast<const float*>(job_.src.data) + group * job_.src_channels * job_.src.strides.c;
      float* dst = static_cast<float*>(job_.dst.data) + group * job_.dst_channels * job_.dst.strides.c;
      if (job_.bias != nullptr)
        std::copy_n(static_cast<const float*>(job_.bias) + group * job_.dst_channels, job_.dst_channels, bias.data());
      for_blocks([&](int64_t rows) {
        read(from, rows, source_points, source.as<float>());
        multiply(rows * tiles_per_row_, source_points, source.as<float>(),
                 transformed + group * points_ * layout_.point_step, sums_points, sums.as<float>());
        for_pieces(rows, layout_.columns, write_in_place_, [&](int64_t row, int64_t first, int64_t channels, float* stage) {
          write_row(row, first, channels, stage, sums_points, sums.as<float>(), bias.data() + first, dst + first * job_.dst.strides.c);
        });
      });
    }
  }

 private:
  void multiply(int64_t tiles, const Points& source_points, const float* source, const float* transformed,
                const Points& sums_points, float* sums) const {
    const MatmulKernels& mm = matmul_kernels<float>();
    const int64_t panels = static_cast<int64_t>(layout_.taps.panels.size());
    constexpr int64_t depth_piece = 512;  // of a panel of weights that stays in a second-level cache
    const int64_t zero = 0;
    parallel(points_ * panels, threads_, [&](int64_t begin, int64_t end) {
      const char* a[max_rows];
      void* c[max_rows];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / panels;
        const Panel& panel = layout_.taps.panels[task % panels];
        const float* weight = transformed + point * layout_.point_step + layout_.depth * panel.first;
        const float* from = source + point * source_points.point_step;
        float* to = sums + point * sums_points.point_step + panel.first;
        const int64_t tall = mm.rows_of[panel.vectors];
        for (int64_t k = 0; k < layout_.depth; k += depth_piece) {
          const void* b = weight + k * panel.width;
          const int64_t depth = std::min(depth_piece, layout_.depth - k);
          const MatmulTile product{1, depth, &zero, &b, a, c, k == 0 ? zeros_.data() : nullptr, panel.width};
          for (int64_t first = 0; first < tiles; first += tall) {
            const int64_t count = std::min(tall, tiles - first);
            for (int64_t i = 0; i < count; ++i) {
              a[i] = reinterpret_cast<const char*>(from + (first + i) * source_points.tile_step + k);
              c[i] = to + (first + i) * sums_points.tile_step;
            }
            mm.kernel[panel.vectors][count](product);
          }
        }
      }
    });
  }

  void write_row(int64_t row, int64_t first, int64_t channels, float* stage, const Points& points, float* sums,
                 const float* bias, float* dst) const {
    const Strides& d = job_.dst.strides;
    float* image = dst + image_of(row) * d.n;
    const int64_t pixel_step = write_in_place_ ? d.w : channels;
    std::array<float*, max_winograd_tile> lines;
    for (int64_t i = 0; i < tile_; ++i) {
      const int64_t y = start_of(row) + i * h_.tap_step;
      lines[i] = y >= h_.n_out ? nullptr : write_in_place_ ? image + y * d.h : stage + i * w_.n_out * channels;
    }
    std::array<float*, max_points> pixels;
    float* from = sums + row * tiles_per_row_ * points.tile_step + first;
    for (const int64_t start : columns_) {
      // Of a tile that reaches beyond the image, the pixels outside go where its first sums were, which are read by then.
      for (int64_t j = 0; j < tile_; ++j) {
        const int64_t x = start + j * w_.tap_step;
        for (int64_t i = 0; i < tile_; ++i)
          pixels[i * tile_ + j] = lines[i] != nullptr && x < w_.n_out ? lines[i] + x * pixel_step : from;
      }
      transforms_.output(from, points.point_step, channels / lanes_, bias, pixels.data());
      from += points.tile_step;
    }
    if (write_in_place_) return;
    const int64_t real = std::min(channels, job_.dst_channels - first);
    for (int64_t i = 0; i < tile_; ++i)
      if (lines[i] != nullptr)
        copy_matrix(w_.n_out, real, lines[i], channels, 1, image + (start_of(row) + i * h_.tap_step) * d.h, d.w, d.c);
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
                 round_up(s.in_channels / s.groups, winograd_kernels().lanes) +
                     round_up(s.out_channels / s.groups, winograd_kernels().lanes),
                 18.0 * static_cast<double>(s.batch * s.out_h * s.out_w * s.out_channels) *
                     static_cast<double>(s.in_channels / s.groups)),
        groups_(s.groups),
        input_(source_reader(input, s.in_channels / s.groups)),
        grad_output_{grad_output, s.out_channels / s.groups, round_up(s.out_channels / s.groups, lanes_), s.out_h, s.out_w,
                     tile, 0, 0, transforms_.gradient},
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
        multiply(tile_rows * tiles_per_row_, input_points, input.as<float>(), grad_points, grad.as<float>(), weight_points,
                 weight.as<float>());
      });
      write(group, weight_points, weight.as<float>());
      input_.tensor.data = static_cast<const float*>(input_.tensor.data) + input_.channels * input_.tensor.strides.c;
      grad_output_.tensor.data =
          static_cast<const float*>(grad_output_.tensor.data) + grad_output_.channels * grad_output_.tensor.strides.c;
    }
  }

 private:
  void multiply(int64_t tiles, const Points& input_points, const float* input, const Points& grad_points, const float* grad,
                const Points& weight_points, float* weight) const {
    const OuterKernels& outer = outer_kernels<float>();
    const int64_t widest = outer.vectors * lanes_;
    const int64_t panels = ceil_div(grad_output_.padded, widest);
    parallel(points_ * panels, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / panels, column = task % panels * widest;
        const int64_t vectors = std::min(widest, grad_output_.padded - column) / lanes_;
        for (int64_t row = 0; row < input_.channels; row += outer.rows)
          outer.kernel[vectors]({1, tiles, input + point * input_points.point_step + row,
                                 grad + point * grad_points.point_step + column, 0, input_points.tile_step, 0,
                                 grad_points.tile_step, weight + point * weight_points.point_step + row * weight_points.tile_step + column,
                                 weight_points.tile_step});
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
  return job.groups * (tile + 2) * (tile + 2) * Layout(job).point_step;
}

void winograd_weight(const Correlation& job, int64_t tile, float* transformed) {
  const Layout layout(job);
  const WinogradTransforms& transforms = winograd_kernels().tile[tile];
  const int64_t points = (tile + 2) * (tile + 2), lanes = winograd_kernels().lanes;
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
