// Pyramid pooling in one pass over the input. Rows and columns are cut at the borders of all bins of all levels (and rows
// further, where that makes too few pieces of work); a block sums one cell of that grid for a stretch of channels, and a
// second, small kernel puts the bins together from whole cells. The gradient of the average is constant on a cell.
#include "pyramid_pool.h"

#include <cmath>
#include <vector>

#include "lanes.h"

namespace atrous::cuda {
namespace {

constexpr int min_blocks = 2;    // per multiprocessor; left to itself the compiler aims for more and spills registers
constexpr int max_cells = 64;    // of one axis in one launch: more become several launches
constexpr int32_t nowhere = INT32_MAX;

struct CellAxis {
  int64_t first, count;         // of the cells of this launch
  int64_t cut[max_cells + 1];   // their borders
};

struct CellPlan {
  CellAxis h, w;
  int64_t rows, columns;  // cells of the whole grid
  int64_t batch, channels;
};

struct Level {
  int64_t rows, columns;
  int64_t first;  // bin
};

struct Pyramid {
  int64_t batch, channels, height, width;
  int64_t bins, levels;
  Level level[max_levels];
};

struct Range {
  int64_t begin, end;
};

// Bin i of b over n positions: [floor(i n / b), ceil((i + 1) n / b)).
__host__ __device__ __forceinline__ Range positions_of_bin(int64_t i, int64_t b, int64_t n) {
  return {divide(i * n, b), divide((i + 1) * n + b - 1, b)};
}

// The bins that hold position p: the same formula with the roles exchanged.
__device__ __forceinline__ Range bins_at(int64_t p, int64_t b, int64_t n) { return positions_of_bin(p, n, b); }

// One of two candidates as one scan over the pixels of both would keep it: the first of the largest; the last NaN.
template <typename Acc>
__device__ __forceinline__ bool replaces(Acc x, int32_t at, Acc best, int32_t best_at) {
  if (x != x) return best == best || at > best_at;
  return x > best || (x == best && at < best_at);
}

struct CellIndex {
  int64_t n, row, column, channel;
};

// Neighbouring blocks take neighbouring columns of the same rows.
__device__ __forceinline__ CellIndex cell_index(const CellPlan& plan, int64_t index, int64_t channel_blocks) {
  const int64_t blocks = divide(index, plan.w.count), lines = divide(blocks, channel_blocks);
  const int64_t n = divide(lines, plan.h.count);
  return {n, lines - n * plan.h.count, index - blocks * plan.w.count, blocks - lines * channel_blocks};
}

// Steps through the pixels of a cell, lanes.pixels at a time, without a division per pixel.
struct CellPixels {
  int64_t width, pixels, step_x, step_y;
  int64_t p, x, y;

