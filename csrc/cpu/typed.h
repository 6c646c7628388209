// The entries of the kernel table by C++ type, for the drivers.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace atrous::cpu {

template <class A> const MatmulKernels& matmul_kernels() {
  if constexpr (std::is_same_v<A, double>) return kernels().matmul_f64;
  else if constexpr (std::is_same_v<A, bf16>) return kernels().matmul_bf16;
  else return kernels().matmul_f32;
}

template <class T> const OuterKernels& outer_kernels() {
  if constexpr (std::is_same_v<T, double>) return kernels().outer_f64;
  else return kernels().outer_f32;
}

template <class S> const DepthwiseKernels<S>& depthwise_kernels() {
  if constexpr (std::is_same_v<S, double>) return kernels().depthwise_f64;
  else if constexpr (std::is_same_v<S, bf16>) return kernels().depthwise_bf16;
  else return kernels().depthwise_f32;
}

template <class T> const PlaneKernels& plane_kernels() {
  if constexpr (std::is_same_v<T, double>) return kernels().plane_f64;
  else return kernels().plane_f32;
}

template <class From, class To> Transpose<From, To> transpose_kernel() {
  if constexpr (std::is_same_v<From, double>) return kernels().transpose_f64;
  else if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) return kernels().transpose_f32;
  else if constexpr (std::is_same_v<From, float>) return kernels().transpose_narrow;
  else if constexpr (std::is_same_v<To, float>) return kernels().transpose_widen;
  else return kernels().transpose_bf16;
}

template <class From, class To> To convert_value(From x) {
  if constexpr (std::is_same_v<From, To>) return x;
  else if constexpr (std::is_same_v<From, bf16>) return to_float(x);
  else return to_bf16(x);
}

// size neighbours of src, converted.
template <class From, class To> void copy_row(int64_t size, const From* src, To* dst) {
  if constexpr (std::is_same_v<From, To>) std::memcpy(dst, src, static_cast<size_t>(size) * sizeof(To));
  else if constexpr (std::is_same_v<From, bf16>) kernels().widen(size, src, dst);
  else kernels().narrow(size, src, dst);
}

// dst[i * dst_row + j * dst_column] = src[i * src_row + j * src_column] by the fastest way that the steps allow.
template <class From, class To>
void copy_matrix(int64_t rows, int64_t columns, const From* src, int64_t src_row, int64_t src_column, To* dst,
                 int64_t dst_row, int64_t dst_column) {
  if (src_column == 1 && dst_column == 1) {
    for (int64_t i = 0; i < rows; ++i) copy_row(columns, src + i * src_row, dst + i * dst_row);
  } else if (src_row == 1 && dst_row == 1) {
    for (int64_t j = 0; j < columns; ++j) copy_row(rows, src + j * src_column, dst + j * dst_column);
  } else if (src_column == 1 && dst_row == 1) {
    transpose_kernel<From, To>()(rows, columns, src, src_row, dst, dst_column);
  } else if (src_row == 1 && dst_column == 1) {
    transpose_kernel<From, To>()(columns, rows, src, src_column, dst, dst_row);
  } else if (std::abs(src_row) < std::abs(src_column)) {
    copy_matrix(columns, rows, src, src_column, src_row, dst, dst_column, dst_row);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        dst[i * dst_row + j * dst_column] = convert_value<From, To>(src[i * src_row + j * src_column]);
  }
}

}  // namespace atrous::cpu
