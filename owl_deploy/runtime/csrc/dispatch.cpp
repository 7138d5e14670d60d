// Which kernels this processor can run. Compiled without any instruction-set flag.
#include <strings.h>

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace owl {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avxvnni() {
#ifdef OWL_EVEX
  return has_avx2() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return has_avx2() && __builtin_cpu_supports("avxvnni");
#endif
}
bool has_avx512f() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512vnni() {
  return has_avx512f() && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
// Linux gives a process tiles when it asks for them, unless a thread's signal stack is too small to
// save them on; whoever has them may ask again.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
const Candidate kCandidates[] = {{&kAmxKernels, has_amx},
                                 {&kAvx512Kernels, has_avx512},
                                 {&kAvx512VnniKernels, has_avx512vnni},
                                 {&kAvxVnniKernels, has_avxvnni},
                                 {&kAvx512fKernels, has_avx512f},
                                 {&kAvx2Kernels, has_avx2},
                                 {&kPortableKernels, always}};
#elif defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every processor that Apple ever put into a computer
#endif
}
const Candidate kCandidates[] = {{&kNeonKernels, has_dot_products}, {&kPortableKernels, always}};
#else
const Candidate kCandidates[] = {{&kPortableKernels, always}};
#endif

}  // namespace

const char* kernel_name(std::size_t i) {
  return i < std::size(kCandidates) ? kCandidates[i].kernels->name : nullptr;
}

const Kernels* find_kernels(const char* name) {
  for (const Candidate& c : kCandidates)
    if (name != nullptr && strcasecmp(c.kernels->name, name) == 0)
      return c.supported() ? c.kernels : nullptr;
  return nullptr;
}

const Kernels& kernels_named(const char* name, const char* asker) {
  if (const Kernels* found = find_kernels(name)) return *found;
  std::string known;
  for (const Candidate& c : kCandidates)
    if (c.supported()) known += std::string(known.empty() ? "" : ", ") + c.kernels->name;
  throw std::invalid_argument(std::string(asker) + " is '" + name +
                              "', but the kernels that run here are: " + known);
}

const Kernels& best_kernels() {
  static const Kernels& best = []() -> const Kernels& {
    const char* wanted = std::getenv("OWL_ISA");
    if (wanted != nullptr && *wanted != '\0') return kernels_named(wanted, "OWL_ISA");
    for (const Candidate& c : kCandidates)
      if (c.supported()) return *c.kernels;
    return kPortableKernels;
  }();
  return best;
}

}  // namespace owl
