// Winograd's convolution on phase grids.
//
// With rate r, written pixels whose positions are equal modulo r form a grid (a phase) on which the convolution has rate 1,
// so a tile of F(m x m, 3 x 3) takes its (m + 2)^2 source pixels r apart, where they lie: nothing is rearranged. Per block
// of tiles: transform the source, one matrix product per point (tiles x source channels x written channels), transform
// back. Where the rate is so large that a phase has one or two pixels, three products do for them (TileForm::phase2), and
// tiles that reach beyond the image leave out the points that only their missing pixels need.
#include "winograd.h"

#include "pack_weight.h"
#include "statistics.h"
#include "winograd_tiles.h"

namespace atrous::cpu {
namespace {

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

class WinogradCorrelation : Winograd {
 public:
  WinogradCorrelation(const Correlation& job, int64_t tile)
      : Winograd(job.h, job.w, job.batch, tile, Layout(job).depth + Layout(job).columns,
                 Layout(job).depth * Layout(job).columns, job.flops()),
        job_(job),
        layout_(job),
        write_in_place_(job.dst.strides.c == 1 && job.dst_channels % lanes_ == 0),
        statistics_(job.groups * job.dst_channels) {}

  void run(const float* transformed) {
    const int64_t tiles = rows_per_block_ * tiles_per_row_;
    const Points source_points(tiles, layout_.depth), sums_points(tiles, layout_.columns);
    Scratch source(source_points.bytes(points_)), sums(sums_points.bytes(points_));
    std::vector<float> bias(static_cast<size_t>(layout_.columns)), scale(bias), shift(bias);
    Reader from = source_reader(job_.src, job_.src_channels);
    count_parts();
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
                    dst + first * job_.dst.strides.c, group * job_.dst_channels + first);
        });
      });
    }
    if (job_.statistics.mean != nullptr)
      statistics_.merge(static_cast<float*>(job_.statistics.mean), static_cast<float*>(job_.statistics.moment));
  }

 private:
  // A part of the statistics is a line of pixels, as many to a row of tiles as a tile has.
  void count_parts() {
    if (job_.statistics.mean == nullptr) return;
    for (int64_t row = 0; row < total_rows_; ++row)
      for (int64_t i = 0; i < h_.size.written; ++i)
        statistics_.add(start_of(row) + i * h_.axis.tap_step < h_.axis.n_out ? w_.axis.n_out : 0);
    statistics_.room();
  }

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
                 const float* bias, const Finish& finish, float* dst, int64_t channel) {
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
    const int64_t real = std::min(channels, job_.dst_channels - first);
    std::vector<int64_t> at;
    if (job_.statistics.mean != nullptr)
      for (int64_t x = 0; x < width; ++x) at.push_back(x * pixel_step);
    for (int64_t i = 0; i < h_.size.written; ++i) {
      if (lines[i] == nullptr) continue;
      if (!write_in_place_)
        copy_matrix(width, real, lines[i], channels, 1, image + (start_of(row) + i * rate) * d.h, d.w, d.c);
      if (!at.empty()) statistics_.take((first_row_ + row) * h_.size.written + i, channel, real, lines[i], at.data());
    }
  }

  const Correlation& job_;
  const Layout layout_;
  const bool write_in_place_;
  PartialStatistics<float> statistics_;
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

}  // namespace atrous::cpu