  __device__ __forceinline__ CellPixels(const CellPlan& plan, const CellIndex& cell, int64_t first, int64_t step)
      : width(plan.w.cut[cell.column + 1] - plan.w.cut[cell.column]),
        pixels(width * (plan.h.cut[cell.row + 1] - plan.h.cut[cell.row])),
        step_x(step), step_y(divide(step, width)), p(first), x(first), y(divide(first, width)) {
    step_x -= step_y * width;
    x -= y * width;
  }
  __device__ __forceinline__ void next(int64_t step) {
    p += step, x += step_x, y += step_y;
    if (x >= width) x -= width, ++y;
  }
};

// Writes cells[n, row, column, c], for the maximum also its pixel, and where in the grid each cut is.
template <typename T, int V, bool maximum>
__global__ void __launch_bounds__(lane_threads, min_blocks)
    pool_cells(const __grid_constant__ CellPlan plan, const Lanes lanes, const Strides strides, const int64_t width,
               const T* __restrict__ src, accumulator_t<T>* __restrict__ cells, int32_t* __restrict__ pixel_of,
               int32_t* __restrict__ row_at, int32_t* __restrict__ column_at) {
  using Acc = accumulator_t<T>;
  struct Partials {
    Acc value[V][lane_threads];
    int32_t at[maximum ? V : 1][maximum ? lane_threads : 1];
  };
  ATROUS_SHARED(Partials, partial);
  const int thread = static_cast<int>(threadIdx.x);
  const LaneIndex lane = lane_index(lanes, thread);
  const int slot = lane.pixel * lanes.channels + lane.channel;
  if (blockIdx.x == 0) {
    for (int64_t i = thread; i <= plan.h.count; i += lane_threads)
      row_at[plan.h.cut[i]] = static_cast<int32_t>(plan.h.first + i);
    for (int64_t i = thread; i <= plan.w.count; i += lane_threads)
      column_at[plan.w.cut[i]] = static_cast<int32_t>(plan.w.first + i);
  }
  const int64_t channel_blocks = divide(plan.channels + lanes.channels * V - 1, lanes.channels * V);
  const int64_t work = plan.batch * plan.h.count * plan.w.count * channel_blocks;

  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    const CellIndex cell = cell_index(plan, index, channel_blocks);
    const int64_t channel = (cell.channel * lanes.channels + lane.channel) * V;
    const int64_t y0 = plan.h.cut[cell.row], x0 = plan.w.cut[cell.column];

    Acc value[V];
    int32_t at[V];
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] = maximum ? Acc(-INFINITY) : Acc(0), at[v] = nowhere;
    if (channel < plan.channels) {
      const T* const corner = src + cell.n * strides.n + channel * strides.c + y0 * strides.h + x0 * strides.w;
#pragma unroll 4
      for (CellPixels pixel(plan, cell, lane.pixel, lanes.pixels); pixel.p < pixel.pixels; pixel.next(lanes.pixels)) {
        const Vector<T, V> loaded = load_vector<T, V>(corner + pixel.y * strides.h + pixel.x * strides.w);
        const auto here = static_cast<int32_t>((y0 + pixel.y) * width + x0 + pixel.x);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const Acc x = widen(loaded.value[v]);
          if constexpr (!maximum) {
            value[v] += x;
          } else if (replaces(x, here, value[v], at[v])) {
            value[v] = x;
            at[v] = here;
          }
        }
      }
    }

#pragma unroll
    for (int v = 0; v < V; ++v) {
      partial.value[v][slot] = value[v];
      if constexpr (maximum) partial.at[v][slot] = at[v];
    }
    for (int half = lanes.pixels / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane.pixel >= half) continue;
      const int other = slot + half * lanes.channels;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if constexpr (!maximum) {
          partial.value[v][slot] += partial.value[v][other];
        } else if (replaces(partial.value[v][other], partial.at[v][other], partial.value[v][slot], partial.at[v][slot])) {
          partial.value[v][slot] = partial.value[v][other];
          partial.at[v][slot] = partial.at[v][other];
        }
      }
    }
    if (lane.pixel == 0 && channel < plan.channels) {
      const int64_t row = plan.h.first + cell.row, column = plan.w.first + cell.column;
      const int64_t to = ((cell.n * plan.rows + row) * plan.columns + column) * plan.channels + channel;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        cells[to + v] = partial.value[v][slot];
        if constexpr (maximum) pixel_of[to + v] = partial.at[v][slot];
      }
    }
    __syncthreads();  // the next piece of work overwrites the partial results
  }
}

struct BinIndex {
  int64_t n, bin, channel;
  Range rows, columns;
};

__device__ __forceinline__ BinIndex bin_index(const Pyramid& pyramid, int64_t index) {
  const int64_t line = divide(index, pyramid.channels), n = divide(line, pyramid.bins);
  const int64_t bin = line - n * pyramid.bins;
  int64_t l = 0;
  while (l + 1 < pyramid.levels && bin >= pyramid.level[l + 1].first) ++l;
  const Level& level = pyramid.level[l];
  const int64_t row = divide(bin - level.first, level.columns), column = bin - level.first - row * level.columns;
  return {n, bin, index - line * pyramid.channels, positions_of_bin(row, level.rows, pyramid.height),
          positions_of_bin(column, level.columns, pyramid.width)};
}

