#include "permutohedral_filter.h"

#include <algorithm>
#include <vector>

namespace atrous::cpu {
namespace {

int64_t threads_of(int64_t rows, int64_t terms, int64_t channels) {
  return threads_for(2.0 * static_cast<double>(rows * terms) * static_cast<double>(channels));
}

// body(first, last) over the rows of a list of terms, every thread with an equal share of the terms.
template <class Body> void over_terms(const int64_t* begin, int64_t rows, int64_t channels, const Body& body) {
  const int64_t terms = begin[rows], threads = threads_of(1, terms + rows, channels);
  const auto row = [&](int64_t part) {
    return part == threads ? rows : std::lower_bound(begin, begin + rows, terms * part / threads) - begin;
  };
  parallel(threads, threads, [&](int64_t part, int64_t part_end) { body(row(part), row(part_end)); });
}

}  // namespace

template <class T>
VertexValues<T>::VertexValues(const LatticeView<T>& lattice, int64_t channels)
    : lattice_(lattice),
      channels_(channels),
      first_(static_cast<size_t>((lattice.vertices + 1) * channels) * sizeof(T)),
      second_(static_cast<size_t>((lattice.vertices + 1) * channels) * sizeof(T)),
      now_(first_.as<T>()),
      next_(second_.as<T>()) {
  std::fill_n(now_ + lattice.vertices * channels, channels, T{0});
  std::fill_n(next_ + lattice.vertices * channels, channels, T{0});
}

template <class T>
void VertexValues<T>::fill(const T* points, bool reverse, const T* scale, const T* point_scale) {
  const LatticeView<T>& l = lattice_;
  const auto& kernels = permutohedral_kernels<T>();
  over_terms(l.begin, l.vertices, channels_, [&](int64_t first, int64_t last) {
    kernels.weighted({first, last, l.begin, 0, l.corner_points, l.point_weights, point_scale, points, now_, channels_});
  });
  for (int64_t step = 0; step < l.corners; ++step) {
    const int64_t axis = reverse ? l.corners - 1 - step : step;
    parallel(l.vertices, threads_of(l.vertices, 3, channels_), [&](int64_t first, int64_t last) {
      kernels.blur({first, last, l.neighbours + axis * l.vertices * 2, now_, step == l.corners - 1 ? scale : nullptr, next_,
                    channels_});
    });
    std::swap(now_, next_);
  }
}

template <class T> void VertexValues<T>::mix(const T* matrix) {
  parallel(lattice_.vertices, threads_of(lattice_.vertices, channels_, channels_), [&](int64_t first, int64_t last) {
    permutohedral_kernels<T>().mix({first, last, now_, matrix, next_, channels_});
  });
  std::swap(now_, next_);
}

template <class T>
void permutohedral_filter(const LatticeView<T>& l, int64_t channels, const T* values, bool reverse, T* out) {
  VertexValues<T> blurred(l, channels);
  const std::vector<T> scale(channels, l.scale());
  blurred.fill(values, reverse, scale.data());
  parallel(l.points, threads_of(l.points, l.corners, channels), [&](int64_t first, int64_t last) {
    permutohedral_kernels<T>().weighted(
        {first, last, nullptr, l.corners, l.corner_vertices, l.weights, nullptr, blurred.values(), out, channels});
  });
}

template <class T>
void permutohedral_filter_weights(const LatticeView<T>& l, int64_t channels, const T* grad, const T* values, bool reverse,
                                  T* out) {
  VertexValues<T> blurred(l, channels), reversed(l, channels);
  blurred.fill(values, reverse, nullptr);
  reversed.fill(grad, !reverse, nullptr);
  parallel(l.points, threads_of(l.points, 2 * l.corners, channels), [&](int64_t first, int64_t last) {
    permutohedral_kernels<T>().weight_gradient({first, last, l.corners, l.corner_vertices, grad, blurred.values(), values,
                                                reversed.values(), l.scale(), out, channels});
  });
}

#define ATROUS_INSTANTIATE(T)                                                                                     \
  template class VertexValues<T>;                                                                                 \
  template void permutohedral_filter<T>(const LatticeView<T>&, int64_t, const T*, bool, T*);                      \
  template void permutohedral_filter_weights<T>(const LatticeView<T>&, int64_t, const T*, const T*, bool, T*);
ATROUS_INSTANTIATE(float)
ATROUS_INSTANTIATE(double)

}  // namespace atrous::cpu
