#include "permutohedral_lattice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "runtime.h"

namespace atrous::cpu {
namespace {

// The coordinates of a vertex but the last (they add up to zero), then its image; unused entries are zero.
struct alignas(32) Key {
  int32_t at[8] = {};
  bool operator==(const Key& other) const { return std::memcmp(at, other.at, sizeof at) == 0; }
};

uint64_t hash_of(const Key& key) {
  uint64_t words[4];
  std::memcpy(words, key.at, sizeof words);
  uint64_t h = 0;
  for (const uint64_t word : words) {
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
  }
  return h;
}

// Coordinates grow with the square of the dimension, at most about this many times the largest feature.
constexpr double coordinate_per_feature = 16;
// Float keeps three binary digits behind the point up to here, and 32-bit keys have room.
constexpr double largest_coordinate = 1 << 20;

}  // namespace

// Vertices by their keys: open addressing, at most half full.
class LatticeKeys {
 public:
  explicit LatticeKeys(int64_t expected) : slots_(1024, -1) {
    while (static_cast<int64_t>(slots_.size()) < 2 * expected) slots_.resize(2 * slots_.size(), -1);
  }

  int32_t size() const { return static_cast<int32_t>(keys_.size()); }
  const Key& operator[](int64_t vertex) const { return keys_[vertex]; }

  // -1 where there is none.
  int32_t find(const Key& key) const { return slots_[slot_of(key)]; }

  int32_t find_or_add(const Key& key) {
    const size_t slot = slot_of(key);
    if (slots_[slot] >= 0) return slots_[slot];
    const int32_t vertex = size();
    slots_[slot] = vertex;
    keys_.push_back(key);
    if (2 * keys_.size() > slots_.size()) grow();
    return vertex;
  }

 private:
  size_t slot_of(const Key& key) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = hash_of(key) & mask;
    while (slots_[slot] >= 0 && !(keys_[slots_[slot]] == key)) slot = (slot + 1) & mask;
    return slot;
  }

  void grow() {
    slots_.assign(2 * slots_.size(), -1);
    for (int32_t vertex = 0; vertex < size(); ++vertex) slots_[slot_of(keys_[vertex])] = vertex;
  }

  std::vector<Key> keys_;
  std::vector<int32_t> slots_;  // a power of two
};

namespace {

// The simplex around one point: its vertex of remainder 0, and the order of the coordinates.
template <class T, int d> struct Simplex {
  int32_t origin[d + 1];
  uint8_t rank[d + 1];
  bool operator==(const Simplex& other) const {
    return std::memcmp(origin, other.origin, sizeof origin) == 0 && std::memcmp(rank, other.rank, sizeof rank) == 0;
  }
};

template <class T> constexpr T rounder() { return sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52); }

// Coordinates are scaled so that the blur has the width of a unit Gaussian ("Fast High-Dimensional Filtering Using the
// Permutohedral Lattice", section 3.1).
template <class T, int d> struct Elevation {
  T scale[d];
  Elevation() {
    for (int i = 0; i < d; ++i)
      scale[i] = static_cast<T>(1.0 / std::sqrt((i + 2.0) * (i + 1.0)) * static_cast<T>(std::sqrt(2.0 / 3.0) * (d + 1)));
  }

  Simplex<T, d> locate(const T* feature, T* weights) const {
    T elevated[d + 1], sum = 0;
    for (int j = d; j > 0; --j) {
      const T x = feature[j - 1] * scale[j - 1];
      elevated[j] = sum - static_cast<T>(j) * x;
      sum += x;
    }
    elevated[0] = sum;

    // The nearest point whose coordinates are multiples of d + 1; its coordinates may not add up to zero yet.
    Simplex<T, d> simplex;
    constexpr T inverse = T(1) / (d + 1);
    T difference[d + 1];
    int32_t excess = 0;
    for (int i = 0; i <= d; ++i) {
      const T nearest = (elevated[i] * inverse + rounder<T>()) - rounder<T>();
      simplex.origin[i] = static_cast<int32_t>(nearest) * (d + 1);
      excess += static_cast<int32_t>(nearest);
      difference[i] = elevated[i] - nearest * static_cast<T>(d + 1);
    }
    int rank[d + 1] = {};
    for (int i = 0; i < d; ++i)
      for (int j = i + 1; j <= d; ++j) {
        const int smaller = difference[i] < difference[j];
        rank[i] += smaller;
        rank[j] += 1 - smaller;
      }
    for (int i = 0; i <= d; ++i) {
      rank[i] += excess;
      const int shift = rank[i] < 0 ? d + 1 : rank[i] > d ? -(d + 1) : 0;
      rank[i] += shift;
      simplex.origin[i] += shift;
      simplex.rank[i] = static_cast<uint8_t>(rank[i]);
    }

    T barycentric[d + 2] = {};
    for (int i = 0; i <= d; ++i) {
      const T share = (elevated[i] - static_cast<T>(simplex.origin[i])) * inverse;
      barycentric[d - rank[i]] += share;
      barycentric[d - rank[i] + 1] -= share;
    }
    weights[0] = barycentric[0] + (1 + barycentric[d + 1]);
    for (int i = 1; i <= d; ++i) weights[i] = barycentric[i];
    return simplex;
  }
};

