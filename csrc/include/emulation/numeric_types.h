// The 16-bit floating-point types of the CUDA headers, for the host: storage plus correctly rounded conversions, which
// is all that kernels with float accumulation use. Names and semantics are those of cuda_fp16.h and cuda_bf16.h.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

namespace atrous {
namespace emulation __attribute__((visibility("hidden"))) {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Drops the low `count` bits, rounding to nearest, ties to even.
inline uint32_t shift_right_rounded(uint32_t value, int count) {
  const uint32_t kept = value >> count;
  const uint32_t rest = value & ((1u << count) - 1);
  const uint32_t half = 1u << (count - 1);
  return kept + (rest > half || (rest == half && (kept & 1u)));
}

}  // namespace emulation
}  // namespace atrous

inline float __bfloat162float(__nv_bfloat16 value) {
  return atrous::emulation::float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = atrous::emulation::float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the one NaN the hardware returns
  return {static_cast<uint16_t>(atrous::emulation::shift_right_rounded(bits, 16))};
}

inline float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31u;
  const uint32_t mantissa = value.bits & 1023u;
  if (exponent == 31) return atrous::emulation::float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return atrous::emulation::float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = atrous::emulation::float_bits(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x33000000u) return {sign};                                    // below half of the smallest subnormal
  if (magnitude < 0x38800000u) {                                                 // subnormal result
    const int shift = 126 - static_cast<int>(magnitude >> 23);
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    return {static_cast<uint16_t>(sign | atrous::emulation::shift_right_rounded(mantissa, shift))};
  }
  return {static_cast<uint16_t>(sign | (atrous::emulation::shift_right_rounded(magnitude, 13) - (112u << 10)))};
}
