// Statistics of one moment over a range of elements.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

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

template <Statistics S>
MEGATRON_EXT_INLINE void count(Tally& t, float before, float after) {
  if constexpr (S != Statistics::none) {
    const float magnitude = fabsf(after);
    t.after += static_cast<double>(after) * static_cast<double>(after);
    t.largest = magnitude > t.largest ? magnitude : t.largest;
    t.nonfinite += magnitude <= FLT_MAX ? 0u : 1u;
  }
  if constexpr (S == Statistics::before_and_after) {
    t.before += static_cast<double>(before) * static_cast<double>(before);
    t.changed += is_changed(before, after) ? 1u : 0u;
  }
}

}  // namespace megatron_ext
