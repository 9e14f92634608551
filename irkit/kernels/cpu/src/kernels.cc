// The kernels, written once in sixteen lanes and compiled once for each instruction set: IRKIT_ISA names it.
#include "kernels.h"

#define IRKIT_JOIN_(a, b) a##b
#define IRKIT_JOIN(a, b) IRKIT_JOIN_(a, b)
#define IRKIT_NUMBER_generic 0
#define IRKIT_NUMBER_avx2 1
#define IRKIT_NUMBER_avx512 2
#define IRKIT_NUMBER_neon 3
#define IRKIT_NUMBER IRKIT_JOIN(IRKIT_NUMBER_, IRKIT_ISA)

#if IRKIT_NUMBER == 1
#include "simd_avx2.h"
#elif IRKIT_NUMBER == 2
#include "simd_avx512.h"
#elif IRKIT_NUMBER == 3
#include "simd_neon.h"
#else
#include "simd_generic.h"
#endif

#ifdef __clang__
#define IRKIT_UNROLL _Pragma("unroll")
#else
#define IRKIT_UNROLL _Pragma("GCC unroll 16")
#endif

// Everything lies in an anonymous namespace: a function shared between instruction sets could be taken by the
// linker from a file whose instructions the machine does not have.
namespace irkit {
namespace {

#include "product.inl"

#include "attention.inl"

#include "reduce.inl"

}  // namespace

extern const Kernels IRKIT_JOIN(kernels_, IRKIT_ISA);
#define IRKIT_STRING_(a) #a
#define IRKIT_STRING(a) IRKIT_STRING_(a)
const Kernels IRKIT_JOIN(kernels_, IRKIT_ISA) = {
    IRKIT_STRING(IRKIT_ISA), kTileRows,   prepare, multiply,      attend_few,
    merge,                   attend_many, pattern, norm,          gate,
    rotate,                  to_half,     group_largest, sum_exponentials,
};

}  // namespace irkit
