// Tables of inner loops, one per instruction set: every file of kernels/ is compiled once per instruction set and defines its
// table each time; runtime.h picks one at run time.
//
// Only plain structs and raw pointers cross this line: the files of kernels/ must not instantiate inline library code, or the
// linker could keep a copy compiled for AVX-512 and hand it to callers that run on every machine.
#pragma once

#include <cstdint>

namespace atrous::cpu {

// A header that declares a struct of functions follows it with ATROUS_DECLARE_TABLES(Struct); the file of kernels/ that fills
// it ends with ATROUS_DEFINE_TABLE(Struct, make), make() giving the struct in the namespace ATROUS_ISA.
template <class Table> struct Tables {
  static const Table& portable();
  static const Table& avx2();
  static const Table& avx512();
  static const Table& avx512_bf16();
};
#define ATROUS_DECLARE_TABLES(Struct)                   \
  template <> const Struct& Tables<Struct>::portable(); \
  template <> const Struct& Tables<Struct>::avx2();     \
  template <> const Struct& Tables<Struct>::avx512();   \
  template <> const Struct& Tables<Struct>::avx512_bf16();
#define ATROUS_DEFINE_TABLE(Struct, make)                  \
  template <> const Struct& Tables<Struct>::ATROUS_ISA() { \
    static const Struct table = ATROUS_ISA::make();        \
    return table;                                          \
  }

// Storage of a bfloat16; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};

static inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline bf16 to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

// The type in which products of T are summed.
template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

// What becomes of a finished sum: clamp(sum * scale + shift + residual, low, high) with one scale and shift per written channel,
// in the type of the sum. No scale: it is written as it is.
struct Finish {
  const void* scale = nullptr;
  const void* shift = nullptr;
  double low = 0, high = 0;
  int64_t residual = 0;  // bytes from where a sum is written to the residual that is added; 0: none
};

}  // namespace atrous::cpu
