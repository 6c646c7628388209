// Pyramid pooling in one pass: rows and columns are cut at the borders of all bins of all levels, each cell of that grid is
// summed once, and every bin is a sum of whole cells. The same grid carries the gradient back: it is constant on a cell.
#include "pyramid_pool.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "pyramid_pool_typed.h"
#include "stream.h"

namespace atrous::cpu {
namespace {

// A value that is read or written costs about as much as this many operations of a convolution.
constexpr double operations_per_value = 4;
// Pixels read side by side: more streams than the hardware prefetches would cost bandwidth.
constexpr int64_t most_streams = 16;

struct Range {
  int64_t begin, end;
};

// Bin i of b over n positions: [floor(i n / b), ceil((i + 1) n / b)); bins overlap where b does not divide n.
Range bin_range(int64_t i, int64_t bins, int64_t n) { return {i * n / bins, ((i + 1) * n + bins - 1) / bins}; }

std::vector<int64_t> cuts_of(const PyramidShape& shape, int axis, int64_t n) {
  std::vector<int64_t> cuts;
  for (int64_t level = 0; level < shape.levels; ++level) {
    const int64_t bins = shape.bins[2 * level + axis];
    for (int64_t i = 0; i < bins; ++i) {
      const Range range = bin_range(i, bins, n);
      cuts.push_back(range.begin);
      cuts.push_back(range.end);
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

// A bin in cells of the grid.
struct Bin {
  Range rows, columns;
  double scale;  // 1 / pixels
};

struct Grid {
  std::vector<int64_t> y, x;  // cuts
  std::vector<Bin> bins;      // level by level

  explicit Grid(const PyramidShape& shape) : y(cuts_of(shape, 0, shape.height)), x(cuts_of(shape, 1, shape.width)) {
    const auto cells = [](const std::vector<int64_t>& cuts, Range range) {
      const auto at = [&](int64_t cut) { return std::lower_bound(cuts.begin(), cuts.end(), cut) - cuts.begin(); };
      return Range{at(range.begin), at(range.end)};
    };
    for (int64_t level = 0; level < shape.levels; ++level) {
      const int64_t rows = shape.bins[2 * level], columns = shape.bins[2 * level + 1];
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          const Range r = bin_range(i, rows, shape.height), c = bin_range(j, columns, shape.width);
          bins.push_back({cells(y, r), cells(x, c), 1.0 / static_cast<double>((r.end - r.begin) * (c.end - c.begin))});
        }
    }
  }
  int64_t rows() const { return static_cast<int64_t>(y.size()) - 1; }
  int64_t columns() const { return static_cast<int64_t>(x.size()) - 1; }
  int64_t cells() const { return rows() * columns(); }
};

int64_t threads_of(const PyramidShape& s) {
  return threads_for(operations_per_value * static_cast<double>(s.batch * s.channels) * static_cast<double>(s.height * s.width));
}

template <class S> int64_t bytes_of(const PyramidShape& s) {
  return s.batch * s.channels * s.height * s.width * static_cast<int64_t>(sizeof(S));
}

// Merges the cell (x, at) into the best so far as one scan over the pixels of both would.
template <class A> void merge_maximum(A x, int32_t at, A& best, int32_t& best_at) {
  const bool nan = x != x, best_nan = best != best;
  if (nan ? !best_nan || at > best_at : x > best || (x == best && at < best_at)) {
    best = x;
    best_at = at;
  }
}

// One bin from its cells, for channels that lie side by side: total (the average) or total and at (the maximum).
template <class A>
void combine(const Grid& grid, const Bin& bin, int64_t channels, const A* values, const int32_t* indices, A* total,
             int32_t* at) {
  const auto cell = [&](int64_t i, int64_t j) { return (i * grid.columns() + j) * channels; };
  const int64_t first = cell(bin.rows.begin, bin.columns.begin);
  if (!at) {
    std::fill_n(total, channels, A{0});
    for (int64_t i = bin.rows.begin; i < bin.rows.end; ++i)
      pyramid_kernels<A>().sum_pixels({bin.columns.end - bin.columns.begin, channels, values + cell(i, bin.columns.begin), channels,
                                   total, nullptr, 0});
    for (int64_t c = 0; c < channels; ++c) total[c] *= static_cast<A>(bin.scale);
    return;
  }
  std::copy_n(values + first, channels, total);
  std::copy_n(indices + first, channels, at);
  for (int64_t i = bin.rows.begin; i < bin.rows.end; ++i)
    for (int64_t j = bin.columns.begin; j < bin.columns.end; ++j)
      for (int64_t c = 0; c < channels; ++c) merge_maximum(values[cell(i, j) + c], indices[cell(i, j) + c], total[c], at[c]);
}

// Channels last: a task is a row of cells of one image and a stretch of channels.
struct ChannelTasks {
  int64_t rows, parts, width, channels;

  ChannelTasks(const PyramidShape& s, const Grid& grid, int64_t threads) : rows(s.batch * grid.rows()), channels(s.channels) {
    constexpr int64_t least = 64;  // channels: shorter stretches would break the stream of memory
    const int64_t wanted = rows >= 4 * threads ? 1 : (4 * threads + rows - 1) / rows;
    parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, channels / least));
    width = (channels + parts - 1) / parts;
  }
  int64_t count() const { return rows * parts; }
  Range stretch(int64_t task) const {
    const int64_t begin = task % parts * width;
    return {std::min(begin, channels), std::min(begin + width, channels)};
  }
};

template <class S>
void pool_nhwc(const PyramidShape& s, const Grid& grid, const S* input, S* output, int64_t* index, CopyOfInput copy) {
  using A = Accumulator<S>;
  const PyramidKernels<S>& kernels = pyramid_kernels<S>();
  const int64_t columns = grid.columns(), channels = s.channels, threads = threads_of(s);
  const int64_t cells = s.batch * grid.cells() * channels;
  Scratch value_scratch(static_cast<size_t>(cells) * sizeof(A));
  Scratch index_scratch(index ? static_cast<size_t>(cells) * sizeof(int32_t) : 0);
  A* const values = value_scratch.as<A>();
  int32_t* const indices = index_scratch.as<int32_t>();

  const ChannelTasks tasks(s, grid, threads);
  parallel(tasks.count(), threads, [&](int64_t begin, int64_t end) {
    const Writer writer(bytes_of<S>(s));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t line = task / tasks.parts, n = line / grid.rows(), r = line % grid.rows();
      const Range part = tasks.stretch(task);
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t cell = (line * columns + j) * channels;
        std::fill(values + cell + part.begin, values + cell + part.end, index ? -std::numeric_limits<A>::infinity() : A{0});
        if (index)
          std::fill(indices + cell + part.begin, indices + cell + part.end,
                    static_cast<int32_t>(grid.y[r] * s.width + grid.x[j]));
      }
      for (int64_t y = grid.y[r]; y < grid.y[r + 1]; ++y)
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t x = grid.x[j]; x < grid.x[j + 1]; x += most_streams) {
            const int64_t pixel = y * s.width + x, cell = (line * columns + j) * channels + part.begin;
            const int64_t pixels = std::min(most_streams, grid.x[j + 1] - x), width = part.end - part.begin;
            const int64_t first = n * s.height * s.width + pixel;
            const S* src = input + first * channels + part.begin;
            const PixelRun run{pixels, width, src, channels, values + cell, index ? indices + cell : nullptr,
                               static_cast<int32_t>(pixel)};
            index ? kernels.max_pixels(run) : kernels.sum_pixels(run);
            if (!copy.data) continue;
            for (int64_t p = 0; p < pixels; ++p)
              writer.copy(static_cast<S*>(copy.data) + (first + p) * copy.channels + part.begin, src + p * channels,
                          width * static_cast<int64_t>(sizeof(S)));
          }
    }
  });

  const int64_t bins = static_cast<int64_t>(grid.bins.size());
  parallel(s.batch * bins, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(static_cast<size_t>(channels) * (sizeof(A) + sizeof(int32_t)));
    A* const total = scratch.as<A>();
    int32_t* const at = reinterpret_cast<int32_t*>(total + channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bins;
      const int64_t image = n * grid.cells() * channels;
      combine(grid, grid.bins[task % bins], channels, values + image, indices + image, total, index ? at : nullptr);
      if (index) std::copy_n(at, channels, index + task * channels);
      kernels.narrow(channels, total, output + task * channels);
    }
  });
}

