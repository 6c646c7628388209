// The four passes of a batch normalisation with activation as ops of atrous_native; the op around them is ops/conv_bn_relu.py.
#include "cpu/conv_bn_relu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "conv2d_check.h"

namespace atrous {
namespace {

using torch::headeronly::ScalarType;

cpu::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cpu::DType::float32;
    case ScalarType::Double: return cpu::DType::float64;
    case ScalarType::BFloat16: return cpu::DType::bfloat16;
    default: break;
  }
  fail("dtype", "expected float32, float64 or bfloat16, but got scalar type ", static_cast<int>(t.scalar_type()));
}
ScalarType sum_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool dense_along(const Tensor& t, const int (&dims)[4]) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (const int dim : dims) {
    if (t.size(dim) > 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// A single pixel per image is both layouts; as NHWC its channels are neighbours.
cpu::NormShape shape_of(const char* name, const Tensor& t) {
  check_four(name, sizes_of(t));
  cpu::NormShape s{t.size(0), t.size(1), t.size(2) * t.size(3), false};
  const bool nchw = dense_along(t, {3, 2, 1, 0}), nhwc = dense_along(t, {1, 3, 2, 0});
  if (!nchw && !nhwc) fail(name, "expected dense NCHW or NHWC memory of sizes ", text(sizes_of(t)));
  s.channels_last = nhwc && (!nchw || s.pixels == 1);
  return s;
}

// Gradient, or residual, and input element by element: the same sizes, dtype and layout.
cpu::NormShape shape_of(const char* name, const Tensor& other, const Tensor& input) {
  const cpu::NormShape s = shape_of("input", input);
  check_alike(name, other, "input", input);
  if (sizes_of(other) != sizes_of(input))
    fail(name, "expected the sizes of input ", text(sizes_of(input)), ", but got ", text(sizes_of(other)));
  const bool alike = s.channels_last ? dense_along(other, {1, 3, 2, 0}) : dense_along(other, {3, 2, 1, 0});
  if (!alike) fail(name, "expected the memory layout of input");
  return s;
}

const void* per_channel(const char* name, const Tensor& t, const Tensor& input) {
  if (t.scalar_type() != sum_type(input) || sizes_of(t) != Sizes{input.size(1)} || (t.size(0) > 1 && t.stride(0) != 1))
    fail(name, "expected ", input.size(1), " contiguous values in the type of the sums, but got sizes ", text(sizes_of(t)),
         " and scalar type ", static_cast<int>(t.scalar_type()));
  return t.const_data_ptr();
}

cpu::NormParameters parameters_of(const Tensor& input, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                  double low, double high) {
  return {per_channel("mean", mean, input), per_channel("scale", scale, input), per_channel("shift", shift, input), low,
          high};
}

Tensor empty_sums(const Tensor& input) {
  return torch::stable::empty({input.size(1)}, sum_type(input), std::nullopt, input.device(), std::nullopt, std::nullopt);
}

std::tuple<Tensor, Tensor> statistics(const Tensor& input) {
  const cpu::NormShape s = shape_of("input", input);
  Tensor mean = empty_sums(input), moment = empty_sums(input);
  if (s.channels > 0)
    cpu::norm_statistics(s, dtype_of(input), input.const_data_ptr(), mean.mutable_data_ptr(), moment.mutable_data_ptr());
  return {mean, moment};
}

void apply_into(const Tensor& input, const Tensor& mean, const Tensor& scale, const Tensor& shift, double low, double high,
                const std::optional<Tensor>& residual, const Tensor& output) {
  const cpu::NormShape s = residual ? shape_of("residual", *residual, input) : shape_of("input", input);
  if (input.numel() > 0)
    cpu::norm_apply(s, dtype_of(input), parameters_of(input, mean, scale, shift, low, high), input.const_data_ptr(),
                    residual ? residual->const_data_ptr() : nullptr, output.mutable_data_ptr());
}

Tensor apply(const Tensor& input, const Tensor& mean, const Tensor& scale, const Tensor& shift, double low, double high,
             const std::optional<Tensor>& residual) {
  Tensor output = empty(sizes_of(input), input, shape_of("input", input).channels_last);
  apply_into(input, mean, scale, shift, low, high, residual, output);
  return output;
}

void apply_(const Tensor& input, const Tensor& mean, const Tensor& scale, const Tensor& shift, double low, double high) {
  apply_into(input, mean, scale, shift, low, high, std::nullopt, input);
}

std::tuple<Tensor, Tensor> sums(const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& scale,
                                const Tensor& shift, double low, double high) {
  const cpu::NormShape s = shape_of("grad", grad, input);
  Tensor sum = empty_sums(input), product = empty_sums(input);
  if (s.channels > 0)
    cpu::norm_sums(s, dtype_of(input), parameters_of(input, mean, scale, shift, low, high), grad.const_data_ptr(),
                   input.const_data_ptr(), sum.mutable_data_ptr(), product.mutable_data_ptr());
  return {sum, product};
}

Tensor input_gradient(const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                      const Tensor& slope, const Tensor& offset, double low, double high) {
  const cpu::NormShape s = shape_of("grad", grad, input);
  Tensor output = empty(sizes_of(input), input, s.channels_last);
  if (input.numel() > 0)
    cpu::norm_input_gradient(s, dtype_of(input), parameters_of(input, mean, scale, shift, low, high),
                             per_channel("slope", slope, input), per_channel("offset", offset, input),
                             grad.const_data_ptr(), input.const_data_ptr(), output.mutable_data_ptr());
  return output;
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
#define ATROUS_NORM "Tensor mean, Tensor scale, Tensor shift, "
  m.def("batch_norm_statistics(Tensor input) -> (Tensor, Tensor)");
  m.def("batch_norm_act(Tensor input, " ATROUS_NORM "float low, float high, Tensor? residual=None) -> Tensor");
  m.def("batch_norm_act_(Tensor(a!) input, " ATROUS_NORM "float low, float high) -> ()");
  m.def("batch_norm_act_sums(Tensor grad, Tensor input, " ATROUS_NORM "float low, float high) -> (Tensor, Tensor)");
  m.def("batch_norm_act_input(Tensor grad, Tensor input, " ATROUS_NORM
        "Tensor slope, Tensor offset, float low, float high) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&atrous::statistics));
  m.impl("batch_norm_act", TORCH_BOX(&atrous::apply));
  m.impl("batch_norm_act_", TORCH_BOX(&atrous::apply_));
  m.impl("batch_norm_act_sums", TORCH_BOX(&atrous::sums));
  m.impl("batch_norm_act_input", TORCH_BOX(&atrous::input_gradient));
}
