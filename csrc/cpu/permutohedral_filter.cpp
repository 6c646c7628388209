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

LatticeChains::LatticeChains(const int32_t* neighbours, int64_t corners, int64_t vertices)
    : vertices_(vertices), order_(static_cast<size_t>(corners * vertices) * sizeof(int32_t)), count_(corners) {
  parallel(corners, threads_for(20.0 * static_cast<double>(corners * vertices)), [&](int64_t first, int64_t last) {
    for (int64_t axis = first; axis < last; ++axis) {
      const int32_t* const sides = neighbours + axis * vertices * 2;
      int32_t* to = order_.as<int32_t>() + axis * vertices;
      for (int64_t v = 0; v < vertices; ++v) {
        if (sides[2 * v] < vertices || sides[2 * v + 1] == vertices) continue;  // not the first, or alone
        *to++ = ~static_cast<int32_t>(v);
        for (int64_t u = sides[2 * v + 1]; u < vertices; u = sides[2 * u + 1]) *to++ = static_cast<int32_t>(u);
      }
      count_[axis] = to - order(axis);
    }
  });
}

bool LatticeChains::worthwhile(const int32_t* neighbours, int64_t corners, int64_t vertices) {
  constexpr int64_t most = 16;  // vertices per chain
  int64_t chains = 0;
  for (int64_t i = 0; i < corners * vertices; ++i) chains += neighbours[2 * i] == vertices;
  return chains * most >= corners * vertices;
}

template <class T>
VertexValues<T>::VertexValues(const LatticeView<T>& l, int64_t channels, bool repeated)
    : lattice_(l), channels_(channels), first_(static_cast<size_t>((l.vertices + 1) * channels) * sizeof(T)), now_(first_.as<T>()) {
  if (repeated && LatticeChains::worthwhile(l.neighbours, l.corners, l.vertices)) {
    chains_.emplace(l.neighbours, l.corners, l.vertices);
    next_ = nullptr;
  } else {
    next_ = second_.emplace(static_cast<size_t>((l.vertices + 1) * channels) * sizeof(T)).template as<T>();
  }
}

template <class T> int64_t VertexValues<T>::bytes(const LatticeView<T>& l, bool repeated) {
  const bool in_place = repeated && LatticeChains::worthwhile(l.neighbours, l.corners, l.vertices);
  return static_cast<int64_t>(sizeof(T)) * (in_place ? 1 : 2);
}

template <class T>
void VertexValues<T>::fill(const T* points, int64_t stride, int64_t channels, bool reverse, const T* factor,
                           const T* point_scale) {
  const LatticeView<T>& l = lattice_;
  channels_ = channels;
  over_terms(l.begin, l.vertices, channels, [&](int64_t first, int64_t last) {
    permutohedral_kernels<T>().weighted({first, last, l.begin, 0, l.corner_points, l.point_weights, point_scale, points, stride,
                                         factor, now_, channels});
  });
  if (second_)
    for (T* rows : {now_, next_}) std::fill_n(rows + l.vertices * channels, channels, T{0});
  for (int64_t step = 0; step < l.corners; ++step) blur(reverse ? l.corners - 1 - step : step);
}

template <class T> void VertexValues<T>::blur(int64_t axis) {
  const LatticeView<T>& l = lattice_;
  const auto& kernels = permutohedral_kernels<T>();
  if (!chains_) {
    parallel(l.vertices, threads_of(l.vertices, 3, channels_), [&](int64_t first, int64_t last) {
      kernels.blur({first, last, l.neighbours + axis * l.vertices * 2, now_, next_, channels_});
    });
    std::swap(now_, next_);
    return;
  }
  const int32_t* const order = chains_->order(axis);
  const int64_t count = chains_->count(axis), threads = threads_of(count, 3, channels_);
  const auto begin_of = [&](int64_t part) {
    int64_t i = count * part / threads;
    while (i < count && order[i] >= 0) ++i;
    return i;
  };
  parallel(threads, threads, [&](int64_t part, int64_t part_end) {
    const int64_t first = begin_of(part);
    kernels.blur_chains({order + first, begin_of(part_end) - first, now_, channels_});
  });
}

template <class T> void VertexValues<T>::mix(const T* matrix) {
  parallel(lattice_.vertices, threads_of(lattice_.vertices, channels_, channels_), [&](int64_t first, int64_t last) {
    Scratch row(static_cast<size_t>(channels_) * sizeof(T));
    permutohedral_kernels<T>().mix({first, last, now_, matrix, row.as<T>(), channels_});
  });
}

template <class T>
void permutohedral_filter(const LatticeView<T>& l, int64_t channels, const T* values, bool reverse, T* out) {
  VertexValues<T> blurred(l, channels, false);
  const std::vector<T> scale(channels, l.scale());
  blurred.fill(values, channels, channels, reverse, scale.data());
  parallel(l.points, threads_of(l.points, l.corners, channels), [&](int64_t first, int64_t last) {
    permutohedral_kernels<T>().weighted({first, last, nullptr, l.corners, l.corner_vertices, l.weights, nullptr,
                                         blurred.values(), channels, nullptr, out, channels});
  });
}

template <class T>
void permutohedral_filter_weights(const LatticeView<T>& l, int64_t channels, const T* grad, const T* values, bool reverse,
                                  T* out) {
  VertexValues<T> blurred(l, channels, false), reversed(l, channels, false);
  blurred.fill(values, channels, channels, reverse, nullptr);
  reversed.fill(grad, channels, channels, !reverse, nullptr);
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
