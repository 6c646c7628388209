// Where points lie in the permutohedral lattice (Adams, Baek and Davis 2010): no framework types.
//
// The same features give the same lattice for any number of threads: vertices are numbered in the order in which a walk over the
// points, corner by corner, meets them.
#pragma once

#include <cstdint>
#include <memory>

namespace atrous::cpu {

constexpr int most_lattice_dimensions = 6;

struct LatticePoints {
  int64_t images, points;  // points: per image
  int64_t dimensions;      // 1 to most_lattice_dimensions
  int64_t all() const { return images * points; }
};

class LatticeKeys;

// T: float or double. Arrays are contiguous; corners = dimensions + 1.
template <class T> class LatticeBuilder {
 public:
  explicit LatticeBuilder(const LatticePoints& shape);
  ~LatticeBuilder();

  // From features [all, dimensions], the vertex and the weight of every corner and the rank of every coordinate: [all, corners].
  // Throws std::runtime_error for a feature that is not finite or too large. Returns the number of vertices.
  int64_t place(const T* features, int32_t* vertices, T* weights, uint8_t* ranks);

  // neighbours [corners, vertices, 2]: per axis the vertices on both sides, the number of vertices where there is none.
  void connect(int32_t* neighbours) const;

  // The corners sorted by vertex, then by point: begin [vertices + 1], points and point_weights [all * corners].
  void sort(const int32_t* vertices, const T* weights, int64_t* begin, int32_t* points, T* point_weights) const;

 private:
  LatticePoints shape_;
  std::unique_ptr<LatticeKeys> keys_;
};

}  // namespace atrous::cpu
