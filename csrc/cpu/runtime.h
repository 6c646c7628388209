// What the drivers need around the kernels: the table in use, the framework's threads, scratch memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace atrous::cpu {

// The selected instruction set (isa.h); chosen once per process.
enum class Isa { portable, avx2, avx512, avx512_bf16 };
Isa isa();

// Its table of one kind.
template <class Table> const Table& table() {
  switch (isa()) {
#if defined(ATROUS_X86)
    case Isa::avx512_bf16: return Tables<Table>::avx512_bf16();
    case Isa::avx512: return Tables<Table>::avx512();
    case Isa::avx2: return Tables<Table>::avx2();
#endif
    default: return Tables<Table>::portable();
  }
}

inline const Kernels& kernels() { return table<Kernels>(); }

// Threads that a call of about `flops` operations should be spread over: never more than the framework's setting.
int64_t threads_for(double flops);

// body(begin, end) over parts of [0, count), on the framework's own pool.
void parallel_ranges(int64_t count, int64_t threads, void (*body)(int64_t begin, int64_t end, void* context),
                     void* context);

template <class Body> void parallel(int64_t count, int64_t threads, const Body& body) {
  parallel_ranges(
      count, threads,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// body(begin, end) over consecutive tasks, every thread with an equal share of the cost.
template <class Body> void parallel_by_cost(const std::vector<int64_t>& cost, int64_t threads, const Body& body) {
  std::vector<int64_t> before{0};
  before.reserve(cost.size() + 1);
  for (const int64_t one : cost) before.push_back(before.back() + one);
  const auto task = [&](int64_t part) {
    if (part == threads) return static_cast<int64_t>(cost.size());
    const int64_t share = before.back() * part / threads;
    return static_cast<int64_t>(std::lower_bound(before.begin(), before.end(), share) - before.begin());
  };
  parallel(threads, threads, [&](int64_t part, int64_t part_end) { body(task(part), task(part_end)); });
}

// 64-byte aligned scratch memory, kept by the calling thread for its next call (fresh pages cost as much as the arithmetic
// of a small convolution). With ATROUS_POISON=1 it starts as NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T> T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
  size_t capacity_;
};

}  // namespace atrous::cpu
