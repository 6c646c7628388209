// What kernel files include instead of the CUDA headers: nvcc sees the CUDA runtime, any other compiler the emulation.
//
// Three things are spelled differently in the two worlds, so kernels use one name for both:
//   ATROUS_SHARED(Type, name);             a shared variable (an array goes into a struct)
//   ATROUS_DYNAMIC_SHARED(Type, name);     a pointer to the dynamic shared memory of the launch
//   ATROUS_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...);   throws std::runtime_error on failure
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace atrous::cuda {

// A kernel has to be told once per device before a launch may take more than 48 KB.
template <typename Kernel>
void allow_shared_bytes(Kernel* kernel, int bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess)
    throw std::runtime_error("CUDA kernel with " + std::to_string(bytes) + " bytes of shared memory: " +
                             cudaGetErrorString(error));
}

}  // namespace atrous::cuda

#define ATROUS_SHARED(type, name) __shared__ type name
#define ATROUS_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(1024) unsigned char name##_bytes[];    \
  type* name = reinterpret_cast<type*>(name##_bytes)
#define ATROUS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  do {                                                                                          \
    ::atrous::cuda::allow_shared_bytes(kernel, shared_bytes);                                   \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);      \
    const cudaError_t launch_error = cudaGetLastError();                                        \
    if (launch_error != cudaSuccess)                                                            \
      throw std::runtime_error(std::string("CUDA launch in ") + __func__ + ": " +               \
                               cudaGetErrorString(launch_error));                               \
  } while (false)

#else

#include "emulation/cuda.h"

#define ATROUS_SHARED(type, name)                                                                               \
  static uint64_t name##_owner = 0;                                                                             \
  static size_t name##_offset = 0;                                                                              \
  type& name = *static_cast<type*>(::atrous::emulation::Machine::get().shared_array(name##_owner, name##_offset, \
                                                                                    sizeof(type), alignof(type), #name))
#define ATROUS_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::atrous::emulation::Machine::get().dynamic_shared())
#define ATROUS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (::atrous::emulation::Streams::get().note(stream), ::atrous::emulation::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))

#endif

namespace atrous::cuda {

// Values that are loaded and stored together; N elements of 16 bytes in all become one 128-bit access.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T value[N];
};

// Sums are kept in single precision, double for double.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(accumulator_t<T> value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// 64-bit division takes about a hundred instructions on a GPU; indices nearly always fit into 32 bits.
__host__ __device__ __forceinline__ int64_t divide(int64_t dividend, int64_t divisor) {
  if (((dividend | divisor) >> 32) == 0)
    return static_cast<int64_t>(static_cast<uint32_t>(dividend) / static_cast<uint32_t>(divisor));
  return dividend / divisor;
}

}  // namespace atrous::cuda
