// The kernels for the best instruction set that this machine has.
#include "cpu_features.h"
#include "kernels.h"

namespace irkit {

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (best_isa()) {
#if defined(__x86_64__)
      case Isa::avx512:
        return kernels_avx512;
      case Isa::avx2:
        return kernels_avx2;
#elif defined(__aarch64__)
      case Isa::neon:
        return kernels_neon;
#endif
      default:
        return kernels_generic;
    }
  }();
  return chosen;
}

}  // namespace irkit
