// torch.ops.atrous_native.mean_field: schema, argument checks, CPU dispatch (LibTorch's stable ABI only).
#include "cpu/mean_field.h"

#include <torch/csrc/stable/library.h>

#include "permutohedral_arguments.h"

namespace atrous {
namespace {

constexpr size_t tensors_per_lattice = 6;

template <class T>
Tensor run(const Tensor& logits, const std::vector<Tensor>& lattices, const std::vector<Tensor>& compatibilities,
           int64_t iterations) {
  const int64_t points = logits.size(0), channels = logits.size(1);
  const Tensor dense = torch::stable::contiguous(logits);
  std::vector<cpu::MeanFieldKernel<T>> kernels;
  for (size_t k = 0; k < compatibilities.size(); ++k) {
    const Tensor* const t = &lattices[k * tensors_per_lattice];
    const Tensor& factors = compatibilities[k];
    const bool diagonal = factors.dim() == 1;
    check_array("compatibilities", factors, logits.scalar_type(), diagonal ? Sizes{channels} : Sizes{channels, channels});
    kernels.push_back({lattice_view<T>(t[0], t[1], t[2], t[3], t[4], t[5]), static_cast<const T*>(factors.const_data_ptr()),
                       diagonal});
    if (kernels.back().lattice.points != points)
      fail("logits", "expected ", kernels.back().lattice.points, " points, as the lattice has, but got sizes ",
           text(sizes_of(logits)));
  }
  Tensor out = empty({points, channels}, logits, false);
  if (out.numel() > 0)
    cpu::mean_field(points, channels, static_cast<const T*>(dense.const_data_ptr()), kernels, iterations,
                    static_cast<T*>(out.mutable_data_ptr()));
  return out;
}

Tensor mean_field_cpu(const Tensor& logits, std::vector<Tensor> lattices, std::vector<Tensor> compatibilities,
                      int64_t iterations) {
  if (logits.dim() != 2 || logits.size(1) < 1)
    fail("logits", "expected [points, channels], at least 1 channel, but got sizes ", text(sizes_of(logits)));
  if (iterations < 0) fail("iterations", "expected at least 0, but got ", iterations);
  if (lattices.size() != compatibilities.size() * tensors_per_lattice)
    fail("lattices", "expected ", tensors_per_lattice, " tensors for each of ", compatibilities.size(),
         " compatibilities, but got ", lattices.size());
  return is_double("logits", logits) ? run<double>(logits, lattices, compatibilities, iterations)
                                     : run<float>(logits, lattices, compatibilities, iterations);
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("mean_field(Tensor logits, Tensor[] lattices, Tensor[] compatibilities, int iterations) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) { m.impl("mean_field", TORCH_BOX(&atrous::mean_field_cpu)); }
