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

// The coordinates of a vertex but the last (they add up to zero), three to a number in steps of 2^21, and its image. What is added
// to coordinates can be added to the numbers: below `largest_coordinate` no two vertices share them.
struct Key {
  uint64_t low = 0, high = 0;
  int64_t image = 0;
  bool operator==(const Key& other) const { return low == other.low && high == other.high && image == other.image; }
  void add(int coordinate, int64_t value) {
    (coordinate < 3 ? low : high) += static_cast<uint64_t>(value) << 21 * (coordinate % 3);
  }
  Key moved(const Key& by) const { return {low + by.low, high + by.high, image}; }
};

uint64_t hash_of(const Key& key) {
  const uint64_t h = key.low * 0x9e3779b97f4a7c15u + key.high * 0xc2b2ae3d27d4eb4fu +
                     static_cast<uint64_t>(key.image) * 0x165667b19e3779f9u;
  return (h ^ h >> 32) * 0xd6e8feb86659fd93u;
}

// The way to the next corner of a simplex: every coordinate one up, but coordinate `down` (d: the last) d less.
Key step_of(int64_t d, int64_t down) {
  Key step;
  for (int i = 0; i < d; ++i) step.add(i, i == down ? -d : 1);
  return step;
}

// Coordinates grow with the square of the dimension, at most about this many times the largest feature.
constexpr double coordinate_per_feature = 16;
// Float keeps three binary digits behind the point up to here, and 32-bit keys have room.
constexpr double largest_coordinate = 1 << 20;

}  // namespace

// Vertices by their keys: open addressing, at most half full. Callers that look up many keys prefetch the slots of some first.
class LatticeKeys {
 public:
  LatticeKeys() : slots_(1024) {}

  int32_t size() const { return static_cast<int32_t>(keys_.size()); }
  const Key& operator[](int64_t vertex) const { return keys_[vertex]; }
  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash >> shift_]); }

  // -1 where there is none.
  int32_t find(const Key& key, uint64_t hash) const { return slots_[slot_of(key, hash)].vertex; }

  int32_t find_or_add(const Key& key, uint64_t hash) {
    Slot& slot = slots_[slot_of(key, hash)];
    if (slot.vertex >= 0) return slot.vertex;
    const int32_t vertex = size();
    slot = {static_cast<uint32_t>(hash), vertex};
    keys_.push_back(key);
    if (2 * keys_.size() > slots_.size()) grow();
    return vertex;
  }

 private:
  struct Slot {
    uint32_t tag = 0;  // of the hash: other keys rarely need to be read
    int32_t vertex = -1;
  };

  size_t slot_of(const Key& key, uint64_t hash) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = hash >> shift_;
    while (slots_[slot].vertex >= 0 && !(slots_[slot].tag == static_cast<uint32_t>(hash) && keys_[slots_[slot].vertex] == key))
      slot = (slot + 1) & mask;
    return slot;
  }

  void grow() {
    slots_.assign(4 * slots_.size(), {});
    shift_ -= 2;
    for (int32_t vertex = 0; vertex < size(); ++vertex) {
      const uint64_t hash = hash_of(keys_[vertex]);
      slots_[slot_of(keys_[vertex], hash)] = {static_cast<uint32_t>(hash), vertex};
    }
  }

  std::vector<Key> keys_;
  std::vector<Slot> slots_;  // a power of two
  int shift_ = 54;           // 64 less its logarithm
};