// Contiguous: a task is a few neighbouring planes, so that their results are written side by side.
template <class S>
void pool_nchw(const PyramidShape& s, const Grid& grid, const S* input, S* output, int64_t* index, CopyOfInput copy) {
  using A = Accumulator<S>;
  constexpr int64_t planes = 16;
  const PyramidKernels<S>& kernels = pyramid_kernels<S>();
  const int64_t columns = grid.columns(), bins = static_cast<int64_t>(grid.bins.size());
  const int64_t blocks = (s.channels + planes - 1) / planes;
  parallel(s.batch * blocks, threads_of(s), [&](int64_t begin, int64_t end) {
    const Writer writer(bytes_of<S>(s));
    Scratch scratch(static_cast<size_t>(s.width + (grid.cells() + 1) * planes) * (sizeof(A) + sizeof(int32_t)));
    A* const total = scratch.as<A>();
    A* const values = total + planes;
    A* const row = values + grid.cells() * planes;
    int32_t* const at = reinterpret_cast<int32_t*>(row + s.width);
    int32_t* const indices = at + planes;
    int32_t* const row_index = indices + grid.cells() * planes;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, c0 = task % blocks * planes, width = std::min(planes, s.channels - c0);
      for (int64_t p = 0; p < width; ++p) {
        const S* const plane = input + (n * s.channels + c0 + p) * s.height * s.width;
        for (int64_t r = 0; r < grid.rows(); ++r) {
          const S* src = plane + grid.y[r] * s.width;
          const PlaneRows rows{grid.y[r + 1] - grid.y[r], s.width, src, s.width, row, row_index,
                               static_cast<int32_t>(grid.y[r] * s.width), static_cast<int32_t>(s.width)};
          index ? kernels.max_rows(rows) : kernels.sum_rows(rows);
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t x = grid.x[j], cell = (r * columns + j) * width + p;
            A value = row[x];
            if (index) {
              indices[cell] = row_index[x];
              for (int64_t i = x + 1; i < grid.x[j + 1]; ++i) merge_maximum(row[i], row_index[i], value, indices[cell]);
            } else {
              for (int64_t i = x + 1; i < grid.x[j + 1]; ++i) value += row[i];
            }
            values[cell] = value;
          }
        }
        if (copy.data)
          writer.copy(static_cast<S*>(copy.data) + (n * copy.channels + c0 + p) * s.height * s.width, plane,
                      s.height * s.width * static_cast<int64_t>(sizeof(S)));
      }
      for (int64_t b = 0; b < bins; ++b) {
        combine(grid, grid.bins[b], width, values, indices, total, index ? at : nullptr);
        const int64_t to = (n * bins + b) * s.channels + c0;
        kernels.narrow(width, total, output + to);
        if (index) std::copy_n(at, width, index + to);
      }
    }
  });
}

