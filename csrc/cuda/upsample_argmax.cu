// Classes at full resolution from low-resolution logits: the tiles of upsample_tiles.h with a running maximum.
#include "upsample_argmax.h"

#include "upsample_tiles.h"

namespace atrous::cuda {
namespace {

constexpr int threads = 128;
constexpr int min_blocks = 4;  // per multiprocessor

template <typename T>
__global__ void __launch_bounds__(threads, min_blocks)
    argmax_tiles(const __grid_constant__ UpsamplePlan<T> plan, const T* __restrict__ logits, int64_t* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes, warp = static_cast<int>(threadIdx.x) / warp_lanes;
  const int64_t tiles = plan.batch * plan.tiles_h * plan.tiles_w;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (threads / warp_lanes);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * (threads / warp_lanes) + warp; index < tiles; index += step) {
    const UpsampleTile<T> tile(plan, index, lane);
    T best[tile_rows] = {};
    int found[tile_rows] = {};
    for_each_logit(plan, tile, logits, [&](int64_t c, int r, T z) {
      if (c > 0 && (z <= best[r] || best[r] != best[r])) return;
      best[r] = z;
      found[r] = static_cast<int>(c);
    });
    if (lane >= tile.columns) continue;
    int64_t* const to = out + (tile.n * plan.h.n_out + tile.y) * plan.w.n_out + tile.x + lane;
#pragma unroll
    for (int r = 0; r < tile_rows; ++r)
      if (r < tile.rows) to[r * plan.w.n_out] = found[r];
  }
}

}  // namespace

void upsample_argmax(const UpsampleShape& shape, DType dtype, ConstTensor logits, int64_t* out, void* stream) {
  with_upsample_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const UpsamplePlan<T> plan(shape, logits.strides);
    if (plan.tiles() == 0) return;
    const auto kernel = argmax_tiles<T>;
    ATROUS_LAUNCH(kernel, dim3(grid_blocks(ceil_divide(plan.tiles(), threads / warp_lanes))), dim3(threads), 0, stream,
                  plan, static_cast<const T*>(logits.data), out);
  });
}

}  // namespace atrous::cuda
