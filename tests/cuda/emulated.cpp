// C entry points of the emulated CUDA convolutions, for ctypes. Compiled together with csrc/cuda/*.cu by any C++17
// compiler; a failed launch is reported as text.
#include <cstring>

#include "../../csrc/cuda/conv2d.h"
#include "emulation/cuda.h"
#include "guarded.h"

using namespace atrous::cuda;

extern "C" {

// kind: 0 ascending, 1 descending, 2 shuffled.
void emulated_schedule(int kind, uint32_t seed) {
  atrous::emulation::set_schedule(static_cast<atrous::emulation::Schedule>(kind), seed);
}

// Counts launches from here on: all, and those on another stream than this.
void emulated_expect_stream(const void* stream) { atrous::emulation::Streams::get() = {stream}; }
int64_t emulated_launches() { return atrous::emulation::Streams::get().launches; }
int64_t emulated_launches_elsewhere() { return atrous::emulation::Streams::get().elsewhere; }

const char* emulated_conv2d(const Conv2dShape* shape, int64_t dtype, int depthwise, const ConstTensor* input,
                            const ConstTensor* weight, const void* bias, const MutableTensor* output) {
  return guarded([&] {
    (depthwise ? depthwise_conv2d : conv2d)(*shape, DType(dtype), *input, *weight, bias, *output, nullptr);
  });
}

const char* emulated_conv2d_input(const Conv2dShape* shape, int64_t dtype, int depthwise, const ConstTensor* weight,
                                  const ConstTensor* grad_output, const MutableTensor* grad_input) {
  return guarded([&] {
    (depthwise ? depthwise_conv2d_input : conv2d_input)(*shape, DType(dtype), *weight, *grad_output, *grad_input,
                                                        nullptr);
  });
}

int64_t emulated_conv2d_weight_workspace(const Conv2dShape* shape, int64_t dtype, int depthwise) {
  return (depthwise ? depthwise_conv2d_weight_workspace : conv2d_weight_workspace)(*shape, DType(dtype));
}

const char* emulated_conv2d_weight(const Conv2dShape* shape, int64_t dtype, int depthwise, const ConstTensor* input,
                                   const ConstTensor* grad_output, const MutableTensor* grad_weight, void* workspace) {
  return guarded([&] {
    (depthwise ? depthwise_conv2d_weight : conv2d_weight)(*shape, DType(dtype), *input, *grad_output, *grad_weight,
                                                          workspace, nullptr);
  });
}

}  // extern "C"
