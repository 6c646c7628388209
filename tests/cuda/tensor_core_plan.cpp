// The choice of tiles for the tensor cores, with the numbers of a GPU, as a C function for the tests.
#include "cuda/conv2d_tensor_core.h"
#include "cuda/matrix_tiles.h"

using namespace atrous::cuda;

namespace {

template <typename T, bool inner, typename Shape>
int shared_bytes() {
  return TileProduct<T, Shape, inner, inner>::shared_bytes;
}

}  // namespace

extern "C" {

// out: whether the forward pass takes wide tiles, the side of the weight gradient's tiles and its splits.
void tensor_core_plan(const Conv2dShape* shape, int64_t* out) {
  const Strides strides{};
  for_each_forward_plan(*shape, strides, strides, strides, [&](const CorrelatePlan& plan) {
    out[0] = wants_wide_tile(tile_count(plan, WideTile::rows), plan.dst_channels);
  });
  const WeightTiles tiles = weight_tiles(*shape);
  out[1] = tiles.side, out[2] = tiles.splits;
}

// Every block of every launch of op 0 (forward), 1 (input gradient) or 2 (weight gradient), in launch order, as the kernels read
// the plan: (launch, side of its tile, rows, columns, taps, summed per tap). Returns how many there are; writes at most `room`.
int64_t tensor_core_blocks(const Conv2dShape* shape, int op, int64_t slice_depth, int64_t* out, int64_t room) {
  const Strides strides{};
  int64_t blocks = 0, launch = 0;
  const auto add = [&](int64_t side, int64_t rows, int64_t columns, int64_t taps, int64_t depth) {
    if (blocks < room) {
      const int64_t block[6] = {launch, side, std::min(side, rows), std::min(side, columns), taps, depth};
      std::copy(block, block + 6, out + 6 * blocks);
    }
    ++blocks;
  };
  const auto correlate = [&](const CorrelatePlan& plan) {
    const int64_t side = wants_wide_tile(tile_count(plan, WideTile::rows), plan.dst_channels) ? 128 : 64;
    for (int64_t index = 0; index < tile_count(plan, side); ++index) {
      const Tile tile = find_tile(plan, index, side);
      for (int64_t first = 0; first < plan.dst_channels; first += side)
        add(side, tile.pixels - tile.first, plan.dst_channels - first, plan.h.taps[tile.h] * plan.w.taps[tile.w],
            plan.src_channels);
    }
    ++launch;
  };
  if (op == 0) for_each_forward_plan(*shape, strides, strides, strides, correlate);
  if (op == 1) for_each_input_plan(*shape, strides, strides, strides, correlate);
  if (op == 2) {
    const WeightTiles tiles = weight_tiles(*shape);
    for_each_weight_plan(*shape, strides, strides, tiles.splits, [&](const WeightPlan& plan) {
      for (int64_t h = 0; h < plan.h.count; ++h)
        for (int64_t w = 0; w < plan.w.count; ++w)
          for (int64_t split = 0; split < plan.splits; ++split) {
            const int64_t pixels = plan.batch * plan.h.size[h] * plan.w.size[w];
            const int64_t run = ceil_divide(ceil_divide(pixels, plan.splits), slice_depth) * slice_depth;
            for (int64_t column = 0; column < plan.in_channels; column += tiles.side)
              for (int64_t row = 0; row < plan.out_channels; row += tiles.side)
                add(tiles.side, plan.out_channels - row, plan.in_channels - column, 1,
                    std::clamp<int64_t>(pixels - split * run, 0, run));
          }
      ++launch;
    });
  }
  return blocks;
}

int tensor_core_shared_bytes(int wide, int single_precision) {
  if (single_precision) return wide ? shared_bytes<float, true, WideTile>() : shared_bytes<float, false, SmallTile>();
  return wide ? shared_bytes<__half, false, WideTile>() : shared_bytes<__half, true, SmallTile>();
}

// Where a vector lies in its slice of a factor of `extent`.
int tensor_core_offset(int extent, int depth_inner, int single_precision, int row, int vector) {
  if (depth_inner) return single_precision ? vector_offset<4, 4>(row, vector) : vector_offset<4, 2>(row, vector);
  if (single_precision) return extent == 128 ? vector_offset<32, 4>(row, vector) : vector_offset<16, 4>(row, vector);
  return extent == 128 ? vector_offset<16, 2>(row, vector) : vector_offset<8, 2>(row, vector);
}

}  // extern "C"
