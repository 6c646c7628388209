// Which instruction sets this machine has, which were built, and which one runs.
#pragma once

#include <string>
#include <vector>

namespace atrous::cpu {

// Everything the compiled kernels know, from the weakest to the strongest.
std::vector<std::string> built_isas();

// Features of this machine that matter to the kernels, by their usual names.
std::vector<std::string> cpu_features();

// The strongest built instruction set that this machine has, capped by the environment variable ATROUS_CPU_ISA.
// Throws std::runtime_error where that variable names an instruction set that is unknown, not built or not present.
std::string selected_isa();

}  // namespace atrous::cpu
