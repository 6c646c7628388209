// Making a permutohedral lattice on CUDA, as functions of plain numbers and pointers: no framework types, no CUDA headers.
//
// The lattice is the one that the CPU makes (cpu/permutohedral_lattice.h), bit for bit: vertices have the numbers in which a walk
// over the points, corner by corner, meets them. A failed launch throws std::runtime_error.
#pragma once

#include "tensor.h"

namespace atrous::cuda {

constexpr int most_lattice_dimensions = 6;

struct LatticeShape {
  int64_t images, points;  // points: per image
  int64_t dimensions;      // 1 to most_lattice_dimensions
  int64_t all() const { return images * points; }
  int64_t corners() const { return all() * (dimensions + 1); }  // below 2^31
};

// First half, features [all, dimensions] (float32 or float64) to vertices, weights and ranks [all, dimensions + 1]. The workspace,
// lattice_workspace bytes, 16-byte aligned, is what the second half goes on with. Numbers on the device, which the host has to
// read: count, of the vertices, and bad, lowered to the first feature that is not finite or too large, if any.
int64_t lattice_workspace(const LatticeShape& shape);
void place_points(const LatticeShape& shape, DType dtype, const void* features, int32_t* vertices, void* weights, uint8_t* ranks,
                  int64_t* count, int64_t* bad, void* workspace, void* stream);

// Second half: neighbours [dimensions + 1, count, 2], begin [count + 1], points and point_weights [all * (dimensions + 1)].
// sort_workspace: lattice_sort_workspace bytes.
int64_t lattice_sort_workspace(const LatticeShape& shape, int64_t count);
void connect_vertices(const LatticeShape& shape, DType dtype, int64_t count, const int32_t* vertices, const void* weights,
                      const uint8_t* ranks, const void* workspace, int32_t* neighbours, int64_t* begin, int32_t* points,
                      void* point_weights, void* sort_workspace, void* stream);

}  // namespace atrous::cuda
