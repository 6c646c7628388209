// Fibres: many stacks, one operating-system thread, switched by hand. Each emulated GPU thread runs on one of them.
//
// On x86-64 a switch saves the six registers that a called function must preserve and swaps the stack pointer (a few
// nanoseconds). Elsewhere, or with ATROUS_EMULATION_UCONTEXT defined, <ucontext.h> does the same with a system call per
// switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__) && !defined(ATROUS_EMULATION_UCONTEXT)
#define ATROUS_EMULATION_UCONTEXT
#endif

#ifdef ATROUS_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace atrous {
namespace emulation __attribute__((visibility("hidden"))) {

#ifndef ATROUS_EMULATION_UCONTEXT

#if defined(__GNUC__) && !defined(__clang__)
#define ATROUS_EMULATION_OPAQUE naked, noinline, noipa
#else
#define ATROUS_EMULATION_OPAQUE naked, noinline
#endif

// Saves the running context's stack pointer in *save and continues the context whose stack pointer is load.
// Opaque to the optimiser: it must not conclude from the body which registers survive.
__attribute__((ATROUS_EMULATION_OPAQUE)) inline void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

class Context {
 public:
  // Makes the next switch to this context call entry, which must never return, on the given stack.
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<void**>(top);
    *--frame = nullptr;                           // keeps the stack aligned as the calling convention wants it at entry
    *--frame = reinterpret_cast<void*>(entry);    // what `ret` jumps to
    for (int i = 0; i < 6; ++i) *--frame = nullptr;
    stack_pointer_ = frame;
  }
  static void change(Context& from, Context& to) { switch_stack(&from.stack_pointer_, to.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

#else

class Context {
 public:
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

// One stack per emulated thread, kept between launches. The lowest page of each is unreadable, so that an overflow
// stops the program at the fault instead of overwriting a neighbour.
class Stacks {
 public:
  static constexpr size_t bytes = 64 * 1024;

  unsigned char* operator[](size_t i) {
    while (stacks_.size() <= i) {
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE) != 0)
        throw std::runtime_error("emulation: cannot allocate a stack of " + std::to_string(bytes) + " bytes");
      stacks_.push_back(static_cast<unsigned char*>(memory));
    }
    return stacks_[i];
  }

 private:
  std::vector<unsigned char*> stacks_;
};

}  // namespace emulation
}  // namespace atrous
