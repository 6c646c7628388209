// Stores that bypass the caches, for results larger than any cache: a line that is written whole need not be read first.
// Each piece is made, or lies already, in a first- or second-level cache, and leaves it from there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace atrous::cpu {

#if defined(__SSE2__)
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  constexpr int64_t line = 64;
  const int64_t head = std::min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(dst) % line));
  std::memcpy(dst, src, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + line <= bytes; i += line)
    for (int64_t j = i; j < i + line; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + j)));
  std::memcpy(dst + i, src + i, static_cast<size_t>(bytes - i));
}
inline void stream_end() { _mm_sfence(); }
#else
inline void stream_copy(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }
inline void stream_end() {}
#endif

// Writes one thread's pieces of a result of `bytes`.
class Writer {
 public:
  explicit Writer(int64_t bytes) : streams_(bytes >= beyond_caches) {}
  ~Writer() {
    if (streams_) stream_end();  // others read the result once this thread says that it is done
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void copy(void* to, const void* from, int64_t bytes) const {
    if (streams_) stream_copy(to, from, bytes);
    else std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  // Where to make a piece that belongs to `to`: there, or in the stage that `finish` copies from.
  template <class T> T* place(T* to, T* stage) const { return streams_ ? stage : to; }
  template <class T> void finish(T* to, const T* made, int64_t size) const {
    if (made != to) stream_copy(to, made, size * static_cast<int64_t>(sizeof(T)));
  }

 private:
  static constexpr int64_t beyond_caches = 16 << 20;  // gone from the caches before anybody reads it
  const bool streams_;
};

}  // namespace atrous::cpu
