// Asynchronous copies, ldmatrix and mma as csrc/cuda/tensor_core.h names them, on the emulated machine.
#pragma once

#include "cuda.h"

namespace atrous {
namespace emulation __attribute__((visibility("hidden"))) {

template <int bytes>
void copy_async(void* to, const void* from, bool exists = true, ATROUS_CALLER) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  Machine::get().copy_async(to, from, bytes, exists, {file, line});
}
inline void commit_copies() { Machine::get().commit_copies(); }
template <int pending>
void wait_for_copies() {
  Machine::get().wait_copies(pending);
}

// Row i of matrix m lies where lane 8 m + i points; lane l receives elements 2 (l % 4) and the next of row l / 4, or with
// transposed those of column l / 4.
template <bool transposed, int count>
void load_matrices(uint32_t (&fragment)[count], const void* row, ATROUS_CALLER) {
  static_assert(count == 1 || count == 2 || count == 4);
  const Site site{file, line};
  Machine& machine = Machine::get();
  const auto lane = static_cast<size_t>(machine.lane());
  if (lane < 8 * count && reinterpret_cast<uintptr_t>(row) % 16 != 0)
    machine.fail_in_thread("ldmatrix from an address that is no multiple of 16", site);
  struct Result {
    uint32_t value[count];
  };
  const Result result = warp_collective(
      0xffffffffu, row,
      [&](const void* const* rows) {
        Result r;
        for (size_t m = 0; m < count; ++m) {
          uint32_t banks = 0;
          for (size_t i = 0; i < 8; ++i) banks |= 1u << reinterpret_cast<uintptr_t>(rows[8 * m + i]) / 16 % 8;
          if (banks != 0xff) machine.fail_in_thread("ldmatrix of rows that share banks, which takes several accesses", site);
          uint16_t halves[2];
          for (size_t h = 0; h < 2; ++h) {
            const size_t i = transposed ? 2 * (lane % 4) + h : lane / 4, j = transposed ? lane / 4 : 2 * (lane % 4) + h;
            halves[h] = static_cast<const uint16_t*>(rows[8 * m + i])[j];
          }
          r.value[m] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
        }
        return r;
      },
      site);
  for (int m = 0; m < count; ++m) fragment[m] = result.value[m];
}

// Bits below those of TF32 are rounded half away from zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & ~0x1fffu;
}

inline float widened(uint16_t bits, __half) { return __half2float({bits}); }
inline float widened(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }

// Element k of a row of a or a column of b, of which four lanes hold a part each: which lane, which register, which value.
template <typename T>
struct Operand {
  static constexpr size_t depth = 16;
  static size_t lane(size_t k) { return k % 8 / 2; }
  static size_t part(size_t k) { return k / 8; }
  static float value(uint32_t pair, size_t k) { return widened(static_cast<uint16_t>(pair >> (16 * (k % 2))), T{}); }
};
template <>
struct Operand<float> {  // TF32: the hardware reads 19 of the 32 bits
  static constexpr size_t depth = 8;
  static size_t lane(size_t k) { return k % 4; }
  static size_t part(size_t k) { return k / 4; }
  static float value(uint32_t bits, size_t) { return float_from_bits(bits & ~0x1fffu); }
};

// sum += a b with a [16, depth] and b [depth, 8] of T, sum [16, 8] of float; sums run over ascending k, rounded once each.
template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ATROUS_CALLER) {
  struct Factors {
    uint32_t a[4], b[2];
  } mine;
  std::copy_n(a, 4, mine.a);
  std::copy_n(b, 2, mine.b);
  struct Sums {
    float value[4];
  } start;
  std::copy_n(sum, 4, start.value);
  const auto lane = static_cast<size_t>(Machine::get().lane());
  const Sums result = warp_collective(
      0xffffffffu, mine,
      [&](const Factors* lanes) {
        using Of = Operand<T>;
        Sums r = start;
        for (size_t i = 0; i < 4; ++i) {
          const size_t row = lane / 4, column = 2 * (lane % 4) + i % 2;
          for (size_t k = 0; k < Of::depth; ++k)
            r.value[i] += Of::value(lanes[4 * row + Of::lane(k)].a[i / 2 + Of::part(k) * 2], k) *
                          Of::value(lanes[4 * column + Of::lane(k)].b[Of::part(k)], k);
        }
        return r;
      },
      {file, line});
  std::copy_n(result.value, 4, sum);
}

}  // namespace emulation
}  // namespace atrous
