#include "cpu_features.h"

#include <cstdlib>
#include <cstring>

#include "api.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#ifndef HWCAP_ASIMDHP
#define HWCAP_ASIMDHP (1 << 10)
#endif
#endif

namespace irkit {
namespace {

bool has(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
#if defined(__x86_64__)
    // These look at what the operating system saves, too; older compilers do not know all names.
    case Isa::avx2: {
      unsigned a, b, c, d;
      const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
      return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    case Isa::avx512:
      return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#elif defined(__aarch64__) && defined(__APPLE__)
    case Isa::neon: {
      int value = 0;
      size_t size = sizeof value;
      return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
    }
#elif defined(__aarch64__) && defined(__linux__)
    case Isa::neon: {
      constexpr unsigned long kNeeded = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
      return (getauxval(AT_HWCAP) & kNeeded) == kNeeded;
    }
#endif
    default:
      return false;
  }
}

Isa find_best() {
  const char* wanted = std::getenv("IRKIT_ISA");
  constexpr Isa kBestFirst[] = {Isa::neon, Isa::avx512, Isa::avx2, Isa::generic};
  for (Isa isa : kBestFirst) {
    if (wanted && std::strcmp(wanted, isa_name(isa)) == 0 && has(isa)) return isa;
  }
  for (Isa isa : kBestFirst) {
    if (has(isa)) return isa;
  }
  return Isa::generic;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::neon:
      return "neon";
    case Isa::generic:
      break;
  }
  return "generic";
}

Isa best_isa() {
  static const Isa best = find_best();
  return best;
}

}  // namespace irkit

IRKIT_API const char* irkit_isa() { return irkit::isa_name(irkit::best_isa()); }

IRKIT_API int irkit_abi_version() { return 1; }
