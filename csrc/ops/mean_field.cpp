// torch.ops.atrous_native.mean_field: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/mean_field.h"

#include <torch/csrc/stable/library.h>

#include "permutohedral_arguments.h"

namespace atrous {
namespace {

constexpr size_t tensors_per_lattice = 6;

// Either none at all or one of [points] per kernel.
template <class T>
const T* factor_of(const char* name, const std::vector<Tensor>& factors, size_t kernel, const Tensor& unary) {
  if (factors.empty()) return nullptr;
  check_array(name, factors[kernel], unary.scalar_type(), {unary.size(0)});
  return static_cast<const T*>(factors[kernel].const_data_ptr());
}

template <class T>
Tensor run(const Tensor& unary, const std::vector<Tensor>& lattices, const std::vector<Tensor>& compatibilities,
           const std::vector<Tensor>& before, const std::vector<Tensor>& after, int64_t iterations, int64_t most_vertex_bytes) {
  const int64_t points = unary.size(0), channels = unary.size(1);
  // Every iteration reads the energies: a copy with the channels last pays, unless it would be large.
  const bool copied = unary.numel() * static_cast<int64_t>(sizeof(T)) <= most_vertex_bytes / 4;
  const Tensor energies = copied ? torch::stable::contiguous(unary) : unary;
  std::vector<cpu::MeanFieldKernel<T>> kernels;
  for (size_t k = 0; k < compatibilities.size(); ++k) {
    const Tensor* const t = &lattices[k * tensors_per_lattice];
    const Tensor& factors = compatibilities[k];
    const bool diagonal = factors.dim() == 1;
    check_array("compatibilities", factors, unary.scalar_type(), diagonal ? Sizes{channels} : Sizes{channels, channels});
    kernels.push_back({lattice_view<T>(t[0], t[1], t[2], t[3], t[4], t[5]), static_cast<const T*>(factors.const_data_ptr()),
                       diagonal, factor_of<T>("before", before, k, unary), factor_of<T>("after", after, k, unary)});
    if (kernels.back().lattice.points != points)
      fail("unary", "expected ", kernels.back().lattice.points, " points, as the lattice has, but got sizes ",
           text(sizes_of(unary)));
  }
  Tensor out = empty({points, channels}, unary, false);
  if (out.numel() > 0)
    cpu::mean_field<T>({points, channels, static_cast<const T*>(energies.const_data_ptr()), energies.stride(0), energies.stride(1)},
                       kernels, iterations, most_vertex_bytes, static_cast<T*>(out.mutable_data_ptr()));
  return out;
}

Tensor mean_field_cpu(const Tensor& unary, std::vector<Tensor> lattices, std::vector<Tensor> compatibilities,
                      std::vector<Tensor> before, std::vector<Tensor> after, int64_t iterations, int64_t most_vertex_bytes) {
  if (unary.dim() != 2 || unary.size(1) < 1)
    fail("unary", "expected [points, channels], at least 1 channel, but got sizes ", text(sizes_of(unary)));
  if (iterations < 0) fail("iterations", "expected at least 0, but got ", iterations);
  const size_t kernels = compatibilities.size();
  if (lattices.size() != kernels * tensors_per_lattice)
    fail("lattices", "expected ", tensors_per_lattice, " tensors for each of ", kernels, " compatibilities, but got ",
         lattices.size());
  for (const auto* factors : {&before, &after})
    if (!factors->empty() && factors->size() != kernels)
      fail("before and after", "expected none or ", kernels, " tensors, but got ", factors->size());
  if (is_double("unary", unary))
    return run<double>(unary, lattices, compatibilities, before, after, iterations, most_vertex_bytes);
  return run<float>(unary, lattices, compatibilities, before, after, iterations, most_vertex_bytes);
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  // Values of the vertices take at most about 1 GiB: more channels go through the lattices in parts.
  m.def(
      "mean_field(Tensor unary, Tensor[] lattices, Tensor[] compatibilities, Tensor[] before, Tensor[] after, int iterations, "
      "int most_vertex_bytes=1073741824) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) { m.impl("mean_field", TORCH_BOX(&atrous::mean_field_cpu)); }
