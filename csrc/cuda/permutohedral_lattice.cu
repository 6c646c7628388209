// The permutohedral lattice of a set of points: every corner of a point's simplex into a hash table of corners, the first corner
// of every vertex numbered by a scan, the corners sorted by vertex. The table's slots depend on the order of the threads; what is
// read from it, the smallest corner of a vertex, does not.
#include "permutohedral_lattice.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "exclusive_sums.h"

namespace atrous::cuda {
namespace {

constexpr int digit_bits = 8, digits = 1 << digit_bits;
constexpr int64_t sort_tile = threads * 8;         // of a block
constexpr int32_t nobody = INT32_MAX;
constexpr double largest_coordinate = 1 << 20, coordinate_per_feature = 16;  // as on the CPU

// The coordinates of a vertex but the last (they add up to zero), three to a number in steps of 2^21.
struct Key {
  unsigned long long low, high;
};

__device__ __forceinline__ void add(Key& key, int coordinate, int value) {
  const unsigned long long moved = static_cast<unsigned long long>(static_cast<long long>(value)) << 21 * (coordinate % 3);
  if (coordinate < 3) key.low += moved;
  else key.high += moved;
}

__device__ __forceinline__ uint64_t hash_of(const Key& key, int64_t image) {
  const uint64_t h = key.low * 0x9e3779b97f4a7c15u + key.high * 0xc2b2ae3d27d4eb4fu +
                     static_cast<uint64_t>(image) * 0x165667b19e3779f9u;
  return (h ^ h >> 32) * 0xd6e8feb86659fd93u;
}

// Rounded products, never part of a fused multiply-add: the CPU's bits.
__device__ __forceinline__ float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename T>
struct Scales {
  T of[most_lattice_dimensions];
};

// Weights, ranks and the vertex of remainder 0 of every point.
template <typename T, int d>
__global__ void __launch_bounds__(threads)
    place(const int64_t points, const T most, const __grid_constant__ Scales<T> scales, const T* __restrict__ features,
          T* __restrict__ weights, uint8_t* __restrict__ ranks, Key* __restrict__ origins, unsigned long long* bad) {
  constexpr T rounder = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
  constexpr T inverse = T(1) / (d + 1);
  for (int64_t p = first_index(); p < points; p += index_step()) {
    T elevated[d + 1], sum = 0;
#pragma unroll
    for (int j = d; j > 0; --j) {
      T feature = features[p * d + j - 1];
      if (!(feature >= -most && feature <= most)) {
        atomicMin(bad, static_cast<unsigned long long>(p * d + j - 1));
        feature = 0;
      }
      const T x = product(feature, scales.of[j - 1]);
      elevated[j] = sum - product(static_cast<T>(j), x);
      sum += x;
    }
    elevated[0] = sum;

    int origin[d + 1], rank[d + 1], excess = 0;
    T difference[d + 1], share[d + 1];
#pragma unroll
    for (int i = 0; i <= d; ++i) {
      const T nearest = (product(elevated[i], inverse) + rounder) - rounder;
      origin[i] = static_cast<int>(nearest) * (d + 1);
      excess += static_cast<int>(nearest);
      difference[i] = elevated[i] - product(nearest, static_cast<T>(d + 1));
      rank[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < d; ++i)
#pragma unroll
      for (int j = i + 1; j <= d; ++j) {
        const int smaller = difference[i] < difference[j];
        rank[i] += smaller;
        rank[j] += 1 - smaller;
      }
    Key key{0, 0};
#pragma unroll
    for (int i = 0; i <= d; ++i) {
      rank[i] += excess;
      const int shift = rank[i] < 0 ? d + 1 : rank[i] > d ? -(d + 1) : 0;
      rank[i] += shift;
      origin[i] += shift;
      share[i] = product(elevated[i] - static_cast<T>(origin[i]), inverse);
      ranks[p * (d + 1) + i] = static_cast<uint8_t>(rank[i]);
      if (i < d) add(key, i, origin[i]);
    }
    origins[p] = key;
    T of_rank[d + 1];
#pragma unroll
    for (int k = 0; k <= d; ++k) {
      of_rank[k] = 0;
#pragma unroll
      for (int i = 0; i <= d; ++i) of_rank[k] = rank[i] == k ? share[i] : of_rank[k];
    }
    weights[p * (d + 1)] = of_rank[d] + (1 - of_rank[0]);
#pragma unroll
    for (int k = 1; k <= d; ++k) weights[p * (d + 1) + k] = of_rank[d - k] - of_rank[d - k + 1];
  }
}

template <int d>
struct Corners {
  int64_t points_per_image;
  const Key* origins;
  const uint8_t* ranks;

  __device__ __forceinline__ int64_t image(int64_t corner) const { return divide(divide(corner, d + 1), points_per_image); }
  __device__ __forceinline__ Key key(int64_t corner) const {
    const int64_t point = divide(corner, d + 1);
    const int remainder = static_cast<int>(corner - point * (d + 1));
    Key key = origins[point];
#pragma unroll
    for (int i = 0; i < d; ++i) add(key, i, remainder - (ranks[point * (d + 1) + i] > d - remainder ? d + 1 : 0));
    return key;
  }
  __device__ __forceinline__ bool same(const Key& key, int64_t image_of_key, int64_t corner) const {
    const Key other = this->key(corner);
    return other.low == key.low && other.high == key.high && image(corner) == image_of_key;
  }
};

__global__ void __launch_bounds__(threads) fill(const int64_t count, const int32_t value, int32_t* __restrict__ to) {
  for (int64_t i = first_index(); i < count; i += index_step()) to[i] = value;
}

// Of 2^(64 - shift) slots at most half are taken. Each corner claims a slot or joins the corners of its vertex there; the smallest stays.
template <int d>
__global__ void __launch_bounds__(threads)
    insert(const int64_t corners, const Corners<d> all, const int shift, int32_t* slots, int32_t* __restrict__ slot_of) {
  const uint64_t mask = (~uint64_t{0}) >> shift;
  for (int64_t corner = first_index(); corner < corners; corner += index_step()) {
    const Key key = all.key(corner);
    const int64_t image = all.image(corner);
    uint64_t slot = hash_of(key, image) >> shift;
    while (true) {
      const int32_t seen = atomicCAS(slots + slot, nobody, static_cast<int32_t>(corner));
      if (seen == nobody) break;
      if (all.same(key, image, seen)) {
        atomicMin(slots + slot, static_cast<int32_t>(corner));
        break;
      }
      slot = (slot + 1) & mask;
    }
    slot_of[corner] = static_cast<int32_t>(slot);
  }
}

__global__ void __launch_bounds__(threads)
    mark_first(const int64_t corners, const int32_t* __restrict__ slots, const int32_t* __restrict__ slot_of,
               int32_t* __restrict__ first) {
  for (int64_t corner = first_index(); corner < corners; corner += index_step())
    first[corner] = slots[static_cast<uint32_t>(slot_of[corner])] == corner;
}

// number: of the first corner of each vertex, exclusive sums of mark_first.
__global__ void __launch_bounds__(threads)
    number_corners(const int64_t corners, const int32_t* __restrict__ slots, const int32_t* __restrict__ slot_of,
                   const int32_t* __restrict__ number, int32_t* __restrict__ vertices) {
  for (int64_t corner = first_index(); corner < corners; corner += index_step())
    vertices[corner] = number[slots[static_cast<uint32_t>(slot_of[corner])]];
}

__global__ void __launch_bounds__(threads)
    name_vertices(const int64_t corners, const int32_t* __restrict__ slots, const int32_t* __restrict__ slot_of,
                  const int32_t* __restrict__ vertices, int32_t* __restrict__ first_corner) {
  for (int64_t corner = first_index(); corner < corners; corner += index_step())
    if (slots[static_cast<uint32_t>(slot_of[corner])] == corner) first_corner[vertices[corner]] = static_cast<int32_t>(corner);
}

// One side of one axis of a vertex at a time.
template <int d>
__global__ void __launch_bounds__(threads)
    connect(const int64_t count, const Corners<d> all, const int shift, const int32_t* __restrict__ slots,
            const int32_t* __restrict__ vertices, const int32_t* __restrict__ first_corner, int32_t* __restrict__ neighbours) {
  const uint64_t mask = (~uint64_t{0}) >> shift;
  for (int64_t i = first_index(); i < 2 * (d + 1) * count; i += index_step()) {
    const int64_t entry = divide(i, 2), axis = divide(entry, count), vertex = entry - axis * count;
    const int sign = i == 2 * entry ? 1 : -1;
    Key key = all.key(first_corner[vertex]);
    const int64_t image = all.image(first_corner[vertex]);
#pragma unroll
    for (int k = 0; k < d; ++k) add(key, k, sign * (k == axis ? d : -1));
    uint64_t slot = hash_of(key, image) >> shift;
    int32_t found = static_cast<int32_t>(count);
    for (int32_t corner = slots[slot]; corner != nobody; slot = (slot + 1) & mask, corner = slots[slot])
      if (all.same(key, image, corner)) {
        found = vertices[corner];
        break;
      }
    neighbours[i] = found;
  }
}

// A stable sort by one digit of the vertex: how often each digit occurs in each tile, digits first; a scan makes that the place of
// the first of them. corner: null at the first digit, where the order is that of the corners.
__device__ __forceinline__ int digit_of(const int32_t* vertices, const int32_t* corner, int64_t i, int shift) {
  return vertices[corner ? corner[i] : i] >> shift & (digits - 1);
}

struct CountShared {
  int digit[threads];
};

__global__ void __launch_bounds__(threads)
    count_digits(const int64_t corners, const int shift, const int32_t* __restrict__ vertices, const int32_t* __restrict__ corner,
                 int32_t* __restrict__ counts) {
  static_assert(digits == threads);  // a thread counts one digit
  ATROUS_SHARED(CountShared, shared);
  const int64_t tiles = divide(corners + sort_tile - 1, sort_tile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int32_t count = 0;
    for (int64_t from = tile * sort_tile; from < (tile + 1) * sort_tile && from < corners; from += threads) {
      const int64_t i = from + threadIdx.x;
      shared.digit[threadIdx.x] = i < corners ? digit_of(vertices, corner, i, shift) : -1;
      __syncthreads();
      for (int j = 0; j < threads; ++j) count += shared.digit[j] == static_cast<int>(threadIdx.x);
      __syncthreads();
    }
    counts[threadIdx.x * tiles + tile] = count;
  }
}

struct PlaceShared {
  int digit[threads];
  int32_t next[digits];
};

__global__ void __launch_bounds__(threads)
    move_corners(const int64_t corners, const int shift, const int32_t* __restrict__ vertices, const int32_t* __restrict__ corner,
                 const int32_t* __restrict__ places, int32_t* __restrict__ sorted) {
  ATROUS_SHARED(PlaceShared, shared);
  const int64_t tiles = divide(corners + sort_tile - 1, sort_tile);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    shared.next[thread] = places[thread * tiles + tile];
    for (int64_t from = tile * sort_tile; from < (tile + 1) * sort_tile && from < corners; from += threads) {
      const int64_t i = from + thread;
      const int mine = i < corners ? digit_of(vertices, corner, i, shift) : -1;
      shared.digit[thread] = mine;
      __syncthreads();
      int before = 0, after = 0;
      for (int j = 0; j < threads; ++j) {
        const int equal = shared.digit[j] == mine;
        before += j < thread ? equal : 0;
        after += j > thread ? equal : 0;
      }
      if (mine >= 0) sorted[shared.next[mine] + before] = corner ? corner[i] : static_cast<int32_t>(i);
      __syncthreads();
      if (mine >= 0 && after == 0) shared.next[mine] += before + 1;
      __syncthreads();
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(threads)
    list_corners(const int64_t corners, const int64_t per_point, const int64_t count, const int32_t* __restrict__ vertices,
                 const int32_t* __restrict__ sorted, const T* __restrict__ weights, int64_t* __restrict__ begin,
                 int32_t* __restrict__ points, T* __restrict__ point_weights) {
  for (int64_t i = first_index(); i < corners; i += index_step()) {
    const int32_t corner = sorted[i], vertex = vertices[corner];
    points[i] = static_cast<int32_t>(divide(corner, per_point));
    point_weights[i] = weights[corner];
    if (i == 0 || vertices[sorted[i - 1]] != vertex) begin[vertex] = i;
    if (i == 0) begin[count] = corners;
  }
}

// The host -------------------------------------------------------------------------------------------------------------

int64_t slots_for(int64_t corners) {
  int64_t slots = 64;
  while (slots < 2 * corners) slots *= 2;
  return slots;
}

int shift_for(int64_t slots) {
  int shift = 64;
  for (; slots > 1; slots /= 2) --shift;
  return shift;
}

int64_t aligned(int64_t bytes) { return ceil_divide(bytes, 16) * 16; }

// The parts of the workspaces; with a null base, their sizes.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* const part = reinterpret_cast<T*>(base + used);
    used += aligned(count * static_cast<int64_t>(sizeof(T)));
    return part;
  }
};

struct Table {
  Key* origins;
  int32_t *slots, *slot_of, *number, *tile_sums;
  int64_t size, bytes;
  int shift;

  Table(const LatticeShape& shape, const void* workspace) {
    Workspace parts{const_cast<char*>(static_cast<const char*>(workspace))};
    size = slots_for(shape.corners());
    shift = shift_for(size);
    origins = parts.take<Key>(shape.all());
    slots = parts.take<int32_t>(size);
    slot_of = parts.take<int32_t>(shape.corners());
    number = parts.take<int32_t>(shape.corners());
    tile_sums = parts.take<int32_t>(ceil_divide(shape.corners(), scan_tile));
    bytes = parts.used;
  }
};

struct SortArrays {
  int32_t *first_corner, *order, *other_order, *places, *tile_sums;
  int64_t tiles, bytes;

  SortArrays(const LatticeShape& shape, int64_t count, void* workspace) {
    Workspace parts{static_cast<char*>(workspace)};
    tiles = ceil_divide(shape.corners(), sort_tile);
    first_corner = parts.take<int32_t>(count);
    order = parts.take<int32_t>(shape.corners());
    other_order = parts.take<int32_t>(shape.corners());
    places = parts.take<int32_t>(tiles * digits);
    tile_sums = parts.take<int32_t>(ceil_divide(tiles * digits, scan_tile));
    bytes = parts.used;
  }
};

template <typename Use>
void with_dimensions(int64_t dimensions, Use use) {
  switch (dimensions) {
    case 1: return use(std::integral_constant<int, 1>{});
    case 2: return use(std::integral_constant<int, 2>{});
    case 3: return use(std::integral_constant<int, 3>{});
    case 4: return use(std::integral_constant<int, 4>{});
    case 5: return use(std::integral_constant<int, 5>{});
    case 6: return use(std::integral_constant<int, 6>{});
  }
  throw std::runtime_error("permutohedral_lattice: " + std::to_string(dimensions) + " dimensions");
}

template <typename T>
Scales<T> scales_for(int64_t d) {
  Scales<T> scales{};
  for (int64_t i = 0; i < d; ++i) {
    const double root = std::sqrt((static_cast<double>(i) + 2.0) * (static_cast<double>(i) + 1.0));
    scales.of[i] = static_cast<T>(1.0 / root * static_cast<T>(std::sqrt(2.0 / 3.0) * static_cast<double>(d + 1)));
  }
  return scales;
}

template <typename T, int d>
void place_all(const LatticeShape& shape, const void* features, int32_t* vertices, void* weights, uint8_t* ranks,
               int64_t* count, int64_t* bad, const Table& table, void* stream) {
  const int64_t corners = shape.corners();
  const Corners<d> all{shape.points, table.origins, ranks};
  const auto place_kernel = place<T, d>;
  const auto insert_kernel = insert<d>;
  ATROUS_LAUNCH(place_kernel, blocks_for(shape.all()), dim3(threads), 0, stream, shape.all(),
                static_cast<T>(largest_coordinate / coordinate_per_feature), scales_for<T>(d), static_cast<const T*>(features),
                static_cast<T*>(weights), ranks, table.origins, reinterpret_cast<unsigned long long*>(bad));
  ATROUS_LAUNCH(fill, blocks_for(table.size), dim3(threads), 0, stream, table.size, nobody, table.slots);
  ATROUS_LAUNCH(insert_kernel, blocks_for(corners), dim3(threads), 0, stream, corners, all, table.shift, table.slots,
                table.slot_of);
  ATROUS_LAUNCH(mark_first, blocks_for(corners), dim3(threads), 0, stream, corners, table.slots, table.slot_of, table.number);
  scan(corners, table.number, table.tile_sums, count, stream);
  ATROUS_LAUNCH(number_corners, blocks_for(corners), dim3(threads), 0, stream, corners, table.slots, table.slot_of,
                table.number, vertices);
}

}  // namespace

int64_t lattice_workspace(const LatticeShape& shape) { return Table(shape, nullptr).bytes; }

void place_points(const LatticeShape& shape, DType dtype, const void* features, int32_t* vertices, void* weights, uint8_t* ranks,
                  int64_t* count, int64_t* bad, void* workspace, void* stream) {
  const Table table(shape, workspace);
  with_dimensions(shape.dimensions, [&](auto dimensions) {
    constexpr int d = decltype(dimensions)::value;
    const auto run = dtype == DType::float64 ? place_all<double, d> : place_all<float, d>;
    run(shape, features, vertices, weights, ranks, count, bad, table, stream);
  });
}

int64_t lattice_sort_workspace(const LatticeShape& shape, int64_t count) { return SortArrays(shape, count, nullptr).bytes; }

void connect_vertices(const LatticeShape& shape, DType dtype, int64_t count, const int32_t* vertices, const void* weights,
                      const uint8_t* ranks, const void* workspace, int32_t* neighbours, int64_t* begin, int32_t* points,
                      void* point_weights, void* sort_workspace, void* stream) {
  const int64_t corners = shape.corners();
  const Table table(shape, workspace);
  SortArrays sort(shape, count, sort_workspace);
  ATROUS_LAUNCH(name_vertices, blocks_for(corners), dim3(threads), 0, stream, corners, table.slots, table.slot_of, vertices,
                sort.first_corner);
  with_dimensions(shape.dimensions, [&](auto dimensions) {
    constexpr int d = decltype(dimensions)::value;
    const auto kernel = connect<d>;
    const Corners<d> all{shape.points, table.origins, ranks};
    ATROUS_LAUNCH(kernel, blocks_for(2 * (d + 1) * count), dim3(threads), 0, stream, count, all, table.shift, table.slots,
                  vertices, sort.first_corner, neighbours);
  });

  const int32_t* order = nullptr;
  for (int shift = 0; shift == 0 || (shift < 31 && count > int64_t{1} << shift); shift += digit_bits) {
    ATROUS_LAUNCH(count_digits, dim3(grid_blocks(sort.tiles)), dim3(threads), 0, stream, corners, shift, vertices, order,
                  sort.places);
    scan(sort.tiles * digits, sort.places, sort.tile_sums, nullptr, stream);
    ATROUS_LAUNCH(move_corners, dim3(grid_blocks(sort.tiles)), dim3(threads), 0, stream, corners, shift, vertices, order,
                  sort.places, sort.order);
    order = sort.order;
    std::swap(sort.order, sort.other_order);
  }
  const auto list = [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = list_corners<T>;
    ATROUS_LAUNCH(kernel, blocks_for(corners), dim3(threads), 0, stream, corners, shape.dimensions + 1, count, vertices, order,
                  static_cast<const T*>(weights), begin, points, static_cast<T*>(point_weights));
  };
  if (dtype == DType::float64) list(double{});
  else list(float{});
}

}  // namespace atrous::cuda
