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

MEGATRON_EXT_INLINE double sum_of_squares(const float* x, int64_t n) {
  double squares = 0.0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    squares = add_square(squares, x[i]);
  }
  return squares;
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
