// The loss at full resolution from low-resolution logits. A warp takes 8 x 32 output pixels. For the loss a lane has a column
// and goes through the classes twice (maximum; sum of the exponentials). For the gradient a lane has a class and goes
// through the pixels, so that the transposed interpolation adds up in its registers. What a tile owes the low-resolution
// pixels around it is a small array of its own; a second kernel gathers these in order.
#include "upsample_cross_entropy.h"

#include "upsample_tiles.h"

namespace atrous::cuda {
namespace {

constexpr int threads = 128;
constexpr int min_blocks = 4;  // per multiprocessor
constexpr int sum_threads = 256;

template <typename T>
struct LossOptions {
  int64_t ignore_index;
  LabelType label_type;
  T smoothing;
  int64_t part_h, part_w;  // low-resolution rows and columns that a tile can owe something
};

// Of a pixel: gradient = exp(z - largest) * factor - onehot at the label - soft * weight of the class.
template <typename T>
struct Pixels {
  Vector<T, 4> value[tile_rows][tile_columns];  // largest, factor, onehot, soft
  int label[tile_rows][tile_columns];
  UpsamplePosition<T> row[tile_rows], column[tile_columns];
};

__device__ __forceinline__ int64_t load_label(const void* labels, LabelType type, int64_t at) {
  if (type == LabelType::uint8) return static_cast<const uint8_t*>(labels)[at];
  if (type == LabelType::int32) return static_cast<const int32_t*>(labels)[at];
  return static_cast<const int64_t*>(labels)[at];
}

// What the tile owes class c of the low-resolution pixels: part[row * part_w + column], classes apart.
template <typename T>
__device__ __forceinline__ void spread_class(const UpsamplePlan<T>& plan, const LossOptions<T>& options,
                                             const UpsampleTile<T>& tile, const Pixels<T>& pixels, int64_t c,
                                             T class_weight, const T* __restrict__ logits, T* __restrict__ part) {
  for (int64_t i = 0; i < options.part_h * options.part_w; ++i) part[i * plan.classes] = 0;
  const T* const plane = logits + tile.n * plan.strides.n + c * plan.strides.c;
  const int first_row = pixels.row[0].left, first_column = pixels.column[0].left;
  for (int begin = 0, end = 0; begin < tile.rows; begin = end) {
    const int row = pixels.row[begin].left;
    while (end < tile.rows && pixels.row[end].left == row) ++end;
    const T* const upper = plane + row * plan.strides.h;
    const T* const lower = row + 1 < plan.h.n_in ? upper + plan.strides.h : upper;
    T* const part_row = part + (row - first_row) * options.part_w * plan.classes;
    for (int x = 0; x < tile.columns;) {
      const int column = pixels.column[x].left;
      const int64_t left = column * plan.strides.w, right = column + 1 < plan.w.n_in ? left + plan.strides.w : left;
      const T upper_left = upper[left], upper_right = upper[right], lower_left = lower[left], lower_right = lower[right];
      T owed[2][2] = {};
      for (; x < tile.columns && pixels.column[x].left == column; ++x) {
        const T share = pixels.column[x].share;
        UpsampleLine<T> line;
        line.set(upper_left, upper_right, lower_left, lower_right, share);
        T sum = 0, slope = 0;
        for (int r = begin; r < end; ++r) {
          const Vector<T, 4> pixel = pixels.value[r][x];
          const T down = pixels.row[r].share;
          T gradient = std::exp(line.base + down * line.delta - pixel.value[0]) * pixel.value[1];
          if (pixels.label[r][x] == c) gradient -= pixel.value[2];
          gradient -= pixel.value[3] * class_weight;
          sum += gradient;
          slope += down * gradient;
        }
        sum -= slope;
        owed[0][0] += sum - share * sum, owed[0][1] += share * sum;
        owed[1][0] += slope - share * slope, owed[1][1] += share * slope;
      }
      T* const to = part_row + (column - first_column) * plan.classes;
      to[0] += owed[0][0];
      to[plan.classes] += owed[0][1];
      to[options.part_w * plan.classes] += owed[1][0];
      to[(options.part_w + 1) * plan.classes] += owed[1][1];
    }
  }
}

// Writes the loss of every pixel, tile_sums[tile, 2] and, where wanted, parts[tile, part_h, part_w, classes].
template <typename T>
__global__ void __launch_bounds__(threads, sizeof(T) == 8 ? 2 : min_blocks)
    loss_tiles(const __grid_constant__ UpsamplePlan<T> plan, const LossOptions<T> options,
               const T* __restrict__ logits, const void* __restrict__ labels, const T* __restrict__ weight,
               const T* __restrict__ scale, T* __restrict__ pixel_loss, double* __restrict__ tile_sums,
               T* __restrict__ parts) {
  struct Block {
    Pixels<T> warp[threads / warp_lanes];
  };
  ATROUS_SHARED(Block, block);
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes, warp = static_cast<int>(threadIdx.x) / warp_lanes;
  Pixels<T>& pixels = block.warp[warp];
  const int64_t tiles = plan.batch * plan.tiles_h * plan.tiles_w;
  const T smooth = options.smoothing / static_cast<T>(plan.classes), hard = 1 - options.smoothing;

  const int64_t step = static_cast<int64_t>(gridDim.x) * (threads / warp_lanes);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * (threads / warp_lanes) + warp; index < tiles; index += step) {
    const UpsampleTile<T> tile(plan, index, lane);
    const int64_t first = (tile.n * plan.h.n_out + tile.y) * plan.w.n_out + tile.x + lane;

    int label[tile_rows];  // -1: not counted
    T scales[tile_rows];
#pragma unroll
    for (int r = 0; r < tile_rows; ++r) {
      label[r] = -1;
      scales[r] = 0;
      if (r >= tile.rows || lane >= tile.columns) continue;
      const int64_t at = first + r * plan.w.n_out, found = load_label(labels, options.label_type, at);
      if (found == options.ignore_index) continue;
      const bool is_class = found >= 0 && found < plan.classes;
      label[r] = is_class ? static_cast<int>(found) : 0;
      scales[r] = !is_class ? static_cast<T>(NAN) : scale ? scale[at] : T(1);
    }

    T largest[tile_rows], exponentials[tile_rows] = {}, wanted[tile_rows] = {}, mean[tile_rows] = {}, weight_sum = 0;
#pragma unroll
    for (int r = 0; r < tile_rows; ++r) largest[r] = static_cast<T>(-INFINITY);
    for_each_logit(plan, tile, logits, [&](int64_t, int r, T z) { largest[r] = z > largest[r] ? z : largest[r]; });
    for_each_logit(plan, tile, logits, [&](int64_t c, int r, T z) {
      const T difference = z - largest[r];
      exponentials[r] += std::exp(difference);
      if (label[r] == c) wanted[r] = difference;
      if (smooth > 0) {
        mean[r] += weight[c] * z;
        if (r == 0) weight_sum += weight[c];
      }
    });

    double total_loss = 0, total_weight = 0;
#pragma unroll
    for (int r = 0; r < tile_rows; ++r) {
      const T label_weight = weight[label[r] < 0 ? 0 : label[r]] * scales[r], onehot = hard * label_weight;
      const T log_sum = std::log(exponentials[r]), soft = smooth * scales[r];
      T loss = onehot * (log_sum - wanted[r]);
      if (smooth > 0) loss += soft * ((log_sum + largest[r]) * weight_sum - mean[r]);
      if (label[r] < 0) loss = 0;
      total_loss += loss;
      total_weight += label_weight;
      if (pixel_loss && r < tile.rows && lane < tile.columns) pixel_loss[first + r * plan.w.n_out] = loss;
      pixels.value[r][lane] = {{largest[r], (onehot + soft * weight_sum) / exponentials[r], onehot, soft}};
      pixels.label[r][lane] = label[r];
      if (lane == 0) pixels.row[r] = tile.row[r];
    }
    pixels.column[lane] = tile.column;
    for (int half = warp_lanes / 2; half > 0; half /= 2) {
      total_loss += __shfl_down_sync(0xffffffffu, total_loss, static_cast<unsigned>(half));
      total_weight += __shfl_down_sync(0xffffffffu, total_weight, static_cast<unsigned>(half));
    }
    if (lane == 0) {
      tile_sums[2 * index] = total_loss;
      tile_sums[2 * index + 1] = total_weight;
    }
    if (!parts) continue;
    __syncwarp();
    T* const tile_parts = parts + index * options.part_h * options.part_w * plan.classes;
    for (int64_t c = lane; c < plan.classes; c += warp_lanes)
      spread_class(plan, options, tile, pixels, c, smooth > 0 ? weight[c] : T(0), logits, tile_parts + c);
    __syncwarp();  // the next tile overwrites the pixels
  }
}

// sums[2]: the sums of all tiles, each thread's in order, then pairwise in a fixed tree.
__global__ void __launch_bounds__(sum_threads)
    sum_tiles(const double* __restrict__ tile_sums, const int64_t tiles, double* __restrict__ sums) {
  struct Sums {
    double value[2][sum_threads];
  };
  ATROUS_SHARED(Sums, partial);
  const int thread = static_cast<int>(threadIdx.x);
  double loss = 0, weight = 0;
  for (int64_t tile = thread; tile < tiles; tile += sum_threads) {
    loss += tile_sums[2 * tile];
    weight += tile_sums[2 * tile + 1];
  }
  partial.value[0][thread] = loss;
  partial.value[1][thread] = weight;
  for (int half = sum_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    partial.value[0][thread] += partial.value[0][thread + half];
    partial.value[1][thread] += partial.value[1][thread + half];
  }
  if (thread == 0) {
    sums[0] = partial.value[0][0];
    sums[1] = partial.value[1][0];
  }
}

// The first output position whose left neighbour is `left` or later.
template <typename T>
__device__ __forceinline__ int64_t first_position(const UpsampleAxis<T>& axis, int64_t left) {
  int64_t low = 0, high = axis.n_out;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (axis.at(middle).left < left)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

struct TileRange {
  int64_t begin, end;
};

// The tiles with a position between i - 1 and i or between i and i + 1.
template <typename T>
__device__ __forceinline__ TileRange tiles_around(const UpsampleAxis<T>& axis, int64_t i, int tile_size) {
  const int64_t first = first_position(axis, i - 1), last = first_position(axis, i + 1);
  if (first == last) return {0, 0};
  return {first / tile_size, (last - 1) / tile_size + 1};
}

// A warp per low-resolution pixel, a lane per class.
template <typename T>
__global__ void __launch_bounds__(threads, min_blocks)
    gather_parts(const __grid_constant__ UpsamplePlan<T> plan, const LossOptions<T> options,
                 const T* __restrict__ parts, const Strides strides, T* __restrict__ gradient) {
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes, warp = static_cast<int>(threadIdx.x) / warp_lanes;
  const int64_t work = plan.batch * plan.h.n_in * plan.w.n_in;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (threads / warp_lanes);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * (threads / warp_lanes) + warp; index < work; index += step) {
    const int64_t line = divide(index, plan.w.n_in), n = divide(line, plan.h.n_in);
    const int64_t i = line - n * plan.h.n_in, j = index - line * plan.w.n_in;
    const TileRange rows = tiles_around(plan.h, i, tile_rows), columns = tiles_around(plan.w, j, tile_columns);
    T* const to = gradient + n * strides.n + i * strides.h + j * strides.w;
    for (int64_t c = lane; c < plan.classes; c += warp_lanes) {
      T sum = 0;
      for (int64_t r = rows.begin; r < rows.end; ++r)
        for (int64_t q = columns.begin; q < columns.end; ++q) {
          const int64_t row = i - plan.h.at(r * tile_rows).left, column = j - plan.w.at(q * tile_columns).left;
          const int64_t tile = (n * plan.tiles_h + r) * plan.tiles_w + q;
          sum += parts[((tile * options.part_h + row) * options.part_w + column) * plan.classes + c];
        }
      to[c * strides.c] = sum;
    }
  }
}

// The most low-resolution positions that a tile of output positions lies between.
template <typename T>
int64_t part_size(const UpsampleAxis<T>& axis, int64_t tile_size) {
  int64_t most = 0;
  for (int64_t first = 0; first < axis.n_out; first += tile_size) {
    const int64_t last = std::min(first + tile_size, axis.n_out) - 1;
    most = std::max<int64_t>(most, axis.at(last).left - axis.at(first).left + 2);
  }
  return most;
}

template <typename T>
void run(const UpsampleCrossEntropy& job, void* stream) {
  const UpsamplePlan<T> plan(job.shape, job.logits.strides);
  const LossOptions<T> options{job.ignore_index, job.label_type, static_cast<T>(job.smoothing),
                               part_size(plan.h, tile_rows), part_size(plan.w, tile_columns)};
  double* const tile_sums = static_cast<double*>(job.workspace);
  T* const parts = job.gradient.data ? reinterpret_cast<T*>(tile_sums + 2 * plan.tiles()) : nullptr;
  constexpr int warps = threads / warp_lanes;
  if (plan.tiles() > 0) {
    const auto loss = loss_tiles<T>;
    ATROUS_LAUNCH(loss, dim3(grid_blocks(ceil_divide(plan.tiles(), warps))), dim3(threads), 0, stream, plan, options,
                  static_cast<const T*>(job.logits.data), job.labels, static_cast<const T*>(job.weight),
                  static_cast<const T*>(job.scale), static_cast<T*>(job.pixel_loss), tile_sums, parts);
  }
  ATROUS_LAUNCH(sum_tiles, dim3(1), dim3(sum_threads), 0, stream, tile_sums, plan.tiles(), job.sums);
  const int64_t pixels = job.shape.batch * job.shape.in_h * job.shape.in_w;
  if (!job.gradient.data || pixels == 0) return;
  const auto gather = gather_parts<T>;
  ATROUS_LAUNCH(gather, dim3(grid_blocks(ceil_divide(pixels, warps))), dim3(threads), 0, stream, plan, options, parts,
                job.gradient.strides, static_cast<T*>(job.gradient.data));
}

}  // namespace

int64_t upsample_cross_entropy_workspace(const UpsampleShape& shape, DType dtype, bool with_gradient) {
  int64_t bytes = 0;
  with_upsample_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const UpsamplePlan<T> plan(shape, {});
    const int64_t part = part_size(plan.h, tile_rows) * part_size(plan.w, tile_columns) * shape.classes;
    bytes = plan.tiles() * (2 * 8 + (with_gradient ? part * static_cast<int64_t>(sizeof(T)) : 0));
  });
  return bytes;
}

void upsample_cross_entropy(const UpsampleCrossEntropy& job, void* stream) {
  with_upsample_type(job.dtype, [&](auto zero) { run<decltype(zero)>(job, stream); });
}

}  // namespace atrous::cuda
