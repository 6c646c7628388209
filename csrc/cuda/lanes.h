// How the threads of a memory-bound kernel share channels and pixels, so that its accesses are wide in either layout.
#pragma once

#include "launch.h"

namespace atrous::cuda {

constexpr int lane_threads = 256;  // of a block

// Elements of a 16-byte access.
template <typename T>
constexpr int vector_width = 16 / sizeof(T);

// How the 256 threads of a block share channels (in units of V) and pixels; both counts are powers of two.
struct Lanes {
  int channels, pixels;
  bool channels_inner;
};

struct LaneIndex {
  int channel, pixel;
};

__device__ __forceinline__ LaneIndex lane_index(const Lanes& lanes, int thread) {
  if (lanes.channels_inner) return {thread % lanes.channels, thread / lanes.channels};
  return {thread / lanes.pixels, thread % lanes.pixels};
}

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* data) {
  return *reinterpret_cast<const Vector<T, V>*>(data);
}

inline int power_of_two_at_least(int64_t value, int most) {
  int power = 1;
  while (power < most && power < value) power *= 2;
  return power;
}

inline Lanes choose_lanes(int64_t channel_vectors, bool channels_inner) {
  // Channels innermost: a warp should read whole lines. Otherwise neighbouring threads take neighbouring pixels.
  const int channels = power_of_two_at_least(channel_vectors, channels_inner ? 32 : 4);
  return {channels, lane_threads / channels, channels_inner};
}

// Whether V neighbouring channels of every pixel can be accessed at once.
inline bool takes_vectors(const void* data, const Strides& s, int64_t element, int64_t V) {
  return s.c == 1 && s.n % V == 0 && s.h % V == 0 && s.w % V == 0 &&
         reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(V * element) == 0;
}

}  // namespace atrous::cuda
