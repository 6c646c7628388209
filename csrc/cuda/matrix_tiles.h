// One tile of a matrix product on the tensor cores: slices of both factors travel through shared memory in several stages of
// asynchronous copies, a barrier apart; warps multiply what has arrived and keep their part of the sum in registers.
//
// What a slice contains is the kernel's business: it copies 16-byte vectors to the places that Factor names. Either factor
// may lie with the summed dimension innermost or with the tile's own.
#pragma once

#include "lanes.h"
#include "tensor_core.h"

namespace atrous::cuda {

constexpr int stages = 4;
constexpr int slice_bytes = 64;  // of the summed dimension in one stage: two steps of the matrix instruction
template <typename T>
constexpr int slice_depth = slice_bytes / static_cast<int>(sizeof(T));

// A tile of `rows` x `columns`, of which a warp has warp_rows x warp_columns. So many `blocks` fit on a multiprocessor: what
// bounds their registers.
template <int rows_, int columns_, int warp_rows_, int warp_columns_, int blocks_>
struct TileShape {
  static constexpr int rows = rows_, columns = columns_, warp_rows = warp_rows_, warp_columns = warp_columns_;
  static constexpr int blocks = blocks_;
  static constexpr int warps_across = columns / warp_columns;
  static constexpr int threads = rows / warp_rows * warps_across * 32;
  static_assert(warp_rows % 32 == 0 && warp_columns % 32 == 0);
};
using WideTile = TileShape<128, 128, 64, 64, 2>;
using SmallTile = TileShape<64, 64, 32, 32, 3>;

// Where vector `vector` of `row` lies in an array of rows of `vectors` 16-byte vectors, of elements of `element` bytes.
//
// Vectors change places within their row, so that threads that access shared memory together meet different banks: the eight
// rows of a matrix of ldmatrix, and of 32-bit elements in longer rows the 4 rows and 8 columns that a warp reads of a factor.
template <int vectors, int element>
__host__ __device__ constexpr int vector_offset(int row, int vector) {
  static_assert(vectors == 4 || vectors % 8 == 0);
  const int swap = vectors == 4 ? row / 2 % 4 : element == 2 ? row % 8 : 2 * (row % 4);
  return (row * vectors + (vector ^ swap)) * 16;
}

// The part of one factor in one stage: `extent` of the tile's rows or columns by slice_depth of the summed dimension, stored
// [extent, depth] where depth_inner, else [depth, extent].
template <typename T, int extent, bool depth_inner, int threads>
struct Factor {
  static constexpr int width = vector_width<T>;
  static constexpr int vectors = (depth_inner ? slice_depth<T> : extent) / width;  // in a row
  static constexpr int bytes = extent * slice_bytes;
  static constexpr int passes = bytes / 16 / threads;  // vectors that one thread copies
  static constexpr int rows_per_pass = threads / vectors;
  static_assert(passes >= 1 && bytes % (16 * threads) == 0 && threads % vectors == 0);

  // The vector that a thread copies in one pass: its row and first element of the row, and both in the factor's terms.
  __device__ static int row(int thread, int pass) { return thread / vectors + pass * rows_per_pass; }
  __device__ static int element(int thread) { return thread % vectors * width; }
  __device__ static int depth(int thread, int pass) { return depth_inner ? element(thread) : row(thread, pass); }
  __device__ static int along(int thread, int pass) { return depth_inner ? row(thread, pass) : element(thread); }
  __device__ static unsigned char* place(unsigned char* stage, int thread, int pass) {
    return stage + vector_offset<vectors, sizeof(T)>(row(thread, pass), thread % vectors);
  }

  // Piece `piece` of 16 of the rows or columns from `first`, a multiple of 32, and 32 bytes of depth, as the instruction takes
  // them of its first factor.
  __device__ static void load(const unsigned char* stage, int first, int piece, int step, int lane, uint32_t (&f)[4]) {
    const int from = first + 16 * piece;
    if constexpr (depth_inner) {
      load_matrices<false>(f, stage + vector_offset<vectors, sizeof(T)>(from + lane % 16, 2 * step + lane / 16));
    } else if constexpr (sizeof(T) == 2) {
      const int k = 16 * step + lane / 16 * 8 + lane % 8;
      load_matrices<true>(f, stage + vector_offset<vectors, sizeof(T)>(k, from / width + lane / 8 % 2));
    } else {
      // ldmatrix transposes 16-bit elements only. What the loop adds to the address is known to the compiler, so few registers
      // hold addresses: 8 vectors, within which vectors change places, are 32 elements.
      const int group = lane / 4, k = 8 * step + lane % 4;
      const unsigned char* const vectors_of_piece = stage + (first / width + piece / 2 * 8) * 16 + group % 4 * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int offset = vector_offset<vectors, sizeof(T)>(k + i / 2 * 4, group / 4 + piece % 2 * 4 + i % 2 * 2);
        f[i] = *reinterpret_cast<const uint32_t*>(vectors_of_piece + offset);
      }
    }
    if constexpr (sizeof(T) == 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) f[i] = round_to_tf32(f[i]);
  }
};

constexpr int64_t nowhere = INT64_MIN;  // offset of a row that does not exist

