// Gaussian filtering through a permutohedral lattice: points to vertices, a blur along every axis, vertices to points. All three
// are gathers, with neighbouring threads on neighbouring channels of a row.
#include "permutohedral_filter.h"

#include <utility>

#include "launch.h"

namespace atrous::cuda {
namespace {

constexpr int threads = 256;
constexpr int64_t most_terms = 128;  // that one thread adds up; rows with more get a block
constexpr int most_lanes = 32;       // channels that such a block takes at a time

// Row r has the terms from begin[r] to begin[r + 1] or, without begin, `per_row` of them.
template <typename T>
struct Terms {
  const int64_t* begin;
  int64_t per_row;
  const int32_t* index;
  const T* weight;

  __device__ __forceinline__ int64_t first(int64_t row) const { return begin ? begin[row] : row * per_row; }
};

__device__ __forceinline__ int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; }
__device__ __forceinline__ int64_t index_step() { return static_cast<int64_t>(gridDim.x) * threads; }

// dst[row] = sum of weight * src[index] over its terms; rows with more than most_terms are left out.
template <typename T>
__global__ void __launch_bounds__(threads)
    sum_terms(const int64_t rows, const int64_t channels, const Terms<T> terms, const T* __restrict__ src, T* __restrict__ dst) {
  for (int64_t i = first_index(); i < rows * channels; i += index_step()) {
    const int64_t row = divide(i, channels), channel = i - row * channels;
    const int64_t first = terms.first(row), last = terms.first(row + 1);
    if (last - first > most_terms) continue;
    T sum = 0;
#pragma unroll 4
    for (int64_t k = first; k < last; ++k) sum += terms.weight[k] * src[terms.index[k] * channels + channel];
    dst[i] = sum;
  }
}

template <typename T>
struct Partials {
  T sum[threads];
};

// The rows that sum_terms leaves out, a block each: every slice of its threads adds up every so manieth term.
template <typename T>
__global__ void __launch_bounds__(threads)
    sum_long_rows(const int64_t rows, const int64_t channels, const int lanes, const Terms<T> terms, const T* __restrict__ src,
                  T* __restrict__ dst) {
  ATROUS_SHARED(Partials<T>, partial);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, slice = thread / lanes, slices = threads / lanes;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t first = terms.first(row), last = terms.first(row + 1);
    if (last - first <= most_terms) continue;
    for (int64_t from = 0; from < channels; from += lanes) {
      const int64_t channel = from + lane;
      T sum = 0;
      if (channel < channels) {
#pragma unroll 4
        for (int64_t k = first + slice; k < last; k += slices) sum += terms.weight[k] * src[terms.index[k] * channels + channel];
      }
      partial.sum[thread] = sum;
      __syncthreads();
      if (slice == 0 && channel < channels) {
        for (int other = 1; other < slices; ++other) sum += partial.sum[other * lanes + lane];
        dst[row * channels + channel] = sum;
      }
      __syncthreads();
    }
  }
}

// dst[v] = (src[v] + (src[a] + src[b]) / 2) * scale, a and b being the neighbours of v along one axis, zero where there is none.
template <typename T>
__global__ void __launch_bounds__(threads)
    blur(const int64_t vertices, const int64_t channels, const int32_t* __restrict__ neighbours, const T scale,
         const T* __restrict__ src, T* __restrict__ dst) {
  for (int64_t i = first_index(); i < vertices * channels; i += index_step()) {
    const int64_t vertex = divide(i, channels), channel = i - vertex * channels;
    const int64_t a = neighbours[2 * vertex], b = neighbours[2 * vertex + 1];
    const T before = a < vertices ? src[a * channels + channel] : T(0);
    const T after = b < vertices ? src[b * channels + channel] : T(0);
    dst[i] = (src[i] + (before + after) * T(0.5)) * scale;
  }
}

// dst[p][k] = scale * (grad[p] . blurred[v] + values[p] . reversed[v]), v being corner k of point p.
template <typename T>
__global__ void __launch_bounds__(threads)
    weight_gradient(const int64_t points, const int64_t corners, const int64_t channels, const T scale,
                    const int32_t* __restrict__ corner_vertices, const T* __restrict__ grad, const T* __restrict__ blurred,
                    const T* __restrict__ values, const T* __restrict__ reversed, T* __restrict__ dst) {
  for (int64_t i = first_index(); i < points * corners; i += index_step()) {
    const int64_t row = divide(i, corners) * channels, vertex = corner_vertices[i] * channels;
    T sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += grad[row + c] * blurred[vertex + c] + values[row + c] * reversed[vertex + c];
    dst[i] = sum * scale;
  }
}