// What one bin adds to the gradient of each of its pixels, summed over the bins that hold a cell.
template <class S> void spread_nhwc(const PyramidShape& s, const Grid& grid, const S* grad, S* grad_input) {
  using A = Accumulator<S>;
  const int64_t columns = grid.columns(), channels = s.channels, bins = static_cast<int64_t>(grid.bins.size());
  const int64_t threads = threads_of(s);
  const ChannelTasks tasks(s, grid, threads);
  parallel(tasks.count(), threads, [&](int64_t begin, int64_t end) {
    const Writer writer(bytes_of<S>(s));
    Scratch sums(static_cast<size_t>(channels) * sizeof(A));
    Scratch narrowed(static_cast<size_t>(columns * channels) * sizeof(S));
    A* const sum = sums.as<A>();
    S* const cells = narrowed.as<S>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t line = task / tasks.parts, n = line / grid.rows(), r = line % grid.rows();
      const Range part = tasks.stretch(task);
      const int64_t width = part.end - part.begin;
      if (width <= 0) continue;
      for (int64_t j = 0; j < columns; ++j) {
        std::fill_n(sum, width, A{0});
        for (int64_t b = 0; b < bins; ++b) {
          const Bin& bin = grid.bins[b];
          if (r < bin.rows.begin || r >= bin.rows.end || j < bin.columns.begin || j >= bin.columns.end) continue;
          const S* from = grad + (n * bins + b) * channels + part.begin;
          for (int64_t c = 0; c < width; ++c) sum[c] += convert_value<S, A>(from[c]) * static_cast<A>(bin.scale);
        }
        pyramid_kernels<S>().narrow(width, sum, cells + j * width);
      }
      for (int64_t y = grid.y[r]; y < grid.y[r + 1]; ++y)
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t x = grid.x[j]; x < grid.x[j + 1]; ++x)
            writer.copy(grad_input + ((n * s.height + y) * s.width + x) * channels + part.begin, cells + j * width,
                        width * static_cast<int64_t>(sizeof(S)));
    }
  });
}