template <typename T, typename Tile, bool a_depth_inner, bool b_depth_inner>
struct TileProduct {
  using A = Factor<T, Tile::rows, a_depth_inner, Tile::threads>;
  using B = Factor<T, Tile::columns, b_depth_inner, Tile::threads>;
  static constexpr int stage_bytes = A::bytes + B::bytes;
  static constexpr int shared_bytes = stages * stage_bytes;
  static constexpr int pieces_down = Tile::warp_rows / 16, pieces_across = Tile::warp_columns / 16;

  float sum[pieces_down][2 * pieces_across][4];

  // The first row and column of the tile that the warp of a thread sums up.
  __device__ static int warp_row(int thread) { return thread / 32 / Tile::warps_across * Tile::warp_rows; }
  __device__ static int warp_column(int thread) { return thread / 32 % Tile::warps_across * Tile::warp_columns; }

  // Sums start at value(column).
  template <typename Value>
  __device__ __forceinline__ void start(int thread, Value value) {
#pragma unroll
    for (int j = 0; j < 2 * pieces_across; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float first = value(warp_column(thread) + 8 * j + thread % 4 * 2 + e);
#pragma unroll
        for (int i = 0; i < pieces_down; ++i) sum[i][j][e] = sum[i][j][e + 2] = first;
      }
  }

  __device__ __forceinline__ void multiply(const unsigned char* a_stage, const unsigned char* b_stage, int thread) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[pieces_down][4], b[pieces_across][4];
#pragma unroll
      for (int i = 0; i < pieces_down; ++i) A::load(a_stage, warp_row(thread), i, step, thread % 32, a[i]);
#pragma unroll
      for (int j = 0; j < pieces_across; ++j) B::load(b_stage, warp_column(thread), j, step, thread % 32, b[j]);
#pragma unroll
      for (int i = 0; i < pieces_down; ++i)
#pragma unroll
        for (int j = 0; j < pieces_across; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t columns[2] = {b[j][half], b[j][half + 2]};
            multiply_add<T>(sum[i][2 * j + half], a[i], columns);
          }
    }
  }

  // Adds up `slices` slices. copy_slice(a, b) starts the calling thread's copies of the next one. All shared memory is free
  // again afterwards.
  template <typename CopySlice>
  __device__ __forceinline__ void run(unsigned char* shared, int slices, int thread, CopySlice copy_slice) {
    int next = 0, current = 0, copied = 0;
    const auto copy_next = [&] {
      if (copied < slices) copy_slice(shared + next * stage_bytes, shared + next * stage_bytes + A::bytes);
      commit_copies();  // also where there is nothing to copy: waiting counts groups
      ++copied;
      next = next + 1 == stages ? 0 : next + 1;
    };
#pragma unroll
    for (int i = 0; i < stages - 1; ++i) copy_next();
    for (int slice = 0; slice < slices; ++slice) {
      wait_for_copies<stages - 2>();
      __syncthreads();  // everybody's copies are here, and nobody reads the stage that is overwritten next
      copy_next();
      multiply(shared + current * stage_bytes, shared + current * stage_bytes + A::bytes, thread);
      current = current + 1 == stages ? 0 : current + 1;
    }
    wait_for_copies<0>();
    __syncthreads();
  }

  // Puts the sums into shared memory as rows of Out.
  template <typename Out>
  __device__ __forceinline__ void stage_result(unsigned char* shared, int thread) const {
    constexpr int width = vector_width<Out>;
    static_assert(Tile::rows * Tile::columns * sizeof(Out) <= shared_bytes);
#pragma unroll
    for (int j = 0; j < 2 * pieces_across; ++j) {
      const int column = warp_column(thread) + 8 * j + thread % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2 * pieces_down; ++i) {
        const int row = warp_row(thread) + 8 * i + thread % 32 / 4;
        const float* const of_row = &sum[i / 2][j][i % 2 * 2];
        unsigned char* const at = shared + vector_offset<Tile::columns / width, sizeof(Out)>(row, column / width);
        *reinterpret_cast<Vector<Out, 2>*>(at + column % width * sizeof(Out)) = {
            {narrow<Out>(of_row[0]), narrow<Out>(of_row[1])}};
      }
    }
    __syncthreads();
  }

  // Writes the staged rows to out + offset(row), the first `columns` elements of each, column_stride apart.
  template <typename Out, typename Offset>
  __device__ __forceinline__ static void store_result(const unsigned char* shared, int thread, Out* out, int columns,
                                                      int64_t column_stride, bool whole_vectors, Offset offset) {
    constexpr int width = vector_width<Out>, vectors = Tile::columns / width;
    for (int e = thread; e < Tile::rows * vectors; e += Tile::threads) {
      const int row = e / vectors, column = e % vectors * width;
      const int64_t first = offset(row);
      if (first == nowhere || column >= columns) continue;
      const auto values =
          *reinterpret_cast<const Vector<Out, width>*>(shared + vector_offset<vectors, sizeof(Out)>(row, e % vectors));
      if (whole_vectors) {
        *reinterpret_cast<Vector<Out, width>*>(out + first + column) = values;
        continue;
      }
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (column + i < columns) out[first + (column + i) * column_stride] = values.value[i];
    }
  }
};

}  // namespace atrous::cuda