namespace {

// The simplex around one point: its vertex of remainder 0, and the rank of each coordinate.
template <int d> struct Simplex {
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

  Simplex<d> locate(const T* feature, T* weights) const {
    T elevated[d + 1], sum = 0;
    for (int j = d; j > 0; --j) {
      const T x = feature[j - 1] * scale[j - 1];
      elevated[j] = sum - static_cast<T>(j) * x;
      sum += x;
    }
    elevated[0] = sum;

    // The nearest point whose coordinates are multiples of d + 1; its coordinates may not add up to zero yet.
    Simplex<d> simplex;
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

constexpr int64_t points_at_once = 32, keys_ahead = 16;

template <class T, int d>
void place_range(const LatticePoints& shape, int64_t begin, int64_t end, const T* features, LatticeKeys& keys,
                 int32_t* vertices, T* weights, uint8_t* ranks) {
  const Elevation<T, d> elevation;
  Key steps[d + 1];
  for (int i = 0; i <= d; ++i) steps[i] = step_of(d, i);
  Key wanted[points_at_once * (d + 1)];
  uint64_t hashes[points_at_once * (d + 1)];
  Simplex<d> previous{};
  for (int64_t from = begin; from < end; from += points_at_once) {
    const int64_t to = std::min(from + points_at_once, end);
    uint32_t repeated = 0;  // neighbours in an image often share their simplex
    int64_t image = from / shape.points, count = 0;
    for (int64_t p = from; p < to; ++p) {
      const Simplex<d> simplex = elevation.locate(features + p * d, weights + p * (d + 1));
      std::copy_n(simplex.rank, d + 1, ranks + p * (d + 1));
      if (p == (image + 1) * shape.points) ++image;
      if (p > begin && p > image * shape.points && simplex == previous) {
        repeated |= uint32_t{1} << (p - from);
        continue;
      }
      previous = simplex;
      int at[d + 1];
      Key key;
      key.image = image;
      for (int i = 0; i <= d; ++i) at[simplex.rank[i]] = i;
      for (int i = 0; i < d; ++i) key.add(i, simplex.origin[i]);
      for (int corner = 0; corner <= d; ++corner, ++count) {
        if (corner > 0) key = key.moved(steps[at[d + 1 - corner]]);
        wanted[count] = key;
        hashes[count] = hash_of(key);
        keys.prefetch(hashes[count]);
      }
    }
    count = 0;
    for (int64_t p = from; p < to; ++p) {
      int32_t* const corners = vertices + p * (d + 1);
      if (repeated >> (p - from) & 1) std::copy_n(corners - (d + 1), d + 1, corners);
      else
        for (int corner = 0; corner <= d; ++corner, ++count) corners[corner] = keys.find_or_add(wanted[count], hashes[count]);
    }
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
      own[c] = std::make_unique<LatticeKeys>();
      place_any(shape_, chunk_begin(c, chunks, all), chunk_begin(c + 1, chunks, all), features, *own[c], vertices, weights,
                ranks);
    }
  });
  std::vector<std::vector<int32_t>> renumbered(chunks);
  for (int64_t c = 1; c < chunks; ++c) {
    const LatticeKeys& others = *own[c];
    renumbered[c].reserve(others.size());
    for (int32_t vertex = 0; vertex < others.size(); ++vertex) {
      if (vertex + keys_ahead < others.size()) own[0]->prefetch(hash_of(others[vertex + keys_ahead]));
      renumbered[c].push_back(own[0]->find_or_add(others[vertex], hash_of(others[vertex])));
    }
  }
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
  Key steps[most_lattice_dimensions + 1];
  for (int64_t axis = 0; axis <= d; ++axis) {
    const Key down = step_of(d, axis);  // against the step of a simplex
    steps[axis] = {-down.low, -down.high, 0};
  }
  parallel(count, threads_for(100.0 * static_cast<double>((d + 1) * count)), [&](int64_t begin, int64_t end) {
    Key wanted[keys_ahead * (most_lattice_dimensions + 1)];
    uint64_t hashes[keys_ahead * (most_lattice_dimensions + 1)];
    for (int64_t from = begin; from < end; from += keys_ahead) {
      const int64_t to = std::min(from + keys_ahead, end);
      int64_t i = 0;
      for (int64_t vertex = from; vertex < to; ++vertex)
        for (int64_t axis = 0; axis <= d; ++axis, ++i) {
          wanted[i] = (*keys_)[vertex].moved(steps[axis]);
          hashes[i] = hash_of(wanted[i]);
          keys_->prefetch(hashes[i]);
        }
      i = 0;
      for (int64_t vertex = from; vertex < to; ++vertex)
        for (int64_t axis = 0; axis <= d; ++axis, ++i) {
          const int32_t other = keys_->find(wanted[i], hashes[i]);
          if (other < 0) continue;
          // Whose other side this is: no two vertices write the same entry.
          neighbours[2 * (axis * count + vertex)] = other;
          neighbours[2 * (axis * count + other) + 1] = static_cast<int32_t>(vertex);
        }
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