dim3 blocks_for(int64_t work) { return dim3(grid_blocks(ceil_divide(work, threads))); }

// 2^corners times its input becomes a peak of about 1, as on the CPU.
template <typename T>
T scale_of(const Lattice& lattice) {
  return 1 / (1 + 1 / static_cast<T>(int64_t{1} << (lattice.corners - 1)));
}

template <typename T>
void gather(int64_t rows, int64_t channels, const Terms<T>& terms, const T* src, T* dst, void* stream) {
  const auto kernel = sum_terms<T>;
  ATROUS_LAUNCH(kernel, blocks_for(rows * channels), dim3(threads), 0, stream, rows, channels, terms, src, dst);
  if (!terms.begin) return;
  int lanes = 1;
  while (lanes < most_lanes && lanes < channels) lanes *= 2;
  const auto long_rows = sum_long_rows<T>;
  // Most blocks find nothing: a few thousand of them step through the rows.
  ATROUS_LAUNCH(long_rows, dim3(grid_blocks(std::min<int64_t>(rows, 4096))), dim3(threads), 0, stream, rows, channels, lanes,
                terms, src, dst);
}

// Blurred values of the vertices in `now`, `next` being room for as many.
template <typename T>
void blurred_vertices(const Lattice& l, int64_t channels, const void* values, bool reverse, T scale, T*& now, T*& next,
                      void* stream) {
  const Terms<T> into{l.begin, 0, l.corner_points, static_cast<const T*>(l.point_weights)};
  gather(l.vertices, channels, into, static_cast<const T*>(values), now, stream);
  const auto kernel = blur<T>;
  for (int64_t step = 0; step < l.corners; ++step) {
    const int64_t axis = reverse ? l.corners - 1 - step : step;
    ATROUS_LAUNCH(kernel, blocks_for(l.vertices * channels), dim3(threads), 0, stream, l.vertices, channels,
                  l.neighbours + axis * l.vertices * 2, step == l.corners - 1 ? scale : T(1), now, next);
    std::swap(now, next);
  }
}

template <typename T>
void filter(const Lattice& l, int64_t channels, const void* values, bool reverse, void* out, void* workspace, void* stream) {
  T *now = static_cast<T*>(workspace), *next = now + l.vertices * channels;
  blurred_vertices(l, channels, values, reverse, scale_of<T>(l), now, next, stream);
  const Terms<T> back{nullptr, l.corners, l.corner_vertices, static_cast<const T*>(l.weights)};
  gather(l.points, channels, back, now, static_cast<T*>(out), stream);
}

template <typename T>
void filter_weights(const Lattice& l, int64_t channels, const void* grad, const void* values, bool reverse, void* out,
                    void* workspace, void* stream) {
  T *of_values = static_cast<T*>(workspace), *free = of_values + l.vertices * channels, *of_grad = free + l.vertices * channels;
  blurred_vertices(l, channels, values, reverse, T(1), of_values, free, stream);
  blurred_vertices(l, channels, grad, !reverse, T(1), of_grad, free, stream);
  const auto kernel = weight_gradient<T>;
  ATROUS_LAUNCH(kernel, blocks_for(l.points * l.corners), dim3(threads), 0, stream, l.points, l.corners, channels, scale_of<T>(l),
                l.corner_vertices, static_cast<const T*>(grad), of_values, static_cast<const T*>(values), of_grad,
                static_cast<T*>(out));
}

int64_t vertex_bytes(const Lattice& l, int64_t channels) {
  return l.vertices * channels * (l.dtype == DType::float64 ? 8 : 4);
}

}  // namespace

int64_t filter_workspace(const Lattice& lattice, int64_t channels) { return 2 * vertex_bytes(lattice, channels); }
int64_t filter_weights_workspace(const Lattice& lattice, int64_t channels) { return 3 * vertex_bytes(lattice, channels); }

void permutohedral_filter(const Lattice& lattice, int64_t channels, const void* values, bool reverse, void* out, void* workspace,
                          void* stream) {
  (lattice.dtype == DType::float64 ? filter<double> : filter<float>)(lattice, channels, values, reverse, out, workspace, stream);
}

void permutohedral_filter_weights(const Lattice& lattice, int64_t channels, const void* grad, const void* values, bool reverse,
                                  void* out, void* workspace, void* stream) {
  (lattice.dtype == DType::float64 ? filter_weights<double> : filter_weights<float>)(lattice, channels, grad, values, reverse, out,
                                                                                    workspace, stream);
}

}  // namespace atrous::cuda
