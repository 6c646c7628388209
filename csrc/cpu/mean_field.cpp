#include "mean_field.h"

#include <memory>

namespace atrous::cpu {
namespace {

// What the values of the vertices are multiplied by: a factor per channel, or one matrix [from, to], both with the filter's scale
// and the sign of the energy.
template <class T> std::vector<T> factors_of(const MeanFieldKernel<T>& kernel, int64_t channels) {
  std::vector<T> factors(kernel.diagonal ? channels : channels * channels);
  for (size_t i = 0; i < factors.size(); ++i) {
    const size_t to = i % channels, from = i / channels;
    factors[i] = -kernel.lattice.scale() * kernel.compatibility[kernel.diagonal ? i : to * channels + from];
  }
  return factors;
}

}  // namespace

template <class T>
void mean_field(int64_t points, int64_t channels, const T* unary, const std::vector<MeanFieldKernel<T>>& kernels,
                int64_t iterations, T* out) {
  std::vector<std::vector<T>> factors;
  std::vector<std::unique_ptr<VertexValues<T>>> vertices;
  double terms = 10;  // an exponential costs about as much
  for (const auto& kernel : kernels) {
    factors.push_back(factors_of(kernel, channels));
    vertices.push_back(std::make_unique<VertexValues<T>>(kernel.lattice, channels));
    terms += static_cast<double>(kernel.lattice.corners);
  }
  const int64_t threads = threads_for(2 * terms * static_cast<double>(points) * static_cast<double>(channels));

  std::vector<typename MeanFieldRows<T>::Part> parts;
  const auto update = [&] {
    parallel(points, threads, [&](int64_t first, int64_t last) {
      Scratch scratch(static_cast<size_t>(mean_field_scratch(channels)) * sizeof(T));
      permutohedral_kernels<T>().mean_field({first, last, channels, unary, parts.data(), static_cast<int64_t>(parts.size()),
                                             out, scratch.as<T>()});
    });
  };
  update();
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    parts.clear();
    for (size_t k = 0; k < kernels.size(); ++k) {
      const LatticeView<T>& lattice = kernels[k].lattice;
      vertices[k]->fill(out, false, kernels[k].diagonal ? factors[k].data() : nullptr, kernels[k].before);
      if (!kernels[k].diagonal) vertices[k]->mix(factors[k].data());
      parts.push_back({lattice.corners, lattice.corner_vertices, lattice.weights, vertices[k]->values(), kernels[k].after});
    }
    update();
  }
}

template void mean_field<float>(int64_t, int64_t, const float*, const std::vector<MeanFieldKernel<float>>&, int64_t, float*);
template void mean_field<double>(int64_t, int64_t, const double*, const std::vector<MeanFieldKernel<double>>&, int64_t,
                                 double*);

}  // namespace atrous::cpu
