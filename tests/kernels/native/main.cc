// Tests of the kernels without Python, for the sanitizers and for emulated machines. Runs with the instruction set that
// IRKIT_ISA names.
#include <cstdlib>

#include "cpu_features.h"
#include "test_kernels.h"
#include "test_layer.h"
#include "test_pool.h"
#include "test_sample.h"

int main() {
  const char* wanted = std::getenv("IRKIT_ISA");
  if (wanted && std::strcmp(wanted, "generic") == 0)
    expect(std::strcmp(irkit_isa(), wanted) == 0, "%s is chosen, not %s", irkit_isa(), wanted);
  expect(std::strcmp(kernels().name, irkit_isa()) == 0, "the kernels are %s, not %s", kernels().name, irkit_isa());
  std::printf("%s kernels\n", kernels().name);
  test_kernels();
  test_layers();
  test_pool();
  test_sample();
  if (failures > 0) std::fprintf(stderr, "%d failures\n", failures.load());
  return failures > 0;
}
