// Statistics of one moment over a range of elements.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "segment_table.h"

namespace megatron_ext {

// The squares are summed in double, because exp_avg_sq is often too small for its square in fp32.
struct Tally {
  double before = 0.0;
  double after = 0.0;
  float largest = 0.0f;
  uint32_t nonfinite = 0;
  uint32_t changed = 0;
};

// Columns of the op's result (megatron_ext/_ops/segments.py, STATISTICS_COLUMNS).
inline constexpr int kColumns = 5;

// A NaN that stays a NaN does not count as changed.
MEGATRON_EXT_INLINE bool is_changed(float before, float after) {
  return !(before == after || (before != before && after != after));
}

// The smallest value of a moment that Adam can use. It takes the square root of exp_avg_sq.
MEGATRON_EXT_INLINE float lowest_of(int moment) { return moment == 0 ? -FLT_MAX : 0.0f; }

template <Statistics S>
MEGATRON_EXT_INLINE void count_squares(Tally& t, float before, float after) {
  t.after += static_cast<double>(after) * static_cast<double>(after);
  if constexpr (S == Statistics::before_and_after) {
    t.before += static_cast<double>(before) * static_cast<double>(before);
  }
}

// `lowest` is that of the moment. A smaller value counts with the non-finite ones; -0 is not below
// 0, and a NaN passes neither comparison.
template <Statistics S>
MEGATRON_EXT_INLINE void count(Tally& t, float before, float after, float lowest) {
  if constexpr (S != Statistics::none) {
    const float magnitude = fabsf(after);
    count_squares<S>(t, before, after);
    t.largest = magnitude > t.largest ? magnitude : t.largest;
    t.nonfinite += (after >= lowest) & (after <= FLT_MAX) ? 0u : 1u;
  }
  if constexpr (S == Statistics::before_and_after) {
    t.changed += is_changed(before, after) ? 1u : 0u;
  }
}

// The comparison of master weights with the weights that they round to.
struct Difference {
  uint32_t elements = 0;
  float largest = 0.0f;
};

// Columns of the op's result, int64: the number of elements that differ, and the bits of the
// largest difference. The bits of numbers that are not negative have the order of the numbers.
inline constexpr int kDifferences = 2;

MEGATRON_EXT_INLINE uint32_t bits(float x) {
  uint32_t out;
  memcpy(&out, &x, sizeof(out));
  return out;
}

// Compares the bits of two values, which a conversion from a 16-bit type preserves. A NaN equals
// every other NaN.
MEGATRON_EXT_INLINE bool is_other(float a, float b) {
  return bits(a) != bits(b) && !(a != a && b != b);
}

}  // namespace megatron_ext
