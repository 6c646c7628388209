// Runs CUDA kernels on the host, from the same source that nvcc compiles, without a GPU.
//
// A translation unit that sees this header instead of the CUDA runtime can be compiled by any C++17 compiler. Each
// thread of a block becomes a fibre (fibers.h) with its own stack. A fibre runs until it waits: at __syncthreads, at
// __syncwarp or inside a warp-wide operation (shuffles; built on warp_collective, which is also what matrix fragments
// need). The scheduler then runs the next one, and releases the waiting fibres when everybody has arrived. Blocks run
// one after the other. The code between two barriers is real, sequential machine code, so kernels run at a usable
// speed.
//
// What it is strict about, because a GPU would hang, race or return garbage there:
//  - A barrier that not every thread of the block (or lane of the mask) reaches, or reaches at different source lines,
//    ends the launch with an error that names threads and lines. Nothing ever hangs.
//  - Shared memory holds 0xFF in every byte (NaN in any floating-point type, -1 in any integer) when a block starts.
//    Guard bytes around each array are checked when the block ends. The sizes a GPU allows are enforced.
//  - The order in which threads run between barriers is arbitrary: set_schedule reverses or shuffles it. A kernel with
//    a missing barrier gives different results, or NaN, under different schedules; a right one gives the same bits.
//  - A shuffle that reads a lane outside its mask is an error.
//  - An asynchronous copy (tensor_core.h) has arrived when its thread has waited for it, not earlier: until then its
//    destination holds 0xFF. A thread that returns before that is an error.
//  - Where the compiler reports every access (checked builds: access_hooks.h), two accesses to shared memory that no
//    barrier orders are an error (race_checker.h), and so is one to a destination before the copy has arrived.
//
// Atomic addition is missing on purpose: no kernel of this library may use it. atomicCAS and atomicMin are there for the lattice's
// hash table, from which results do not depend on the order of the threads.
//
// The namespace is hidden: every shared library built with this header has a machine of its own, also within one
// process.
#pragma once

#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"
#include "numeric_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace atrous {
namespace emulation __attribute__((visibility("hidden"))) {

// Streams do nothing here, but a test can ask whether every launch was given the one it expects.
struct Streams {
  const void* expected = nullptr;
  int64_t launches = 0, elsewhere = 0;

  static Streams& get() {
    static Streams streams;
    return streams;
  }
  void note(const void* stream) {
    ++launches;
    if (stream != expected) ++elsewhere;
  }
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  Machine& machine = Machine::get();
  const std::lock_guard<std::mutex> lock(machine.mutex);
  const std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  machine.run_grid(kernel, values, grid, block, shared_bytes);
}

// A warp-wide operation: every lane of the mask publishes `mine`, and when all have, gets read(values of the 32 lanes).
// Shuffles are the simplest use; a matrix fragment operation publishes its registers and reads those of its group.
template <typename Value, typename Read>
auto warp_collective(uint32_t mask, const Value& mine, Read read, Site site) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) <= 256);
  Machine& machine = Machine::get();
  auto* lanes = reinterpret_cast<Value*>(machine.warp_slots());
  std::memcpy(static_cast<void*>(lanes + machine.lane()), &mine, sizeof(Value));
  machine.wait_warp(mask, false, site);
  auto result = read(static_cast<const Value*>(lanes));
  machine.wait_warp(mask, false, site);  // nobody publishes again before everybody has read
  return result;
}

template <typename Value>
Value shuffle(uint32_t mask, const Value& mine, int source, Site site) {
  return warp_collective(
      mask, mine,
      [&](const Value* lanes) {
        if (!(mask >> source & 1u))
          Machine::get().fail_in_thread("shuffle reads lane " + std::to_string(source) + " outside its mask", site);
        return lanes[source];
      },
      site);
}

}  // namespace emulation
}  // namespace atrous

#define threadIdx (::atrous::emulation::Machine::get().current->index)
#define blockIdx (::atrous::emulation::Machine::get().block_index)
#define blockDim (::atrous::emulation::Machine::get().block_size)
#define gridDim (::atrous::emulation::Machine::get().grid_size)
constexpr int warpSize = ::atrous::emulation::warp_size;

#define ATROUS_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(ATROUS_CALLER) { ::atrous::emulation::Machine::get().wait_block({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, ATROUS_CALLER) {
  ::atrous::emulation::Machine::get().wait_warp(mask, true, {file, line});
}

template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32, ATROUS_CALLER) {
  const int lane = ::atrous::emulation::Machine::get().lane();
  return ::atrous::emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), {file, line});
}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask, int width = 32, ATROUS_CALLER) {
  const int lane = ::atrous::emulation::Machine::get().lane();
  const int source = lane ^ lane_mask;
  // A lane beyond the end of the caller's segment is not read: the caller keeps its own value.
  return ::atrous::emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}

template <typename Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32, ATROUS_CALLER) {
  const int lane = ::atrous::emulation::Machine::get().lane();
  const int source = lane + static_cast<int>(delta);
  return ::atrous::emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}

template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32, ATROUS_CALLER) {
  const int lane = ::atrous::emulation::Machine::get().lane();
  const int source = lane - static_cast<int>(delta);
  return ::atrous::emulation::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, {file, line});
}

// Threads are fibres of one thread: nothing comes between a reading and its writing.
template <typename Value>
Value atomicCAS(Value* at, Value expected, Value desired) {
  const Value before = *at;
  if (before == expected) *at = desired;
  return before;
}

template <typename Value>
Value atomicMin(Value* at, Value value) {
  const Value before = *at;
  if (value < before) *at = value;
  return before;
}