// Every bin from its cells.
template <typename T, bool maximum>
__global__ void __launch_bounds__(lane_threads, min_blocks)
    combine_cells(const __grid_constant__ Pyramid pyramid, const int64_t grid_rows, const int64_t grid_columns,
                  const accumulator_t<T>* __restrict__ cells, const int32_t* __restrict__ pixel_of,
                  const int32_t* __restrict__ row_at, const int32_t* __restrict__ column_at, T* __restrict__ output,
                  int64_t* __restrict__ index_of) {
  using Acc = accumulator_t<T>;
  const int64_t work = pyramid.batch * pyramid.bins * pyramid.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * lane_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * lane_threads + threadIdx.x; i < work; i += step) {
    const BinIndex bin = bin_index(pyramid, i);
    const Range rows{row_at[bin.rows.begin], row_at[bin.rows.end]};
    const Range columns{column_at[bin.columns.begin], column_at[bin.columns.end]};
    Acc value = maximum ? Acc(-INFINITY) : Acc(0);
    int32_t at = nowhere;
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        const int64_t from = ((bin.n * grid_rows + row) * grid_columns + column) * pyramid.channels + bin.channel;
        if constexpr (!maximum) {
          value += cells[from];
        } else if (replaces(cells[from], pixel_of[from], value, at)) {
          value = cells[from];
          at = pixel_of[from];
        }
      }
    const int64_t pixels = (bin.rows.end - bin.rows.begin) * (bin.columns.end - bin.columns.begin);
    output[i] = narrow<T>(maximum ? value : value / static_cast<Acc>(pixels));
    if constexpr (maximum) index_of[i] = at;
  }
}

// What every bin adds to the gradient of its pixels, summed in order over the bins that hold a cell.
template <typename T, int V>
__global__ void __launch_bounds__(lane_threads, min_blocks)
    spread_average(const __grid_constant__ CellPlan plan, const __grid_constant__ Pyramid pyramid, const Lanes lanes,
                   const Strides strides, const T* __restrict__ grad, T* __restrict__ dst) {
  using Acc = accumulator_t<T>;
  const LaneIndex lane = lane_index(lanes, static_cast<int>(threadIdx.x));
  const int64_t channel_blocks = divide(plan.channels + lanes.channels * V - 1, lanes.channels * V);
  const int64_t work = plan.batch * plan.h.count * plan.w.count * channel_blocks;

  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    const CellIndex cell = cell_index(plan, index, channel_blocks);
    const int64_t channel = (cell.channel * lanes.channels + lane.channel) * V;
    if (channel >= plan.channels) continue;
    const int64_t y0 = plan.h.cut[cell.row], x0 = plan.w.cut[cell.column];

    Acc sum[V] = {};
    for (int64_t l = 0; l < pyramid.levels; ++l) {
      const Level& level = pyramid.level[l];
      const Range rows = bins_at(y0, level.rows, pyramid.height), columns = bins_at(x0, level.columns, pyramid.width);
      for (int64_t i = rows.begin; i < rows.end; ++i)
        for (int64_t j = columns.begin; j < columns.end; ++j) {
          const Range y = positions_of_bin(i, level.rows, pyramid.height);
          const Range x = positions_of_bin(j, level.columns, pyramid.width);
          const Acc share = Acc(1) / static_cast<Acc>((y.end - y.begin) * (x.end - x.begin));
          const int64_t bin = cell.n * pyramid.bins + level.first + i * level.columns + j;
          const Vector<T, V> g = load_vector<T, V>(grad + bin * plan.channels + channel);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += widen(g.value[v]) * share;
        }
    }
    Vector<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.value[v] = narrow<T>(sum[v]);
    T* const corner = dst + cell.n * strides.n + channel * strides.c + y0 * strides.h + x0 * strides.w;
#pragma unroll 4
    for (CellPixels pixel(plan, cell, lane.pixel, lanes.pixels); pixel.p < pixel.pixels; pixel.next(lanes.pixels))
      *reinterpret_cast<Vector<T, V>*>(corner + pixel.y * strides.h + pixel.x * strides.w) = result;
  }
}

// A pixel may be the maximum of several bins: the first of them adds up all, in order, and writes the sum. So nobody else
// writes there, and the sum is rounded once.
template <typename T>
__global__ void __launch_bounds__(lane_threads, min_blocks)
    send_maxima(const __grid_constant__ Pyramid pyramid, const Strides strides, const T* __restrict__ grad,
                const int64_t* __restrict__ index_of, T* __restrict__ dst) {
  using Acc = accumulator_t<T>;
  const int64_t work = pyramid.batch * pyramid.bins * pyramid.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * lane_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * lane_threads + threadIdx.x; i < work; i += step) {
    const int64_t at = index_of[i];
    if (at < 0 || at >= pyramid.height * pyramid.width) continue;
    const int64_t line = divide(i, pyramid.channels), n = divide(line, pyramid.bins);
    const int64_t bin = line - n * pyramid.bins, channel = i - line * pyramid.channels;
    const int64_t y = divide(at, pyramid.width), x = at - y * pyramid.width;
    Acc sum = 0;
    bool first = true;
    for (int64_t l = 0; first && l < pyramid.levels; ++l) {
      const Level& level = pyramid.level[l];
      const Range rows = bins_at(y, level.rows, pyramid.height), columns = bins_at(x, level.columns, pyramid.width);
      for (int64_t r = rows.begin; first && r < rows.end; ++r)
        for (int64_t c = columns.begin; first && c < columns.end; ++c) {
          const int64_t other = level.first + r * level.columns + c;
          const int64_t from = (n * pyramid.bins + other) * pyramid.channels + channel;
          if (index_of[from] != at) continue;
          first = other >= bin;
          sum += widen(grad[from]);
        }
    }
    if (first) dst[n * strides.n + channel * strides.c + y * strides.h + x * strides.w] = narrow<T>(sum);
  }
}

