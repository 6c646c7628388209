// torch.ops.atrous_native.pyramid_pool, pyramid_pool_copy and pyramid_pool_input: schemas, argument checks, CPU dispatch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/pyramid_pool.h"
#include "conv2d_arguments.h"
#include "pyramid_pool_check.h"

namespace atrous {
namespace {

cpu::PyramidShape shape_of(const Sizes& input, const Sizes& bins) {
  return {input[0], input[1], input[2], input[3], bins.data(), static_cast<int64_t>(bins.size() / 2)};
}

// The same values in one of the two dense layouts: as it is where it has one, else copied into what its strides suggest.
Tensor dense(const Tensor& t) {
  return torch::stable::contiguous(t, is_channels_last(t) ? torch::headeronly::MemoryFormat::ChannelsLast
                                                          : torch::headeronly::MemoryFormat::Contiguous);
}

// The averages, and the input as the leading ones of `channels` channels; the others are for upsample_into.
std::tuple<Tensor, Tensor> pyramid_pool_copy_cpu(const Tensor& input, std::vector<int64_t> bins, int64_t channels) {
  const Sizes sizes = check_pyramid(sizes_of(input), bins);
  const cpu::PyramidShape shape = shape_of(sizes_of(input), bins);
  if (channels < shape.channels) fail("channels", "expected at least ", shape.channels, ", but got ", channels);
  const Tensor x = dense(input);
  Tensor output = empty_of(sizes, input.scalar_type(), input);
  Tensor copy = empty({shape.batch, channels, shape.height, shape.width}, input, is_channels_last(x));
  if (output.numel() > 0)
    cpu::pyramid_pool(shape, dtype_of(input), read(x), is_channels_last(x), output.mutable_data_ptr(), nullptr,
                      {copy.mutable_data_ptr(), channels});
  return {output, copy};
}

std::tuple<Tensor, Tensor> pyramid_pool_cpu(const Tensor& input, std::vector<int64_t> bins, bool maximum) {
  const Sizes sizes = check_pyramid(sizes_of(input), bins);
  const cpu::PyramidShape shape = shape_of(sizes_of(input), bins);
  const Tensor x = dense(input);
  Tensor output = empty_of(sizes, input.scalar_type(), input);
  Tensor index = empty_of(maximum ? sizes : Sizes{0}, torch::headeronly::ScalarType::Long, input);
  if (output.numel() > 0)
    cpu::pyramid_pool(shape, dtype_of(input), read(x), is_channels_last(x), output.mutable_data_ptr(),
                      maximum ? static_cast<int64_t*>(index.mutable_data_ptr()) : nullptr);
  return {output, index};
}

Tensor pyramid_pool_input_cpu(const Tensor& grad, const Tensor& index, std::vector<int64_t> input_size,
                              std::vector<int64_t> bins, bool maximum, bool channels_last) {
  check_pyramid_gradient(grad, index, input_size, bins, maximum);
  const cpu::PyramidShape shape = shape_of(input_size, bins);
  const Tensor g = torch::stable::contiguous(grad), at = torch::stable::contiguous(index);
  if (maximum) {
    const int64_t* values = static_cast<const int64_t*>(at.const_data_ptr());
    for (int64_t i = 0; i < at.numel(); ++i)
      if (values[i] < 0 || values[i] >= shape.height * shape.width)
        fail("index", "expected pixels of a plane of ", shape.height * shape.width, ", but got ", values[i]);
  }
  Tensor grad_input = empty(input_size, grad, channels_last);
  if (grad_input.numel() > 0)
    cpu::pyramid_pool_input(shape, dtype_of(grad), g.const_data_ptr(),
                            maximum ? static_cast<const int64_t*>(at.const_data_ptr()) : nullptr, write(grad_input),
                            is_channels_last(grad_input));
  return grad_input;
}

}  // namespace
}  // namespace atrous

STABLE_TORCH_LIBRARY_FRAGMENT(atrous_native, m) {
  m.def("pyramid_pool(Tensor input, int[] bins, bool maximum) -> (Tensor, Tensor)");
  m.def("pyramid_pool_copy(Tensor input, int[] bins, int channels) -> (Tensor, Tensor)");
  m.def(
      "pyramid_pool_input(Tensor grad, Tensor index, int[] input_size, int[] bins, bool maximum, bool channels_last) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(atrous_native, CPU, m) {
  m.impl("pyramid_pool", TORCH_BOX(&atrous::pyramid_pool_cpu));
  m.impl("pyramid_pool_copy", TORCH_BOX(&atrous::pyramid_pool_copy_cpu));
  m.impl("pyramid_pool_input", TORCH_BOX(&atrous::pyramid_pool_input_cpu));
}
