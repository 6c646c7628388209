// A 64-bit digest of memory at memory speed, to notice that cached weights are no longer those of the tensor.
#pragma once

#include <cstdint>

namespace atrous::cpu {

// Changes with any single changed byte; equal for equal bytes, whatever the number of threads.
int64_t fingerprint(const void* data, int64_t bytes);

}  // namespace atrous::cpu