Pyramid pyramid_of(const PyramidShape& s) {
  if (s.levels > max_levels) throw std::runtime_error("pyramid_pool: " + std::to_string(s.levels) + " levels");
  Pyramid pyramid{s.batch, s.channels, s.height, s.width, 0, s.levels, {}};
  for (int64_t l = 0; l < s.levels; ++l) {
    pyramid.level[l] = {s.bins[2 * l], s.bins[2 * l + 1], pyramid.bins};
    pyramid.bins += s.bins[2 * l] * s.bins[2 * l + 1];
  }
  return pyramid;
}

std::vector<int64_t> cuts_of(const PyramidShape& s, int axis, int64_t n) {
  std::vector<int64_t> cuts;
  for (int64_t l = 0; l < s.levels; ++l)
    for (int64_t i = 0; i < s.bins[2 * l + axis]; ++i) {
      const Range range = positions_of_bin(i, s.bins[2 * l + axis], n);
      cuts.push_back(range.begin);
      cuts.push_back(range.end);
    }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

struct Grid {
  std::vector<int64_t> y, x;  // cuts

  explicit Grid(const PyramidShape& s) : x(cuts_of(s, 1, s.width)) {
    const std::vector<int64_t> borders = cuts_of(s, 0, s.height);
    // Rows of cells are cut further where there would be too few pieces of work to fill a large GPU, down to 64 pixels.
    constexpr int64_t wanted_blocks = 1024, smallest = 64;
    const int64_t blocks_per_row = s.batch * columns() * ceil_divide(s.channels, 128);
    const int64_t by_blocks = s.height * std::max<int64_t>(blocks_per_row, 1) / wanted_blocks;
    const int64_t height = std::max({by_blocks, ceil_divide(smallest * columns(), s.width), int64_t{1}});
    y.push_back(0);
    for (size_t i = 1; i < borders.size(); ++i)
      while (y.back() < borders[i]) y.push_back(std::min(y.back() + height, borders[i]));
  }
  int64_t rows() const { return static_cast<int64_t>(y.size()) - 1; }
  int64_t columns() const { return static_cast<int64_t>(x.size()) - 1; }

  // Calls use(plan) for each launch over the cells.
  template <typename Use>
  void for_each_plan(const PyramidShape& s, Use use) const {
    CellPlan plan{{}, {}, rows(), columns(), s.batch, s.channels};
    const auto set = [](CellAxis& axis, const std::vector<int64_t>& cuts, int64_t first, int64_t cells) {
      axis.first = first;
      axis.count = std::min<int64_t>(cells - first, max_cells);
      std::copy_n(cuts.begin() + first, axis.count + 1, axis.cut);
    };
    for (int64_t r = 0; r < rows(); r += max_cells) {
      set(plan.h, y, r, rows());
      for (int64_t c = 0; c < columns(); c += max_cells) {
        set(plan.w, x, c, columns());
        use(static_cast<const CellPlan&>(plan));
      }
    }
  }
};

template <typename T, int V, typename Launch>
void for_each_launch(const PyramidShape& s, const Grid& grid, const Strides& strides, Launch launch) {
  const int64_t vectors = ceil_divide(s.channels, V);
  const Lanes lanes = choose_lanes(vectors, strides.c <= strides.w);
  grid.for_each_plan(s, [&](const CellPlan& plan) {
    const int64_t blocks = s.batch * plan.h.count * plan.w.count * ceil_divide(vectors, lanes.channels);
    launch(plan, lanes, dim3(grid_blocks(blocks)));
  });
}

template <typename T, bool maximum>
void pool(const PyramidShape& s, ConstTensor input, void* output, int64_t* index, void* workspace, void* stream) {
  using Acc = accumulator_t<T>;
  const Grid grid(s);
  const Pyramid pyramid = pyramid_of(s);
  const int64_t count = s.batch * grid.rows() * grid.columns() * s.channels;
  Acc* const cells = static_cast<Acc*>(workspace);
  int32_t* const pixel_of = reinterpret_cast<int32_t*>(cells + count);
  int32_t* const row_at = pixel_of + (maximum ? count : 0);
  int32_t* const column_at = row_at + s.height + 1;
  const T* const src = static_cast<const T*>(input.data);

  constexpr int V = vector_width<T>;
  const auto run = [&](auto kernel) {
    return [=, &s, &input](const CellPlan& plan, const Lanes& lanes, dim3 blocks) {
      ATROUS_LAUNCH(kernel, blocks, dim3(lane_threads), 0, stream, plan, lanes, input.strides, s.width, src, cells,
                    pixel_of, row_at, column_at);
    };
  };
  if (s.channels % V == 0 && takes_vectors(input.data, input.strides, sizeof(T), V))
    for_each_launch<T, V>(s, grid, input.strides, run(pool_cells<T, V, maximum>));
  else
    for_each_launch<T, 1>(s, grid, input.strides, run(pool_cells<T, 1, maximum>));

  const int64_t blocks = ceil_divide(s.batch * pyramid.bins * s.channels, lane_threads);
  const auto combine = combine_cells<T, maximum>;
  ATROUS_LAUNCH(combine, dim3(grid_blocks(blocks)), dim3(lane_threads), 0, stream, pyramid, grid.rows(),
                grid.columns(), cells, pixel_of, row_at, column_at, static_cast<T*>(output), index);
}

}  // namespace