template <class S> void spread_nchw(const PyramidShape& s, const Grid& grid, const S* grad, S* grad_input) {
  using A = Accumulator<S>;
  const int64_t bins = static_cast<int64_t>(grid.bins.size());
  parallel(s.batch * s.channels, threads_of(s), [&](int64_t begin, int64_t end) {
    Scratch scratch(static_cast<size_t>(grid.cells()) * sizeof(A));
    A* const cells = scratch.as<A>();
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.channels, c = plane % s.channels;
      std::fill_n(cells, grid.cells(), A{0});
      for (int64_t b = 0; b < bins; ++b) {
        const Bin& bin = grid.bins[b];
        const A share = convert_value<S, A>(grad[(n * bins + b) * s.channels + c]) * static_cast<A>(bin.scale);
        for (int64_t i = bin.rows.begin; i < bin.rows.end; ++i)
          for (int64_t j = bin.columns.begin; j < bin.columns.end; ++j) cells[i * grid.columns() + j] += share;
      }
      for (int64_t r = 0; r < grid.rows(); ++r) {
        S* const first = grad_input + (plane * s.height + grid.y[r]) * s.width;
        for (int64_t j = 0; j < grid.columns(); ++j)
          std::fill(first + grid.x[j], first + grid.x[j + 1], convert_value<A, S>(cells[r * grid.columns() + j]));
        for (int64_t y = 1; y < grid.y[r + 1] - grid.y[r]; ++y) std::copy_n(first, s.width, first + y * s.width);
      }
    }
  });
}

// Each maximum's gradient goes to its pixel. A task owns whole planes, so nobody else adds there, and bins come in order.
template <class S>
void scatter(const PyramidShape& s, const S* grad, const int64_t* index, S* grad_input, int64_t pixel_step,
             int64_t channel_step) {
  using A = Accumulator<S>;
  const int64_t pixels = s.height * s.width, bins = s.cells();
  parallel(s.batch * s.channels, threads_of(s), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.channels, c = plane % s.channels;
      S* const to = grad_input + n * pixels * s.channels + c * channel_step;
      for (int64_t b = 0; b < bins; ++b) {
        const int64_t from = (n * bins + b) * s.channels + c;
        S& at = to[index[from] * pixel_step];
        at = convert_value<A, S>(convert_value<S, A>(at) + convert_value<S, A>(grad[from]));
      }
    }
  });
}

}  // namespace

void pyramid_pool(const PyramidShape& shape, DType dtype, ConstTensor input, bool channels_last, void* output, int64_t* index,
                  CopyOfInput copy) {
  const Grid grid(shape);
  with_type(dtype, [&](auto zero) {
    using S = decltype(zero);
    const auto pool = channels_last ? pool_nhwc<S> : pool_nchw<S>;
    pool(shape, grid, static_cast<const S*>(input.data), static_cast<S*>(output), index, copy);
  });
}

void pyramid_pool_input(const PyramidShape& shape, DType dtype, const void* grad, const int64_t* index,
                        MutableTensor grad_input, bool channels_last) {
  const Grid grid(shape);
  with_type(dtype, [&](auto zero) {
    using S = decltype(zero);
    S* const to = static_cast<S*>(grad_input.data);
    if (index) {
      std::memset(to, 0, static_cast<size_t>(shape.batch * shape.channels * shape.height * shape.width) * sizeof(S));
      return scatter(shape, static_cast<const S*>(grad), index, to, channels_last ? shape.channels : 1,
                     channels_last ? 1 : shape.height * shape.width);
    }
    const auto spread = channels_last ? spread_nhwc<S> : spread_nchw<S>;
    spread(shape, grid, static_cast<const S*>(grad), to);
  });
}

}  // namespace atrous::cpu