template <class T, int d>
void place_range(const LatticePoints& shape, int64_t begin, int64_t end, const T* features, LatticeKeys& keys,
                 int32_t* vertices, T* weights, uint8_t* ranks) {
  const Elevation<T, d> elevation;
  Simplex<T, d> previous{};
  for (int64_t p = begin; p < end; ++p) {
    int32_t* const corners = vertices + p * (d + 1);
    const Simplex<T, d> simplex = elevation.locate(features + p * d, weights + p * (d + 1));
    std::copy_n(simplex.rank, d + 1, ranks + p * (d + 1));
    if (p > begin && p % shape.points != 0 && simplex == previous) {  // neighbours in an image often share their simplex
      std::copy_n(corners - (d + 1), d + 1, corners);
      continue;
    }
    Key key;
    key.at[most_lattice_dimensions] = static_cast<int32_t>(p / shape.points);
    for (int remainder = 0; remainder <= d; ++remainder) {
      for (int i = 0; i < d; ++i)
        key.at[i] = simplex.origin[i] + remainder - (simplex.rank[i] > d - remainder ? d + 1 : 0);
      corners[remainder] = keys.find_or_add(key);
    }
    previous = simplex;
  }
}

template <class T>
void place_any(const LatticePoints& shape, int64_t begin, int64_t end, const T* features, LatticeKeys& keys,
               int32_t* vertices, T* weights, uint8_t* ranks) {
  switch (shape.dimensions) {
    case 1: return place_range<T, 1>(shape, begin, end, features, keys, vertices, weights, ranks);
    case 2: return place_range<T, 2>(shape, begin, end, features, keys, vertices, weights, ranks);
    case 3: return place_range<T, 3>(shape, begin, end, features, keys, vertices, weights, ranks);
    case 4: return place_range<T, 4>(shape, begin, end, features, keys, vertices, weights, ranks);
    case 5: return place_range<T, 5>(shape, begin, end, features, keys, vertices, weights, ranks);
    default: return place_range<T, 6>(shape, begin, end, features, keys, vertices, weights, ranks);
  }
}

int64_t chunk_begin(int64_t chunk, int64_t chunks, int64_t count) { return chunk * count / chunks; }

template <class T> void check_features(const LatticePoints& shape, const T* features, int64_t threads) {
  const int64_t d = shape.dimensions, count = shape.all() * d;
  const T most = static_cast<T>(largest_coordinate / coordinate_per_feature);
  std::vector<char> good(threads, 1);
  parallel(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      bool all_good = true;
      for (int64_t i = chunk_begin(t, threads, count); i < chunk_begin(t + 1, threads, count); ++i)
        all_good &= std::abs(features[i]) <= most;  // false of a NaN
      good[t] = all_good;
    }
  });
  if (std::find(good.begin(), good.end(), 0) == good.end()) return;
  const T* const bad = std::find_if(features, features + count, [&](T x) { return !(std::abs(x) <= most); });
  std::ostringstream message;
  message << "features: expected finite values of at most " << most << " (in units of the filter's width), but point "
          << (bad - features) / d << " has " << *bad;
  throw std::runtime_error(message.str());
}

}  // namespace

