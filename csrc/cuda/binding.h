// Between the framework and the kernels' launchers, for the *_ops.cpp files of this folder.
//
// These files meet the framework, the .cu files do not. Results and workspace come from the framework's allocator,
// kernels run on the current stream of the tensors' device. Compile with USE_CUDA: it uncovers the stream function.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>  // its check of error codes: that of the stable headers came after PyTorch 2.11

#include "ops/conv2d_check.h"
#include "tensor.h"

// Tests run these files and the emulated kernels on CPU tensors, under another name.
#ifndef ATROUS_NAMESPACE
#define ATROUS_NAMESPACE atrous_native
#define ATROUS_DISPATCH_KEY CUDA
#endif

namespace atrous::cuda {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default:
      fail("dtype", "expected float32, float64, float16 or bfloat16, but got scalar type ",
           static_cast<int>(tensor.scalar_type()));
  }
}

inline Strides strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }
inline ConstTensor read(const Tensor& t) { return {t.const_data_ptr(), strides(t)}; }
inline MutableTensor write(const Tensor& t) { return {t.mutable_data_ptr(), strides(t)}; }

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace atrous::cuda
