#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "isa.h"

namespace atrous::cpu {
namespace {

// Below this much arithmetic a second thread costs more to wake than it brings.
constexpr double flops_per_thread = 2e5;

// Scratch kept per thread between calls; none for AddressSanitizer, which sees the bounds of fresh blocks only.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kept_bytes = 0;
#else
constexpr size_t kept_bytes = size_t{192} << 20;
#endif

struct Block {
  void* data;
  size_t capacity;
};

struct Cache {
  std::vector<Block> blocks;
  size_t bytes = 0;
  ~Cache() {
    for (const Block& block : blocks) std::free(block.data);
  }
};

Cache& cache() {
  thread_local Cache mine;
  return mine;
}

bool poison() {
  static const bool on = [] {
    const char* value = std::getenv("ATROUS_POISON");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return on;
}

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
    const std::string name = selected_isa();
    if (name == "avx512_bf16") return Isa::avx512_bf16;
    if (name == "avx512") return Isa::avx512;
    return name == "avx2" ? Isa::avx2 : Isa::portable;
  }();
  return chosen;
}

int64_t threads_for(double flops) {
  const int64_t available = torch::stable::get_num_threads();
  return std::clamp<int64_t>(static_cast<int64_t>(flops / flops_per_thread), 1, std::max<int64_t>(available, 1));
}

void parallel_ranges(int64_t count, int64_t threads, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count <= 0) return;
  if (threads <= 1) return body(0, count, context);
  const int64_t grain = (count + threads - 1) / threads;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

Scratch::Scratch(size_t bytes) : data_(nullptr), capacity_(bytes) {
  auto& blocks = cache().blocks;
  auto best = blocks.end();
  for (auto it = blocks.begin(); it != blocks.end(); ++it)
    if (it->capacity >= capacity_ && (best == blocks.end() || it->capacity < best->capacity)) best = it;
  if (best != blocks.end()) {
    data_ = best->data;
    capacity_ = best->capacity;
    cache().bytes -= best->capacity;
    blocks.erase(best);
  } else {
    // Not rounded up: a sanitizer then sees one element too many.
    if (posix_memalign(&data_, 64, capacity_) != 0) throw std::bad_alloc();
  }
  if (poison()) std::memset(data_, 0xff, capacity_);
}

Scratch::~Scratch() {
  Cache& mine = cache();
  if (mine.bytes + capacity_ > kept_bytes) {
    std::free(data_);
    return;
  }
  mine.bytes += capacity_;
  mine.blocks.push_back({data_, capacity_});
}

}  // namespace atrous::cpu
