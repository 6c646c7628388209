// Who touched which byte of shared memory since when: finds accesses of two threads, one of them a write, that no barrier
// orders, whatever order the threads happened to run in.
//
// A barrier of the block orders everything before it with everything after it: an epoch. Within an epoch only __syncwarp
// orders, and only the lanes of its mask: every lane counts its own __syncwarps (clock) and knows up to which clock it has
// met each lane of its warp. Shuffles and other warp-wide operations order no memory accesses. Of a byte it is enough to
// know the last write and the reads since then.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace atrous {
namespace emulation __attribute__((visibility("hidden"))) {

class RaceChecker {
 public:
  static constexpr size_t lanes = 32;
  static constexpr int nobody = -1;

  void start_block(size_t threads) {
    ++epoch_;
    clock_.assign(threads, 1);
    met_.assign(threads, {});
  }
  void block_barrier() { ++epoch_; }
  void warp_barrier(size_t first_thread, uint32_t mask) {
    std::array<uint32_t, lanes> met{};
    for (size_t lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1u) {
        for (size_t other = 0; other < lanes; ++other) met[other] = std::max(met[other], met_[first_thread + lane][other]);
        met[lane] = std::max(met[lane], clock_[first_thread + lane]++);
      }
    for (size_t lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1u) met_[first_thread + lane] = met;
  }

  // The thread whose earlier access to one of the bytes is not ordered with this one, or nobody.
  int access(size_t offset, size_t bytes, bool write, size_t thread) {
    if (bytes_.size() < offset + bytes) bytes_.resize(offset + bytes);
    int other = nobody;
    for (size_t i = offset; i < offset + bytes && other == nobody; ++i)
      other = write ? write_byte(bytes_[i], thread) : read_byte(bytes_[i], thread);
    return other;
  }

 private:
  struct Byte {
    uint64_t write_epoch = 0, read_epoch = 0;
    uint32_t write_clock = 0;
    int writer = nobody;
    int reading_warp = nobody, reader_of_another_warp = nobody;
    std::array<uint32_t, lanes> read_clock{};  // of the lanes of reading_warp
  };

  bool ordered(size_t earlier, uint32_t clock, size_t thread) const {
    return earlier == thread || (earlier / lanes == thread / lanes && met_[thread][earlier % lanes] >= clock);
  }
  int unordered_writer(const Byte& byte, size_t thread) const {
    if (byte.write_epoch != epoch_ || ordered(static_cast<size_t>(byte.writer), byte.write_clock, thread)) return nobody;
    return byte.writer;
  }

  int read_byte(Byte& byte, size_t thread) {
    if (const int writer = unordered_writer(byte, thread); writer != nobody) return writer;
    const int warp = static_cast<int>(thread / lanes);
    if (byte.read_epoch != epoch_) {
      byte.read_epoch = epoch_;
      byte.reading_warp = warp;
      byte.reader_of_another_warp = nobody;
      byte.read_clock.fill(0);
    }
    if (byte.reading_warp == warp)
      byte.read_clock[thread % lanes] = clock_[thread];
    else
      byte.reader_of_another_warp = static_cast<int>(thread);
    return nobody;
  }

  int write_byte(Byte& byte, size_t thread) {
    if (const int writer = unordered_writer(byte, thread); writer != nobody) return writer;
    if (byte.read_epoch == epoch_) {
      for (size_t lane = 0; lane < lanes; ++lane) {
        const size_t reader = static_cast<size_t>(byte.reading_warp) * lanes + lane;
        if (byte.read_clock[lane] > 0 && !ordered(reader, byte.read_clock[lane], thread)) return static_cast<int>(reader);
      }
      // Ordered with all of reading_warp means: of that warp, so the other reader is of another one.
      if (byte.reader_of_another_warp != nobody) return byte.reader_of_another_warp;
      byte.read_epoch = 0;
    }
    byte.write_epoch = epoch_;
    byte.write_clock = clock_[thread];
    byte.writer = static_cast<int>(thread);
    return nobody;
  }

  uint64_t epoch_ = 0;
  std::vector<uint32_t> clock_;
  std::vector<std::array<uint32_t, lanes>> met_;
  std::vector<Byte> bytes_;
};

}  // namespace emulation
}  // namespace atrous
