// Compiled once per instruction set: CMake sets the compiler flags, ATROUS_ISA (a namespace) and ATROUS_ISA_NAME.
#include "cpu/kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"

#include "matmul_kernel.h"

#include "depthwise_kernel.h"

Kernels make_kernels() {
  Kernels k{};
  k.name = ATROUS_ISA_NAME;
  k.matmul_f32 = matmul_kernels<Product<float>>(1);
  k.matmul_f64 = matmul_kernels<Product<double>>(1);
#if defined(__AVX512BF16__)
  k.matmul_bf16 = matmul_kernels<PairProduct>(2);
#endif
  k.outer_f32 = outer_kernels<float>();
  k.outer_f64 = outer_kernels<double>();
  k.depthwise_f32 = {depthwise_run<float>, depthwise_weight_run<float>};
  k.depthwise_f64 = {depthwise_run<double>, depthwise_weight_run<double>};
  k.depthwise_bf16 = {depthwise_run<bf16>, depthwise_weight_run<bf16>};
  k.plane_f32 = {correlate_plane<float>, dot_plane<float>};
  k.plane_f64 = {correlate_plane<double>, dot_plane<double>};
  k.transpose_f32 = transpose<float, float>;
  k.transpose_f64 = transpose<double, double>;
  k.transpose_bf16 = transpose<bf16, bf16>;
  k.transpose_widen = transpose<bf16, float>;
  k.transpose_narrow = transpose<float, bf16>;
  k.widen = convert<bf16, float>;
  k.narrow = convert<float, bf16>;
  return k;
}

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(Kernels, make_kernels)

}  // namespace atrous::cpu
