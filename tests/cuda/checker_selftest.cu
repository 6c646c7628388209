// Small kernels, right and wrong ones, that show what the emulation's checkers see, and the matrix instructions. Driven by
// test_emulator_checks.py; nvcc compiles them too, so that their PTX is known to be spelled right.
#include "../../csrc/cuda/tensor_core.h"
#include "guarded.h"

using namespace atrous::cuda;

namespace {

constexpr int threads = 64;

struct Floats {
  float value[threads];
};

// One way or another from a thread's value to one of another thread.
__global__ void exchange(const int which, float* out) {
  ATROUS_SHARED(Floats, staged);
  const int i = static_cast<int>(threadIdx.x), warp_half = i % 32 < 16 ? 0 : 1;
  float* const values = staged.value;
  values[which == 4 ? i / 2 : i] = static_cast<float>(i);
  switch (which) {
    case 0: __syncthreads(), out[i] = values[63 - i]; break;
    case 1: out[i] = values[63 - i]; break;
    case 2:
    case 3: {
      __syncthreads();
      const float other = values[63 - i];
      if (which == 3) __syncthreads();
      values[i] = out[i] = other;
      break;
    }
    case 5: __syncwarp(), out[i] = values[i ^ 1]; break;
    case 6: out[i] = values[i ^ 1]; break;
    case 7: out[i] = __shfl_xor_sync(0xffffffffu, 1.0f, 1) + values[i ^ 1]; break;
    case 8: __syncwarp(), out[i] = values[i ^ 32]; break;
    case 9: __syncwarp(warp_half ? 0xffff0000u : 0xffffu), out[i] = values[i ^ 16]; break;
    case 10: __syncwarp(warp_half ? 0xffff0000u : 0xffffu), out[i] = values[i ^ 8]; break;
    case 11: __syncthreads(), out[i] = values[5]; break;
    case 12: __syncthreads(), reinterpret_cast<uint16_t*>(values)[i] = 7, out[i] = 7; break;
    default: break;
  }
}

struct Copied {
  alignas(16) float value[2][4 * threads];
};

__global__ void copy(const int which, const float* in, float* out) {
  ATROUS_SHARED(Copied, staged);
  const int i = static_cast<int>(threadIdx.x), mine = 4 * i, other = 4 * (threads - 1 - i);
  float *first = staged.value[0], *second = staged.value[1];
  if (which == 7) return copy_async<16>(first + mine, in + mine + 1);
  if (which == 10) return copy_async<16>(out + mine, in + mine);
  copy_async<16>(first + mine, in + mine, which != 6 || i % 2 == 0);
  if (which != 3) commit_copies();
  if (which == 8) return;
  if (which == 4 || which == 5) {
    copy_async<16>(second + mine, in + mine);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    out[i] = (which == 4 ? first : second)[other];
    wait_for_copies<0>();
    __syncthreads();
    out[i] += second[other];
    return;
  }
  if (which != 1) wait_for_copies<0>();
  if (which != 2) __syncthreads();
  out[i] = first[which == 1 || which == 3 ? mine : other];
  if (which == 9) {  // while others may still read
    copy_async<16>(first + mine, in + mine);
    commit_copies();
  }
  wait_for_copies<0>();
  if (which == 1 || which == 3) commit_copies(), wait_for_copies<0>();
}

template <typename T>
struct Factors {
  alignas(16) T a[16][24], b[16][24];  // 48 bytes apart: rows are aligned and lie in different banks
};

// c [16, 8] += a [16, 16] b [16, 8], with b stored [8, 16], or where transposed [16, 8].
template <typename T, bool transposed>
__global__ void product(const bool synced, const T* a, const T* b, float* c) {
  ATROUS_SHARED(Factors<T>, staged);
  const int lane = static_cast<int>(threadIdx.x), columns = transposed ? 8 : 16;
  for (int e = lane; e < 256; e += 32) staged.a[e / 16][e % 16] = a[e];
  for (int e = lane; e < 128; e += 32) staged.b[e / columns][e % columns] = b[e];
  if (synced) __syncwarp();
  uint32_t of_a[4], of_b[2];
  load_matrices<false>(of_a, &staged.a[lane % 16][lane / 16 * 8]);
  load_matrices<transposed>(of_b, transposed ? &staged.b[lane % 16][0] : &staged.b[lane % 8][lane / 8 % 2 * 8]);
  float sum[4];
  float* const at = c + lane / 4 * 8 + 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) sum[i] = at[i / 2 * 64 + i % 2];
  multiply_add<T>(sum, of_a, of_b);
  for (int i = 0; i < 4; ++i) at[i / 2 * 64 + i % 2] = sum[i];
}

template <typename T>
void run_product(int transposed, int synced, const void* a, const void* b, float* c) {
  const auto kernel = transposed ? product<T, true> : product<T, false>;
  ATROUS_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, synced != 0, static_cast<const T*>(a), static_cast<const T*>(b), c);
}

}  // namespace

extern "C" {

const char* selftest_exchange(int which, float* out) {
  return guarded([&] { ATROUS_LAUNCH(exchange, dim3(2), dim3(threads), 0, nullptr, which, out); });
}

const char* selftest_copy(int which, const float* in, float* out) {
  return guarded([&] { ATROUS_LAUNCH(copy, dim3(2), dim3(threads), 0, nullptr, which, in, out); });
}

const char* selftest_product(int bfloat16, int transposed, int synced, const void* a, const void* b, float* c) {
  return guarded([&] { (bfloat16 ? run_product<__nv_bfloat16> : run_product<__half>)(transposed, synced, a, b, c); });
}

#if !defined(__CUDACC__)
void selftest_schedule(int kind, uint32_t seed) {
  atrous::emulation::set_schedule(static_cast<atrous::emulation::Schedule>(kind), seed);
}
#endif

}  // extern "C"
