// Tiles of Winograd's convolution on phase grids (winograd.cpp), and how a tensor's are brought into the transformed domain.
#pragma once

#include <array>

#include "correlate.h"
#include "typed.h"
#include "winograd.h"
#include "winograd_kernels.h"

namespace atrous::cpu {

// Transformed source and sums of one block of tiles stay in the caches of their cores (a shared one may be busy with others),
// unless the weights, which every block reads anew, are larger than that.
constexpr int64_t block_bytes = 2 << 20, most_block_bytes = 64 << 20;
constexpr int64_t staged_channels = 64;
constexpr int64_t cache_alias = 2048;  // bytes
constexpr int64_t max_pixels = max_tile_side * max_tile_side;

inline const WinogradKernels& winograd_kernels() { return table<WinogradKernels>(); }

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

// A tensor of which tiles of rows x columns pixels are brought into the transformed domain, a row of tiles at a time.
struct Reader {
  ConstTensor tensor;        // of the group
  int64_t channels, padded;  // as they are, and in whole vectors
  int64_t height, width;
  int64_t rows, columns;
  int64_t top, left;         // first pixel of the tile that starts at position 0
  void (*transform)(const float* const* pixels, int64_t vectors, float* points, int64_t point_step);
  bool crowded = false;  // read a few channels at a time, its pixels compete for a few cache sets

  bool in_place() const { return tensor.strides.c == 1 && channels == padded && !crowded; }
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
  // A block holds this many channels of its tiles, and moves this many weights per point.
  Winograd(const Axis& h, const Axis& w, int64_t batch, int64_t tile, int64_t channels, int64_t weights, double flops)
      : h_(h, tile),
        w_(w, tile),
        points_(h_.size.points * w_.size.points),
        lanes_(winograd_kernels().lanes),
        transforms_(winograd_kernels().by[h_.form][w_.form]),
        tiles_per_row_(w_.tiles()),
        total_rows_(batch * h_.tiles()),
        threads_(threads_for(flops)) {
    const int64_t point_bytes = points_ * static_cast<int64_t>(sizeof(float));
    const int64_t bytes = total_rows_ * tiles_per_row_ * channels * point_bytes;
    const int64_t block = std::clamp(weights * point_bytes, block_bytes, most_block_bytes);
    const int64_t blocks = std::clamp<int64_t>(ceil_div(bytes, block), 1, std::max<int64_t>(total_rows_, 1));
    rows_per_block_ = ceil_div(total_rows_, blocks);
    zeros_.resize(static_cast<size_t>(channels));
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

}  // namespace atrous::cpu
