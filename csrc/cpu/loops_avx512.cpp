// The loops for x86-64 with AVX512. The standard headers come first, so that none of their code is
// compiled for AVX512.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#define MEGATRON_EXT_VECTORS  // F16C and FMA
#define MEGATRON_EXT_AVX512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif

#include "kernel.h"
#include "loops.h"

namespace megatron_ext {

void transform_avx512(const Record& r, Range range, Statistics s, Tally tally[kMoments]) {
  transform_any(r, range, s, tally);
}

Difference compare_avx512(const WeightPair& p, Range range) { return compare_any(p, range); }

}  // namespace megatron_ext

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
