// torch.ops.atrous_native.domain_transform and domain_transform_backward: schemas, argument checks, CPU dispatch.
#include "cpu/domain_transform.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "conv2d_arguments.h"

namespace atrous {
namespace {

cpu::TransformShape checked(const Tensor& input, const Tensor& edge, double sigma_s, double sigma_r, int64_t iterations) {
  const Sizes sizes = sizes_of(input);
  check_four("input", sizes);
  for (int i = 1; i < 4; ++i)
    if (sizes[i] < 1) fail("input", "expected at least 1 channel and 1x1 pixels, but got sizes ", text(sizes));
  if (dtype_of(input) == cpu::DType::bfloat16) fail("input", "expected float32 or float64, but got bfloat16");
  check_alike("edge", edge, "input", input);
  if (sizes_of(edge) != Sizes{sizes[0], 2, sizes[2], sizes[3]})
    fail("edge", "expected sizes ", text({sizes[0], 2, sizes[2], sizes[3]}), ", but got ", text(sizes_of(edge)));
  if (!(sigma_s > 0) || !std::isfinite(sigma_s)) fail("sigma_s", "expected a width above 0, but got ", sigma_s);
  if (!(sigma_r > 0) || !std::isfinite(sigma_r)) fail("sigma_r", "expected a width above 0, but got ", sigma_r);
  if (iterations < 1) fail("iterations", "expected at least 1, but got ", iterations);
  return {sizes[0], sizes[1], sizes[2], sizes[3], sigma_s, sigma_r, iterations};
}

Tensor dense(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(t, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                    : torch::headeronly::MemoryFormat::Contiguous);
}

Tensor domain_transform_cpu(const Tensor& input, const Tensor& edge, double sigma_s, double sigma_r, int64_t iterations) {
  const cpu::TransformShape shape = checked(input, edge, sigma_s, sigma_r, iterations);
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  Tensor output = empty(sizes_of(input), input, channels_last);
  if (output.numel() > 0)
    cpu::domain_transform(shape, dtype_of(input), x.const_data_ptr(), read(edge), output.mutable_data_ptr(), channels_last);
  return output;
}

std::tuple<Tensor, Tensor> domain_transform_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& edge,
                                                         double sigma_s, double sigma_r, int64_t iterations) {
  const cpu::TransformShape shape = checked(input, edge, sigma_s, sigma_r, iterations);
  check_alike("grad", grad, "input", input);
  if (sizes_of(grad) != sizes_of(input))
    fail("grad", "expected sizes ", text(sizes_of(input)), ", but got ", text(sizes_of(grad)));
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last), g = dense(grad, channels_last);
  Tensor grad_input = empty(sizes_of(input), input, channels_last), grad_edge = empty(sizes_of(edge), edge, false);
  if (grad_input.numel() > 0)
    cpu::domain_transform_backward(shape, dtype_of(input), g.const_data_ptr(), x.const_data_ptr(), read(edge),
                                   grad_input.mutable_data_ptr(), grad_edge.mutable_data_ptr(), channels_last);
  return {grad_input, grad_edge};
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("domain_transform(Tensor input, Tensor edge, float sigma_s, float sigma_r, int iterations) -> Tensor");
  m.def(
      "domain_transform_backward(Tensor grad, Tensor input, Tensor edge, float sigma_s, float sigma_r, int iterations) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("domain_transform", TORCH_BOX(&atrous::domain_transform_cpu));
  m.impl("domain_transform_backward", TORCH_BOX(&atrous::domain_transform_backward_cpu));
}
