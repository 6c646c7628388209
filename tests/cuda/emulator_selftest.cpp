// Small kernels, right and wrong ones, that show what the emulation does. Driven by test_emulator.py.
#include <cstdint>

#include "../../csrc/cuda/device.h"
#include "guarded.h"

namespace {

struct Block {
  float value[256];
};

__global__ void reverse_block(const float* in, float* out, const bool with_barrier) {
  ATROUS_SHARED(Block, staged);
  const unsigned i = threadIdx.x, n = blockDim.x, base = blockIdx.x * n;
  staged.value[i] = in[base + i];
  if (with_barrier) __syncthreads();
  out[base + i] = staged.value[n - 1 - i];
}

__global__ void read_unwritten(float* out) {
  ATROUS_SHARED(Block, staged);
  ATROUS_DYNAMIC_SHARED(float, dynamic);
  out[2 * threadIdx.x] = staged.value[threadIdx.x];
  out[2 * threadIdx.x + 1] = dynamic[threadIdx.x];
  staged.value[threadIdx.x] = dynamic[threadIdx.x] = 1;  // the next block must not see this
}

__global__ void write_outside(float* out) {
  ATROUS_SHARED(Block, staged);
  float* const values = staged.value;
  values[threadIdx.x + 1] = 1;  // the last thread writes behind the array
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void barrier_skipped_by_some(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barriers_in_two_branches(int* out) {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void warp_barrier_not_reached(int* out) {
  if (threadIdx.x != 7) __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_outside_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, static_cast<int>(threadIdx.x), 20);
}

__global__ void shuffles(const int delta, const int width, int* out) {
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  out[0 * n + i] = __shfl_sync(0xffffffffu, i, delta, width);
  out[1 * n + i] = __shfl_xor_sync(0xffffffffu, i, delta, width);
  out[2 * n + i] = __shfl_down_sync(0xffffffffu, i, static_cast<unsigned>(delta), width);
  out[3 * n + i] = __shfl_up_sync(0xffffffffu, i, static_cast<unsigned>(delta), width);
}

// Half warps sum separately, as masks allow; then the block, across warps, through shared memory.
__global__ void sum_half_warps(const double* in, double* out) {
  const unsigned i = threadIdx.x, mask = i % 32 < 16 ? 0xffffu : 0xffff0000u;
  double value = in[i];
  for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step);
  __syncwarp(mask);
  out[i] = value;
}

__global__ void indices(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned* const row = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
  row[0] = blockIdx.x, row[1] = blockIdx.y, row[2] = blockIdx.z;
  row[3] = threadIdx.x, row[4] = threadIdx.y, row[5] = threadIdx.z;
}

struct TooMuch {
  float value[13000];
};

__global__ void too_much_shared(float* out) {
  ATROUS_SHARED(TooMuch, staged);
  out[threadIdx.x] = staged.value[threadIdx.x];
}

}  // namespace

extern "C" {

void selftest_schedule(int kind, uint32_t seed) {
  atrous::emulation::set_schedule(static_cast<atrous::emulation::Schedule>(kind), seed);
}

const char* selftest_reverse(const float* in, float* out, unsigned blocks, unsigned threads, int with_barrier) {
  return guarded([&] {
    ATROUS_LAUNCH(reverse_block, dim3(blocks), dim3(threads), 0, nullptr, in, out, with_barrier != 0);
  });
}

const char* selftest_unwritten(float* out, unsigned threads) {
  return guarded([&] {
    for (int repeat = 0; repeat < 2; ++repeat)
      ATROUS_LAUNCH(read_unwritten, dim3(2), dim3(threads), threads * sizeof(float), nullptr, out);
  });
}

// Kernels of one int pointer, by name.
const char* selftest_wrong(const char* name, int* out, unsigned threads) {
  return guarded([&] {
    const std::string wanted = name;
    const auto kernel = wanted == "barrier_skipped_by_some"    ? barrier_skipped_by_some
                        : wanted == "barriers_in_two_branches" ? barriers_in_two_branches
                        : wanted == "warp_barrier_not_reached" ? warp_barrier_not_reached
                                                               : shuffle_outside_mask;
    ATROUS_LAUNCH(kernel, dim3(1), dim3(threads), 0, nullptr, out);
  });
}

const char* selftest_shared_misuse(const char* name, float* out, unsigned threads) {
  return guarded([&] {
    const auto kernel = std::string(name) == "write_outside" ? write_outside : too_much_shared;
    ATROUS_LAUNCH(kernel, dim3(1), dim3(threads), 0, nullptr, out);
  });
}

const char* selftest_shuffles(int delta, int width, int* out, unsigned threads) {
  return guarded([&] { ATROUS_LAUNCH(shuffles, dim3(1), dim3(threads), 0, nullptr, delta, width, out); });
}

const char* selftest_sum_half_warps(const double* in, double* out, unsigned threads) {
  return guarded([&] { ATROUS_LAUNCH(sum_half_warps, dim3(1), dim3(threads), 0, nullptr, in, out); });
}

const char* selftest_indices(unsigned* out, const unsigned* grid, const unsigned* block) {
  return guarded([&] {
    ATROUS_LAUNCH(indices, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr, out);
  });
}

void selftest_halves(const float* in, uint16_t* half, uint16_t* bfloat16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    half[i] = __float2half_rn(in[i]).bits;
    bfloat16[i] = __float2bfloat16_rn(in[i]).bits;
  }
}

void selftest_widen(const uint16_t* in, float* from_half, float* from_bfloat16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    from_half[i] = __half2float(__half{in[i]});
    from_bfloat16[i] = __bfloat162float(__nv_bfloat16{in[i]});
  }
}

}  // extern "C"
