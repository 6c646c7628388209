// Reports every memory access of a shared library to the emulation's checkers.
//
// A library compiled with -fsanitize=thread calls a function before each access; it is linked without that flag, and one of
// its files includes this header, which defines those functions: they take the place of ThreadSanitizer's own.
#pragma once

#include "cuda.h"

#define ATROUS_ACCESS_HOOK extern "C" __attribute__((visibility("hidden"), no_sanitize("thread")))

namespace atrous {
namespace emulation __attribute__((visibility("hidden"))) {

__attribute__((no_sanitize("thread"))) inline void report(const void* address, size_t bytes, bool write) {
  if (Machine* const machine = Machine::in_use) machine->access(address, bytes, write);
}

}  // namespace emulation
}  // namespace atrous

#define ATROUS_ACCESS_HOOKS(bytes)                                                                             \
  ATROUS_ACCESS_HOOK void __tsan_read##bytes(void* p) { ::atrous::emulation::report(p, bytes, false); }            \
  ATROUS_ACCESS_HOOK void __tsan_write##bytes(void* p) { ::atrous::emulation::report(p, bytes, true); }            \
  ATROUS_ACCESS_HOOK void __tsan_unaligned_read##bytes(void* p) { ::atrous::emulation::report(p, bytes, false); }  \
  ATROUS_ACCESS_HOOK void __tsan_unaligned_write##bytes(void* p) { ::atrous::emulation::report(p, bytes, true); }

ATROUS_ACCESS_HOOKS(1)
ATROUS_ACCESS_HOOKS(2)
ATROUS_ACCESS_HOOKS(4)
ATROUS_ACCESS_HOOKS(8)
ATROUS_ACCESS_HOOKS(16)
ATROUS_ACCESS_HOOK void __tsan_read_range(void* p, size_t n) { ::atrous::emulation::report(p, n, false); }
ATROUS_ACCESS_HOOK void __tsan_write_range(void* p, size_t n) { ::atrous::emulation::report(p, n, true); }
ATROUS_ACCESS_HOOK void __tsan_init() {}
ATROUS_ACCESS_HOOK void __tsan_func_entry(void*) {}
ATROUS_ACCESS_HOOK void __tsan_func_exit() {}
ATROUS_ACCESS_HOOK void __tsan_vptr_update(void**, void*) {}
// Guards of static variables; one operating-system thread runs all of this.
ATROUS_ACCESS_HOOK unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }
