// Which instruction set the kernels of this machine use.
#pragma once

namespace irkit {

enum class Isa { generic, avx2, avx512, neon };

// The best that this machine has and that this build has kernels for. The environment variable IRKIT_ISA names a
// lesser one; what this machine cannot run is not taken.
Isa best_isa();

const char* isa_name(Isa isa);

}  // namespace irkit

extern "C" {

// The name of best_isa().
const char* irkit_isa();

// Rises with every change to what Python calls, so that it calls no other library than its own.
int irkit_abi_version();

}  // extern "C"
