// Asynchronous copies into shared memory and the matrix instructions of sm_80 and later, for nvcc and for the emulation.
//
//   copy_async<bytes>(to, from, exists)   cp.async of 4, 8 or 16 bytes, aligned as much; zeros where `exists` is false
//   commit_copies()                       closes a group of copies of this thread
//   wait_for_copies<pending>()            until at most that many of its latest groups are under way. Other threads see
//                                         what has arrived only after a barrier
//   load_matrices<transposed>(fragment, row)   ldmatrix: 1, 2 or 4 matrices of 8 x 8 16-bit elements; lane 8 m + i points
//                                         to row i of matrix m, 16-byte aligned
//   multiply_add<T>(sum, a, b)            mma m16n8k16: float sums [16, 8] += a [16, 16] b [16, 8] of __half or
//                                         __nv_bfloat16. Lane l holds of sum rows l / 4 and l / 4 + 8, columns 2 (l % 4) and
//                                         the next; a as load_matrices gives it of its quarters (rows, then columns); b as
//                                         it gives it of its two halves stored column by column
//   multiply_add<float>(sum, a, b)        mma m16n8k8 in TF32: the same with a [16, 8] and b [8, 8] of floats, of which 10 bits
//                                         of the mantissa count. load_matrices moves them as pairs of 16-bit elements
//   round_to_tf32(bits)                   the nearest float of 10 bits; the matrix instruction itself would cut the others off
#pragma once

#include "device.h"

#if defined(__CUDACC__)

namespace atrous::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const int read = exists ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(bytes), "r"(read)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&f)[1], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(f[0]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(f[0]) : "r"(shared_address(row)) : "memory");
}
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&f)[2], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(f[0]), "=r"(f[1]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(f[0]), "=r"(f[1]) : "r"(shared_address(row)) : "memory");
}
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&f)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(shared_address(row)) : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_add<float>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

}  // namespace atrous::cuda

#else

#include "emulation/tensor_core.h"

namespace atrous::cuda {

using emulation::commit_copies;
using emulation::copy_async;
using emulation::load_matrices;
using emulation::multiply_add;
using emulation::round_to_tf32;
using emulation::wait_for_copies;

}  // namespace atrous::cuda

#endif
