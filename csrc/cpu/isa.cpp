#include "isa.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace atrous::cpu {
namespace {

struct Candidate {
  const char* name;
  bool present;
};

// AVX-512 means the subset that every server part since 2017 has: F, BW, VL, DQ. The compiler's cpu_supports also asks
// the operating system whether it saves the wide registers.
std::vector<Candidate> built() {
  std::vector<Candidate> isas{{"portable", true}};
#if defined(ATROUS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  isas.push_back({"avx2", avx2});
  isas.push_back({"avx512", avx512});
  isas.push_back({"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
  return isas;
}

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Candidate& isa : built()) names.emplace_back(isa.name);
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(ATROUS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) names.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) names.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) names.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) names.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) names.emplace_back("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) names.emplace_back("avx512dq");
  if (__builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512bf16");
#endif
  return names;
}

std::string selected_isa() {
  const char* value = std::getenv("ATROUS_CPU_ISA");
  const std::string cap = value != nullptr ? value : "";
  std::string best;
  for (const Candidate& isa : built()) {
    if (isa.present) best = isa.name;
    if (cap != isa.name) continue;
    if (isa.present) return best;
    fail("ATROUS_CPU_ISA=", cap, ": this CPU does not have that instruction set; the best it has is ", best);
  }
  if (cap.empty()) return best;
  std::string names;
  for (const std::string& name : built_isas()) names.append(names.empty() ? "" : ", ").append(name);
  fail("ATROUS_CPU_ISA=", cap, " is unknown: expected one of ", names);
}

}  // namespace atrous::cpu
