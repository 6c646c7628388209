// Exclusive sums of integers in three launches: within tiles, over the tiles, and the second added to the first. Included by the one
// file of kernels that needs them.
#pragma once

#include "launch.h"

namespace atrous::cuda {
namespace {

constexpr int threads = 256;
constexpr int scan_items = 4;  // of a thread
constexpr int64_t scan_tile = threads * scan_items;

__device__ __forceinline__ int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; }
__device__ __forceinline__ int64_t index_step() { return static_cast<int64_t>(gridDim.x) * threads; }

// What the threads of a block before this one hold together; `total`: what all hold.
__device__ __forceinline__ int32_t sum_before(int32_t value, int32_t (&shared)[threads], int32_t& total) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  for (int distance = 1; distance < threads; distance *= 2) {
    __syncthreads();
    const int32_t other = thread >= distance ? shared[thread - distance] : 0;
    __syncthreads();
    shared[thread] += other;
  }
  __syncthreads();
  total = shared[threads - 1];
  const int32_t before = shared[thread] - value;
  __syncthreads();
  return before;
}

struct ScanShared {
  int32_t sums[threads];
};

// Exclusive sums within tiles, in place, and the sum of each tile.
__global__ void __launch_bounds__(threads) scan_tiles(const int64_t count, int32_t* values, int32_t* __restrict__ tile_sums) {
  ATROUS_SHARED(ScanShared, shared);
  const int64_t tiles = divide(count + scan_tile - 1, scan_tile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t from = tile * scan_tile + threadIdx.x * scan_items;
    int32_t item[scan_items], sum = 0, total;
#pragma unroll
    for (int i = 0; i < scan_items; ++i) {
      item[i] = from + i < count ? values[from + i] : 0;
      sum += item[i];
    }
    int32_t before = sum_before(sum, shared.sums, total);
#pragma unroll
    for (int i = 0; i < scan_items; ++i) {
      if (from + i < count) values[from + i] = before;
      before += item[i];
    }
    if (threadIdx.x == 0) tile_sums[tile] = total;
  }
}

// One block: exclusive sums of the tiles, in place, and the sum of all.
__global__ void __launch_bounds__(threads) scan_sums(const int64_t tiles, int32_t* tile_sums, int64_t* __restrict__ all) {
  ATROUS_SHARED(ScanShared, shared);
  int32_t carried = 0;
  for (int64_t from = 0; from < tiles; from += threads) {
    const int64_t tile = from + threadIdx.x;
    int32_t total;
    const int32_t before = sum_before(tile < tiles ? tile_sums[tile] : 0, shared.sums, total);
    if (tile < tiles) tile_sums[tile] = carried + before;
    carried += total;
  }
  if (threadIdx.x == 0 && all) *all = carried;
}

__global__ void __launch_bounds__(threads)
    add_sums(const int64_t count, const int32_t* __restrict__ tile_sums, int32_t* __restrict__ values) {
  for (int64_t i = first_index(); i < count; i += index_step()) values[i] += tile_sums[divide(i, scan_tile)];
}

dim3 blocks_for(int64_t work) { return dim3(grid_blocks(ceil_divide(work, threads))); }

// values become their exclusive sums; all: where the sum of all goes, or null.
void scan(int64_t count, int32_t* values, int32_t* tile_sums, int64_t* all, void* stream) {
  const int64_t tiles = ceil_divide(count, scan_tile);
  ATROUS_LAUNCH(scan_tiles, dim3(grid_blocks(tiles)), dim3(threads), 0, stream, count, values, tile_sums);
  ATROUS_LAUNCH(scan_sums, dim3(1), dim3(threads), 0, stream, tiles, tile_sums, all);
  ATROUS_LAUNCH(add_sums, blocks_for(count), dim3(threads), 0, stream, count, tile_sums, values);
}

}  // namespace
}  // namespace atrous::cuda
