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
