#include "mean_field.h"

#include <algorithm>
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

template <class T>
int64_t channels_at_once(int64_t channels, const std::vector<MeanFieldKernel<T>>& kernels, int64_t most_vertex_bytes) {
  int64_t bytes = 1;
  for (const auto& kernel : kernels) {
    if (!kernel.diagonal) return channels;  // a matrix mixes all of them
    bytes += kernel.lattice.vertices * VertexValues<T>::bytes(kernel.lattice, true);
  }
  const int64_t fit = most_vertex_bytes / bytes;
  return fit >= channels ? channels : std::max<int64_t>(fit / 8 * 8, std::min<int64_t>(channels, 8));
}

}  // namespace

template <class T>
void mean_field(const MeanFieldUnary<T>& unary, const std::vector<MeanFieldKernel<T>>& kernels, int64_t iterations,
                int64_t most_vertex_bytes, T* out) {
  const int64_t points = unary.points, channels = unary.channels;
  const int64_t at_once = channels_at_once(channels, kernels, most_vertex_bytes);
  std::vector<std::vector<T>> factors;
  std::vector<std::unique_ptr<VertexValues<T>>> vertices;
  double terms = 10;  // an exponential costs about as much
  for (const auto& kernel : kernels) {
    factors.push_back(factors_of(kernel, channels));
    vertices.push_back(std::make_unique<VertexValues<T>>(kernel.lattice, at_once, iterations > 1));
    terms += static_cast<double>(kernel.lattice.corners);
  }

  std::vector<typename MeanFieldRows<T>::Part> parts;
  const auto update = [&](const MeanFieldUnary<T>& from, bool softmax, T* to) {
    const double flops = 2 * terms * static_cast<double>(points) * static_cast<double>(from.channels);
    parallel(points, threads_for(flops), [&](int64_t first, int64_t last) {
      Scratch scratch(static_cast<size_t>(mean_field_scratch(from.channels)) * sizeof(T));
      permutohedral_kernels<T>().mean_field({first, last, from.channels, from.data, from.point_stride, from.channel_stride,
                                             parts.data(), static_cast<int64_t>(parts.size()), softmax, to, channels,
                                             scratch.as<T>()});
    });
  };
  update(unary, true, out);
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    // Filters and diagonal compatibilities leave channels to themselves: energies take the place of the marginals they come from.
    for (int64_t first = 0; first < channels; first += at_once) {
      const int64_t count = std::min(at_once, channels - first);
      parts.clear();
      for (size_t k = 0; k < kernels.size(); ++k) {
        const LatticeView<T>& lattice = kernels[k].lattice;
        vertices[k]->fill(out + first, channels, count, false, kernels[k].diagonal ? factors[k].data() + first : nullptr,
                          kernels[k].before);
        if (!kernels[k].diagonal) vertices[k]->mix(factors[k].data());
        parts.push_back({lattice.corners, lattice.corner_vertices, lattice.weights, vertices[k]->values(), kernels[k].after});
      }
      update({points, count, unary.data + first * unary.channel_stride, unary.point_stride, unary.channel_stride},
             count == channels, out + first);
    }
    if (at_once < channels) {
      parts.clear();
      update({points, channels, out, channels, 1}, true, out);
    }
  }
}

template void mean_field<float>(const MeanFieldUnary<float>&, const std::vector<MeanFieldKernel<float>>&, int64_t, int64_t, float*);
template void mean_field<double>(const MeanFieldUnary<double>&, const std::vector<MeanFieldKernel<double>>&, int64_t, int64_t,
                                 double*);

}  // namespace atrous::cpu
