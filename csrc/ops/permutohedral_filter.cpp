// torch.ops.atrous_native.permutohedral_filter and permutohedral_filter_weights: schemas, argument checks, CPU dispatch.
#include "cpu/permutohedral_filter.h"

#include <torch/csrc/stable/library.h>

#include "permutohedral_arguments.h"

namespace atrous {
namespace {

template <class T>
Tensor filter(const Tensor& values, const Tensor& weights, bool reverse, const cpu::LatticeView<T>& lattice) {
  const Tensor x = checked_values("values", values, weights, lattice.points);
  Tensor out = empty({x.size(0), x.size(1)}, x, false);
  if (out.numel() > 0)
    cpu::permutohedral_filter(lattice, x.size(1), static_cast<const T*>(x.const_data_ptr()), reverse,
                              static_cast<T*>(out.mutable_data_ptr()));
  return out;
}

Tensor permutohedral_filter_cpu(const Tensor& values, const Tensor& vertices, const Tensor& weights, const Tensor& neighbours,
                                const Tensor& begin, const Tensor& points, const Tensor& point_weights, bool reverse) {
  if (is_double("weights", weights))
    return filter(values, weights, reverse,
                  lattice_view<double>(vertices, weights, neighbours, begin, points, point_weights));
  return filter(values, weights, reverse, lattice_view<float>(vertices, weights, neighbours, begin, points, point_weights));
}

template <class T>
Tensor weight_gradient(const Tensor& grad, const Tensor& values, const Tensor& weights, bool reverse,
                       const cpu::LatticeView<T>& lattice) {
  const Tensor g = checked_values("grad", grad, weights, lattice.points);
  const Tensor x = checked_values("values", values, weights, lattice.points);
  if (g.size(1) != x.size(1)) fail("grad", "expected ", x.size(1), " channels, but got sizes ", text(sizes_of(g)));
  Tensor out = empty({lattice.points, lattice.corners}, x, false);
  if (out.numel() > 0)
    cpu::permutohedral_filter_weights(lattice, x.size(1), static_cast<const T*>(g.const_data_ptr()),
                                      static_cast<const T*>(x.const_data_ptr()), reverse,
                                      static_cast<T*>(out.mutable_data_ptr()));
  return out;
}

Tensor permutohedral_filter_weights_cpu(const Tensor& grad, const Tensor& values, const Tensor& vertices,
                                        const Tensor& weights, const Tensor& neighbours, const Tensor& begin,
                                        const Tensor& points, const Tensor& point_weights, bool reverse) {
  if (is_double("weights", weights))
    return weight_gradient(grad, values, weights, reverse,
                           lattice_view<double>(vertices, weights, neighbours, begin, points, point_weights));
  return weight_gradient(grad, values, weights, reverse,
                         lattice_view<float>(vertices, weights, neighbours, begin, points, point_weights));
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def(
      "permutohedral_filter(Tensor values, Tensor vertices, Tensor weights, Tensor neighbours, Tensor begin, Tensor points, "
      "Tensor point_weights, bool reverse) -> Tensor");
  m.def(
      "permutohedral_filter_weights(Tensor grad, Tensor values, Tensor vertices, Tensor weights, Tensor neighbours, Tensor "
      "begin, Tensor points, Tensor point_weights, bool reverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("permutohedral_filter", TORCH_BOX(&atrous::permutohedral_filter_cpu));
  m.impl("permutohedral_filter_weights", TORCH_BOX(&atrous::permutohedral_filter_weights_cpu));
}
