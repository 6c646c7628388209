// The machine that runs the blocks of an emulated launch: threads as fibres, barriers, shared memory, asynchronous copies, and
// the checks on all of them. What kernels see of it is in cuda.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fibers.h"
#include "race_checker.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace atrous {
namespace emulation __attribute__((visibility("hidden"))) {

constexpr int warp_size = 32;
constexpr size_t max_threads = 1024;
constexpr size_t max_static_shared = 48 * 1024;
constexpr size_t max_shared = 227 * 1024;  // what a block can ask for on sm_90
constexpr size_t guard_bytes = 64;
constexpr size_t arena_bytes = 2 * max_shared;

enum class Schedule { ascending, descending, shuffled };

struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

enum class State { ready, at_block_barrier, at_warp_barrier, done };

// An asynchronous copy that has not arrived. `group`: how many commits its thread had made before.
struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  size_t bytes;
  int group;
};

struct Thread {
  std::vector<Copy> copies;
  int groups;  // commits so far
  Context context;
  uint3 index;
  State state;
  uint32_t mask;  // of the warp barrier it waits at
  bool orders_memory;
  Site site;      // of the barrier it waits at
};

// Everything about the block being run. There is one: launches are serialised, blocks run one after the other.
class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // The machine once it has run something: reports of accesses come earlier, too.
  static inline Machine* in_use = nullptr;

  Thread* current = nullptr;
  uint3 block_index{};
  dim3 block_size, grid_size;
  std::mutex mutex;
  Schedule schedule = Schedule::ascending;
  uint32_t schedule_seed = 0;

  template <typename Kernel, typename Arguments>
  void run_grid(Kernel kernel, const Arguments& arguments, dim3 grid, dim3 block, size_t dynamic_bytes) {
    const size_t count = static_cast<size_t>(block.x) * block.y * block.z;
    if (count == 0 || count > max_threads) fail("a block of " + std::to_string(count) + " threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
      fail("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
    if (dynamic_bytes > max_shared) fail(std::to_string(dynamic_bytes) + " bytes of dynamic shared memory");
    struct Call {
      Kernel kernel;
      const Arguments* arguments;
    } call{kernel, &arguments};
    call_ = &call;
    in_use = this;
    invoke_ = [](void* opaque) {
      auto* c = static_cast<Call*>(opaque);
      std::apply(c->kernel, *c->arguments);
    };
    block_size = block;
    grid_size = grid;
    dynamic_bytes_ = dynamic_bytes;
    threads_.resize(count);
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          block_index = {x, y, z};
          run_block();
        }
  }

  // The address of one shared array: the same for all threads of a block, 0xFF in every byte when a block starts.
  void* shared_array(uint64_t& owner, size_t& offset, size_t bytes, size_t alignment, const char* name) {
    if (owner != serial_) {
      owner = serial_;
      static_bytes_ += bytes;
      if (static_bytes_ > max_static_shared || static_bytes_ + dynamic_bytes_ > max_shared ||
          arena_used_ + bytes + alignment + 2 * guard_bytes > arena_bytes)
        fail_in_thread(std::to_string(static_bytes_) + " bytes of static and " + std::to_string(dynamic_bytes_) +
                       " bytes of dynamic shared memory");
      offset = reserve(bytes, alignment, name);
    }
    return arena_ + offset;
  }

  // Tells the checkers of an access by the current thread; memory that is not shared is of no interest.
  void access(const void* address, size_t bytes, bool write) {
    const size_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(arena_);
    if (offset >= arena_bytes || !current || checking_) return;
    checking_ = true;  // this function's own accesses are reported as well
    const char* const verb = write ? "writes " : "reads ";
    if (arriving_bytes_ > 0)
      for (size_t i = offset; i < offset + bytes; ++i)
        if (arriving_[i]) fail_in_thread(verb + name_of(i) + ", where an asynchronous copy has not arrived", current->site);
    const int other = races_.access(offset, bytes, write, index_of_current());
    if (other != RaceChecker::nobody)
      fail_in_thread(verb + name_of(offset) + " without a barrier since an access by " +
                         describe(threads_[static_cast<size_t>(other)], false) +
                         (current->site.file ? "; its last barrier was" : ""),
                     current->site);
    checking_ = false;
  }

  void copy_async(void* to, const void* from, size_t bytes, bool exists, Site site) {
    const size_t offset = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(arena_);
    if (offset >= arena_bytes) fail_in_thread("an asynchronous copy to what is not shared memory", site);
    if (offset % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
      fail_in_thread("an asynchronous copy of " + std::to_string(bytes) + " bytes between misaligned addresses", site);
    access(to, bytes, true);
    arriving_.resize(arena_bytes);
    for (size_t i = offset; i < offset + bytes; ++i) arriving_[i] = true;
    arriving_bytes_ += bytes;
    std::memset(to, 0xFF, bytes);
    current->copies.push_back({static_cast<unsigned char*>(to),
                               exists ? static_cast<const unsigned char*>(from) : nullptr, bytes, current->groups});
  }

  void commit_copies() { ++current->groups; }

  // Until at most `pending` of the thread's latest groups are under way.
  void wait_copies(int pending) {
    std::vector<Copy>& copies = current->copies;
    size_t left = 0;
    for (const Copy& copy : copies) {
      if (copy.group >= current->groups - pending) {
        copies[left++] = copy;
        continue;
      }
      std::fill_n(arriving_.begin() + (copy.to - arena_), copy.bytes, false);
      arriving_bytes_ -= copy.bytes;
      access(copy.to, copy.bytes, true);
      if (copy.from)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
    copies.resize(left);
  }

  void* dynamic_shared() { return arena_ + dynamic_offset_; }

  void wait_block(Site site) {
    current->state = State::at_block_barrier;
    current->site = site;
    Context::change(current->context, scheduler_);
  }

  // orders_memory: as __syncwarp does and shuffles do not.
  void wait_warp(uint32_t mask, bool orders_memory, Site site) {
    if (!(mask >> lane() & 1u)) fail_in_thread("warp operation whose mask lacks the calling lane", site);
    current->state = State::at_warp_barrier;
    current->mask = mask;
    current->orders_memory = orders_memory;
    current->site = site;
    Context::change(current->context, scheduler_);
  }

  int lane() const { return static_cast<int>(index_of_current() % warp_size); }

  // 32 slots of 256 bytes, through which the lanes of the calling thread's warp exchange values.
  unsigned char* warp_slots() {
    return slots_[index_of_current() / warp_size].data();
  }

  // Ends the launch from inside a thread; the other fibres are simply never continued.
  [[noreturn]] void fail_in_thread(const std::string& what, Site site = {nullptr, 0}) {
    checking_ = false;
    error_ = describe(*current, false) + ": " + what;
    if (site.file) error_ += std::string(" (") + site.file + ":" + std::to_string(site.line) + ")";
    Context::change(current->context, scheduler_);
    std::abort();  // unreachable: a failed block is not continued
  }

 private:
  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error("emulated launch: " + what); }

  static void thread_main() {
    Machine& machine = get();
    machine.invoke_(machine.call_);
    if (!machine.current->copies.empty())
      machine.fail_in_thread("returns while its asynchronous copies are under way");
    machine.current->state = State::done;
    Context::change(machine.current->context, machine.scheduler_);
  }

  size_t index_of_current() const { return static_cast<size_t>(current - threads_.data()); }

  size_t reserve(size_t bytes, size_t alignment, const char* name) {
    const size_t offset = (arena_used_ + guard_bytes + alignment - 1) / alignment * alignment;
    guards_.emplace_back(arena_used_, offset);
    arrays_.push_back({offset, name});
    arena_used_ = offset + bytes;
    return offset;
  }

  // The byte of a shared array, for messages.
  std::string name_of(size_t offset) const {
    std::string name;
    for (const auto& [start, array] : arrays_)
      if (start <= offset) name = std::string(array) + " + " + std::to_string(offset - start) + " bytes";
    return name;
  }

  void run_block() {
    const size_t count = threads_.size();
    std::memset(arena_, 0xFF, arena_used_ + guard_bytes);
    guards_.clear();
    arrays_.clear();
    error_.clear();
    std::fill(arriving_.begin(), arriving_.end(), false);
    arriving_bytes_ = 0;
    arena_used_ = static_bytes_ = 0;
    ++serial_;
    dynamic_offset_ = reserve(dynamic_bytes_, 1024, "dynamic shared memory");
    races_.start_block(count);
    for (size_t i = 0; i < count; ++i) {
      Thread& t = threads_[i];
      const auto n = static_cast<unsigned>(i);
      t.index = {n % block_size.x, n / block_size.x % block_size.y, n / block_size.x / block_size.y};
      t.state = State::ready;
      t.site = {nullptr, 0};
      t.copies.clear();
      t.groups = 0;
      t.context.start(stacks_[i], Stacks::bytes, &thread_main);
    }
    order_.resize(count);
    for (size_t i = 0; i < count; ++i) order_[i] = schedule == Schedule::descending ? count - 1 - i : i;
    std::mt19937 random(schedule_seed);
    for (;;) {
      if (schedule == Schedule::shuffled) std::shuffle(order_.begin(), order_.end(), random);
      for (size_t i : order_) {
        if (threads_[i].state != State::ready) continue;
        current = &threads_[i];
        Context::change(scheduler_, current->context);
        current = nullptr;
        if (!error_.empty()) fail(error_);
      }
      const auto done = [](const Thread& t) { return t.state == State::done; };
      if (std::all_of(threads_.begin(), threads_.end(), done)) break;
      if (!release()) fail("deadlock: " + stuck());
    }
    check_guards();
  }

  // Lets everybody continue who waits at a complete barrier; false if nobody can.
  bool release() {
    bool any = false;
    const Thread& first = threads_.front();
    if (std::all_of(threads_.begin(), threads_.end(), [&](const Thread& t) {
          return t.state == State::at_block_barrier && t.site == first.site;
        })) {
      for (Thread& t : threads_) t.state = State::ready;
      races_.block_barrier();
      return true;
    }
    for (size_t base = 0; base < threads_.size(); base += warp_size) {
      const size_t lanes = std::min<size_t>(warp_size, threads_.size() - base);
      for (size_t leader = 0; leader < lanes; ++leader) {
        const Thread& t = threads_[base + leader];
        if (t.state != State::at_warp_barrier) continue;
        bool complete = true;
        for (size_t i = 0; i < warp_size; ++i)
          if (t.mask >> i & 1u)
            complete = complete && i < lanes && threads_[base + i].state == State::at_warp_barrier &&
                       threads_[base + i].mask == t.mask && threads_[base + i].site == t.site;
        if (!complete) continue;
        const uint32_t mask = t.mask;
        if (t.orders_memory) races_.warp_barrier(base, mask);
        for (size_t i = 0; i < lanes; ++i)
          if (mask >> i & 1u) threads_[base + i].state = State::ready;
        any = true;
      }
    }
    return any;
  }

  std::string describe(const Thread& t, bool with_state) const {
    std::string text = "thread (" + std::to_string(t.index.x) + "," + std::to_string(t.index.y) + "," +
                       std::to_string(t.index.z) + ") of block (" + std::to_string(block_index.x) + "," +
                       std::to_string(block_index.y) + "," + std::to_string(block_index.z) + ")";
    if (!with_state) return text;
    if (t.state == State::done) return text + " has returned";
    text += t.state == State::at_block_barrier ? " waits for the block at " : " waits for its warp at ";
    return text + t.site.file + ":" + std::to_string(t.site.line);
  }

  // One example of every different state, enough to see who waits for whom.
  std::string stuck() const {
    std::string text;
    std::vector<const Thread*> shown;
    for (const Thread& t : threads_) {
      const bool known = std::any_of(shown.begin(), shown.end(), [&](const Thread* s) {
        return s->state == t.state && (t.state == State::done || (s->site == t.site && s->mask == t.mask));
      });
      if (known) continue;
      shown.push_back(&t);
      text += (text.empty() ? "" : "; ") + describe(t, true);
    }
    return text;
  }

  void check_guards() {
    guards_.emplace_back(arena_used_, arena_used_ + guard_bytes);
    for (const auto& [begin, end] : guards_)
      for (size_t i = begin; i < end; ++i)
        if (arena_[i] != 0xFF)
          fail("a write outside its shared array in block (" + std::to_string(block_index.x) + "," +
               std::to_string(block_index.y) + "," + std::to_string(block_index.z) + ")");
  }

  Context scheduler_;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<size_t> order_;
  std::array<std::array<unsigned char, 256 * warp_size>, max_threads / warp_size> slots_;
  alignas(1024) unsigned char arena_[arena_bytes];
  std::vector<std::pair<size_t, size_t>> guards_;
  size_t arena_used_ = arena_bytes - guard_bytes;  // everything is still to be poisoned
  size_t static_bytes_ = 0, dynamic_bytes_ = 0, dynamic_offset_ = 0;
  uint64_t serial_ = 0;
  std::vector<std::pair<size_t, const char*>> arrays_;  // where each starts, ascending
  RaceChecker races_;
  std::vector<bool> arriving_;  // bytes of asynchronous copies under way
  size_t arriving_bytes_ = 0;
  bool checking_ = false;
  std::string error_;
  void (*invoke_)(void*) = nullptr;
  void* call_ = nullptr;
};

inline void set_schedule(Schedule schedule, uint32_t seed = 0) {
  Machine::get().schedule = schedule;
  Machine::get().schedule_seed = seed;
}

}  // namespace emulation
}  // namespace atrous
