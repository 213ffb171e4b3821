// The statistics of a block of fp32 values.
//
// Everything here has internal linkage or is forced inline, as in loops.h.

#pragma once

#include <cstdint>
#include <cstring>

#include "../tally.h"

namespace megatron_ext {
namespace {

// Adds the square of a value to a sum. The square of an fp32 value is exact in fp64, so that a
// fused multiply-add gives the same bits.
MEGATRON_EXT_INLINE double add_square(double sum, float x) {
  const double wide = x;
#if defined(MEGATRON_EXT_VECTORS)
  return __builtin_fma(wide, wide, sum);
#else
  return sum + wide * wide;
#endif
}

// In four sums, because an addition waits for the one before it.
MEGATRON_EXT_INLINE double sum_of_squares(const float* x, int64_t n) {
  double a = 0.0, b = 0.0, c = 0.0, d = 0.0;
  int64_t i = 0;
#if defined(MEGATRON_EXT_AVX512)
  // GCC loads 16 elements and takes them apart, which takes longer than the squares.
  const auto add = [x](__m512d sum, int64_t first) __attribute__((always_inline)) {
    const __m512d wide = _mm512_cvtps_pd(_mm256_loadu_ps(x + first));
    return _mm512_fmadd_pd(wide, wide, sum);
  };
  __m512d sums[4] = {};
  for (; i + 32 <= n; i += 32) {
    sums[0] = add(sums[0], i);
    sums[1] = add(sums[1], i + 8);
    sums[2] = add(sums[2], i + 16);
    sums[3] = add(sums[3], i + 24);
  }
  a = _mm512_reduce_add_pd((sums[0] + sums[1]) + (sums[2] + sums[3]));
#else
  const int64_t quarter = n / 4;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t j = 0; j < quarter; ++j) {
    a = add_square(a, x[j]);
    b = add_square(b, x[j + quarter]);
    c = add_square(c, x[j + 2 * quarter]);
    d = add_square(d, x[j + 3 * quarter]);
  }
  i = 4 * quarter;
#endif
  for (; i < n; ++i) {
    a = add_square(a, x[i]);
  }
  return (a + b) + (c + d);
}

// The bits of the largest magnitude, in the order of the magnitudes with NaN above infinity, and of
// the lowest value, which are negative if its sign is.
struct Extremes {
  int32_t magnitude = 0;
  int32_t lowest = 0;
};

// With S before and after, also counts the elements that differ, of which a NaN in both is one.
template <Statistics S>
MEGATRON_EXT_INLINE Extremes extremes(const float* before, const float* after, int64_t n,
                                      uint32_t& differing) {
  int32_t magnitude = 0;
  int32_t lowest = 0;
  uint32_t others = 0;
#pragma omp simd reduction(max : magnitude) reduction(min : lowest) reduction(+ : others)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t value = static_cast<int32_t>(bits(after[i]));
    const int32_t without_sign = value & 0x7FFFFFFF;
    magnitude = without_sign > magnitude ? without_sign : magnitude;
    lowest = value < lowest ? value : lowest;
    if constexpr (S == Statistics::before_and_after) {
      others += before[i] != after[i] ? 1u : 0u;
    }
  }
  differing = others;
  return {magnitude, lowest};
}

inline constexpr int32_t kLargestFinite = 0x7F7FFFFF;
inline constexpr int32_t kInfinity = 0x7F800000;

// Adds a block to the statistics. Values that are not finite or too low are rare, so that two
// integers find out whether there can be any. `before` is not read without the statistics of it.
template <Statistics S>
MEGATRON_EXT_INLINE void count_values(const float* before, const float* after, int64_t n,
                                      float lowest, Tally& tally) {
  tally.after += sum_of_squares(after, n);
  uint32_t changed = 0;
  const Extremes found = extremes<S>(before, after, n, changed);
  float largest = 0.0f;
  if (found.magnitude <= kLargestFinite && (lowest < 0.0f || found.lowest >= 0)) {
    std::memcpy(&largest, &found.magnitude, sizeof(largest));
  } else {
    uint32_t nonfinite = 0;
#pragma omp simd reduction(+ : nonfinite) reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) {
      Tally one;
      count<Statistics::after>(one, after[i], after[i], lowest);
      largest = one.largest > largest ? one.largest : largest;
      nonfinite += one.nonfinite;
    }
    tally.nonfinite += nonfinite;
  }
  tally.largest = largest > tally.largest ? largest : tally.largest;
  if constexpr (S == Statistics::before_and_after) {
    tally.before += sum_of_squares(before, n);
    if (found.magnitude > kInfinity) {  // NaN
      changed = 0;
#pragma omp simd reduction(+ : changed)
      for (int64_t i = 0; i < n; ++i) {
        changed += is_changed(before[i], after[i]) ? 1u : 0u;
      }
    }
    tally.changed += changed;
  }
}

}  // namespace
}  // namespace megatron_ext