int64_t pyramid_pool_workspace(const PyramidShape& s, DType dtype, bool maximum) {
  const Grid grid(s);
  const int64_t element = (dtype == DType::float64 ? 8 : 4) + (maximum ? 4 : 0);
  return s.batch * grid.rows() * grid.columns() * s.channels * element + (s.height + s.width + 2) * 4;
}

void pyramid_pool(const PyramidShape& shape, DType dtype, ConstTensor input, void* output, int64_t* index,
                  void* workspace, void* stream) {
  if (shape.batch == 0) return;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (index ? pool<T, true> : pool<T, false>)(shape, input, output, index, workspace, stream);
  });
}

void pyramid_pool_average_input(const PyramidShape& shape, DType dtype, const void* grad, MutableTensor grad_input,
                                void* stream) {
  if (shape.batch == 0) return;
  const Grid grid(shape);
  const Pyramid pyramid = pyramid_of(shape);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = vector_width<T>;
    const auto run = [&](auto kernel) {
      return [=](const CellPlan& plan, const Lanes& lanes, dim3 blocks) {
        ATROUS_LAUNCH(kernel, blocks, dim3(lane_threads), 0, stream, plan, pyramid, lanes, grad_input.strides,
                      static_cast<const T*>(grad), static_cast<T*>(grad_input.data));
      };
    };
    const Strides bins{pyramid.bins * shape.channels, 1, shape.channels, shape.channels};
    if (shape.channels % V == 0 && takes_vectors(grad_input.data, grad_input.strides, sizeof(T), V) &&
        takes_vectors(grad, bins, sizeof(T), V))
      for_each_launch<T, V>(shape, grid, grad_input.strides, run(spread_average<T, V>));
    else
      for_each_launch<T, 1>(shape, grid, grad_input.strides, run(spread_average<T, 1>));
  });
}

void pyramid_pool_maximum_input(const PyramidShape& shape, DType dtype, const void* grad, const int64_t* index,
                                MutableTensor grad_input, void* stream) {
  if (shape.batch == 0) return;
  const Pyramid pyramid = pyramid_of(shape);
  const int64_t blocks = ceil_divide(shape.batch * pyramid.bins * shape.channels, lane_threads);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = send_maxima<T>;
    ATROUS_LAUNCH(kernel, dim3(grid_blocks(blocks)), dim3(lane_threads), 0, stream, pyramid, grad_input.strides,
                  static_cast<const T*>(grad), index, static_cast<T*>(grad_input.data));
  });
}

}  // namespace atrous::cuda
