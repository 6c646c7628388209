#include "fingerprint.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime.h"

namespace atrous::cpu {
namespace {

constexpr int64_t piece_bytes = 64 << 10;
constexpr int lanes = 16;  // independent chains, so that the loop runs at the speed of memory

uint64_t mix(uint64_t digest, uint64_t word) { return ((digest << 5) | (digest >> 59)) + word; }

// Every step is invertible in the word and in the digest, so one changed word always changes the result.
uint64_t piece_digest(const char* data, int64_t bytes) {
  uint64_t digest[lanes] = {};
  int64_t at = 0;
  for (; at + lanes * 8 <= bytes; at += lanes * 8) {
    uint64_t words[lanes];
    std::memcpy(words, data + at, sizeof words);
    for (int i = 0; i < lanes; ++i) digest[i] = mix(digest[i], words[i]);
  }
  uint64_t result = 0;
  for (; at < bytes; ++at) result = mix(result, static_cast<unsigned char>(data[at]));
  for (const uint64_t one : digest) result = mix(result * 0x9e3779b97f4a7c15u, one);
  return result;
}

}  // namespace

int64_t fingerprint(const void* data, int64_t bytes) {
  const int64_t pieces = (bytes + piece_bytes - 1) / piece_bytes;
  std::vector<uint64_t> digests(static_cast<size_t>(pieces));
  parallel(pieces, threads_for(static_cast<double>(bytes)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      digests[i] = piece_digest(static_cast<const char*>(data) + i * piece_bytes,
                                std::min(piece_bytes, bytes - i * piece_bytes));
  });
  uint64_t result = static_cast<uint64_t>(bytes);
  for (const uint64_t one : digests) result = mix(result * 0x9e3779b97f4a7c15u, one);
  return static_cast<int64_t>(result);
}

}  // namespace atrous::cpu