template <class T> LatticeBuilder<T>::LatticeBuilder(const LatticePoints& shape) : shape_(shape) {}
template <class T> LatticeBuilder<T>::~LatticeBuilder() = default;

template <class T> int64_t LatticeBuilder<T>::place(const T* features, int32_t* vertices, T* weights, uint8_t* ranks) {
  const int64_t all = shape_.all(), corners = shape_.dimensions + 1;
  const int64_t chunks = threads_for(100.0 * static_cast<double>(all));
  check_features(shape_, features, chunks);
  // Every chunk numbers its own vertices as it meets them; in the order of the chunks, that is the order of one walk.
  std::vector<std::unique_ptr<LatticeKeys>> own(chunks);
  parallel(chunks, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      own[c] = std::make_unique<LatticeKeys>(1024);
      place_any(shape_, chunk_begin(c, chunks, all), chunk_begin(c + 1, chunks, all), features, *own[c], vertices, weights,
                ranks);
    }
  });
  std::vector<std::vector<int32_t>> renumbered(chunks);
  for (int64_t c = 1; c < chunks; ++c)
    for (int32_t vertex = 0; vertex < own[c]->size(); ++vertex)
      renumbered[c].push_back(own[0]->find_or_add((*own[c])[vertex]));
  parallel(chunks, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t c = std::max<int64_t>(begin, 1); c < end; ++c)
      for (int64_t i = chunk_begin(c, chunks, all) * corners; i < chunk_begin(c + 1, chunks, all) * corners; ++i)
        vertices[i] = renumbered[c][vertices[i]];
  });
  keys_ = std::move(own[0]);
  return keys_->size();
}

template <class T> void LatticeBuilder<T>::connect(int32_t* neighbours) const {
  const int64_t count = keys_->size(), d = shape_.dimensions;
  const int32_t none = static_cast<int32_t>(count);
  std::fill_n(neighbours, 2 * (d + 1) * count, none);
  parallel((d + 1) * count, threads_for(100.0 * static_cast<double>((d + 1) * count)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t axis = task / count, vertex = task % count;
      Key key = (*keys_)[vertex];
      for (int64_t i = 0; i < d; ++i) key.at[i] += i == axis ? static_cast<int32_t>(d) : -1;
      const int32_t other = keys_->find(key);
      if (other < 0) continue;
      // Whose other side this is: no two vertices write the same entry.
      neighbours[2 * task] = other;
      neighbours[2 * (axis * count + other) + 1] = static_cast<int32_t>(vertex);
    }
  });
}

template <class T>
void LatticeBuilder<T>::sort(const int32_t* vertices, const T* weights, int64_t* begin, int32_t* points,
                             T* point_weights) const {
  const int64_t all = shape_.all(), corners = shape_.dimensions + 1, count = keys_->size();
  const int64_t chunks = threads_for(10.0 * static_cast<double>(all * corners));
  std::vector<std::vector<int64_t>> next(chunks);  // per chunk and vertex, first the count, then where the next corner goes
  parallel(chunks, chunks, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      next[c].assign(count, 0);
      for (int64_t i = chunk_begin(c, chunks, all) * corners; i < chunk_begin(c + 1, chunks, all) * corners; ++i)
        ++next[c][vertices[i]];
    }
  });
  int64_t at = 0;
  for (int64_t vertex = 0; vertex < count; ++vertex) {
    begin[vertex] = at;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t size = next[c][vertex];
      next[c][vertex] = at;
      at += size;
    }
  }
  begin[count] = at;
  parallel(chunks, chunks, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      for (int64_t p = chunk_begin(c, chunks, all); p < chunk_begin(c + 1, chunks, all); ++p)
        for (int64_t i = p * corners; i < (p + 1) * corners; ++i) {
          const int64_t to = next[c][vertices[i]]++;
          points[to] = static_cast<int32_t>(p);
          point_weights[to] = weights[i];
        }
  });
}

template class LatticeBuilder<float>;
template class LatticeBuilder<double>;

}  // namespace atrous::cpu
