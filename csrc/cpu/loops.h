// The CPU kernel's loops, compiled once for each instruction set (loops_*.cpp).
//
// Everything here has internal linkage or is forced inline. If the translation units shared an
// instantiation, the linker might keep one that a machine cannot run.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../segment_table.h"
#include "../tally.h"
#include "counts.h"
#include "values.h"

namespace megatron_ext {
namespace {

// The rules for which one loop over fp32 elements that also counts is faster than several.
constexpr bool is_fused(Rule rule) {
  return rule == Rule::scale || rule == Rule::fill || rule == Rule::floor;
}

template <Rule R, Statistics S>
MEGATRON_EXT_INLINE void apply_and_count(float* x, int64_t n, const Coefficients& k, float lowest,
                                         Tally& tally) {
  double before = 0.0;
  double after = 0.0;
  float largest = 0.0f;
  uint32_t nonfinite = 0;
  uint32_t changed = 0;
#pragma omp simd reduction(+ : before, after, nonfinite, changed) reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float old = reads(R, S) ? x[i] : 0.0f;
    const float now = transform<R>(old, k, {}, 0);
    x[i] = now;
    Tally one;
    count<S>(one, old, now, lowest);
    before = S == Statistics::before_and_after ? add_square(before, old) : before;
    after = add_square(after, now);
    largest = one.largest > largest ? one.largest : largest;
    nonfinite += one.nonfinite;
    changed += one.changed;
  }
  tally.before += before;
  tally.after += after;
  tally.largest = largest > tally.largest ? largest : tally.largest;
  tally.nonfinite += nonfinite;
  tally.changed += changed;
}

// Writes the new values of a block to `out`, which may be `x`. Returns the number of changed
// elements if S requests it.
template <Rule R, Statistics S>
MEGATRON_EXT_INLINE uint32_t apply(const float* x, int64_t n, const Coefficients& k,
                                   const GlobalIndex& where, int64_t first, float* out) {
  uint32_t changed = 0;
#pragma omp simd reduction(+ : changed)
  for (int64_t i = 0; i < n; ++i) {
    const float old = reads(R, S) ? x[i] : 0.0f;
    out[i] = transform<R>(old, k, where, first + i);
    if constexpr (S == Statistics::before_and_after) {
      changed += is_changed(old, out[i]) ? 1u : 0u;
    }
  }
  return changed;
}

template <Rule R, Statistics S>
MEGATRON_EXT_INLINE void transform_block(float* x, int64_t n, const Coefficients& k,
                                         const GlobalIndex& where, int64_t first, float lowest,
                                         Tally& tally) {
  if constexpr (S != Statistics::none && is_fused(R)) {
    apply_and_count<R, S>(x, n, k, lowest, tally);
    return;
  }
  if constexpr (R != Rule::keep) {
    if constexpr (S == Statistics::before_and_after) {
      tally.before += sum_of_squares(x, n);
    }
    tally.changed += apply<R, S>(x, n, k, where, first, x);
  }
  if constexpr (S != Statistics::none) {
    count_values<Statistics::after>(x, x, n, lowest, tally);
  }
}

template <Rule R, Statistics S, typename T>
MEGATRON_EXT_INLINE void transform_block(T* x, int64_t n, const Coefficients& k,
                                         const GlobalIndex& where, int64_t first, float lowest,
                                         Tally& tally) {
  Block old;
  if constexpr (R == Rule::keep) {
    widen(x, n, old.values);
    count_values<Statistics::after>(old.values, old.values, n, lowest, tally);
    return;
  }
  Block room;
  float* const now = S == Statistics::before_and_after ? room.values : old.values;
  const auto step = [&](int64_t i, int64_t size) __attribute__((always_inline)) {
    if constexpr (reads(R, S)) {
      widen(x + i, size, old.values + i);
    }
    apply<R, Statistics::none>(old.values + i, size, k, where, first + i, now + i);
    narrow(now + i, size, x + i);
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    step(i, kStep);
  }
  step(i, n - i);
  if constexpr (S != Statistics::none) {
    count_values<S>(old.values, now, n, lowest, tally);
  }
}

// Starts to load the next block while this one is counted, which takes as long.
template <typename T>
MEGATRON_EXT_INLINE void fetch(const T* x, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < (n < kBlock ? n : kBlock); i += kLine) {
    __builtin_prefetch(x + i, 1);
  }
}

template <typename T, Rule R, Statistics S>
void transform_range(void* data, int64_t n, const Coefficients& coefficients,
                     const GlobalIndex& index, int64_t first, float lowest, Tally& tally) {
  const Coefficients k = coefficients;
  const GlobalIndex where = index;
  T* const x = static_cast<T*>(data);
  Tally total;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock;
    if constexpr (!std::is_same_v<T, float>) {
      fetch(x + i + size, n - i - size);
    }
    transform_block<R, S>(x + i, size, k, where, first + i, lowest, total);
  }
  if constexpr (R == Rule::keep) {
    total.before = total.after;
  }
  tally = total;
}

template <typename M, typename V, Statistics S>
void batch_size_range(void* exp_avg, void* exp_avg_sq, int64_t n, const Coefficients& coefficients,
                      Tally& tally_m, Tally& tally_v) {
  constexpr bool kWide = std::is_same_v<V, float>;
  const Coefficients k = coefficients;
  const M* m = static_cast<const M*>(exp_avg);
  V* v = static_cast<V*>(exp_avg_sq);
  Tally total_m;
  Tally total_v;
  for (; n > 0; n -= kBlock, m += kBlock, v += kBlock) {
    const int64_t size = n < kBlock ? n : kBlock;
    Block room_m;
    Block room_v;
    Block now;
    const float* const momentum = values_of(m, size, room_m);
    const float* const old = values_of(v, size, room_v);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      now.values[i] = batch_size(momentum[i], old[i], k);
    }
    if constexpr (!kWide) {
      narrow(now.values, size, v);
    }
    if constexpr (S != Statistics::none) {
      count_values<Statistics::after>(momentum, momentum, size, lowest_of(0), total_m);
      count_values<S>(old, now.values, size, lowest_of(1), total_v);
    }
    if constexpr (kWide) {
      narrow(now.values, size, v);  // last, because `old` may be `v`
    }
  }
  total_m.before = total_m.after;
  tally_m = total_m;
  tally_v = total_v;
}

template <typename T, Statistics S>
void transform_type(Rule rule, void* data, int64_t n, const Coefficients& k,
                    const GlobalIndex& where, int64_t first, float lowest, Tally& tally) {
  switch (rule) {
#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads)                  \
  case Rule::name:                                                                \
    if constexpr (Kind::kind != Kind::joint) {                                    \
      transform_range<T, Rule::name, S>(data, n, k, where, first, lowest, tally); \
    }                                                                             \
    return;
    // A joint rule has a loop over both moments: batch_size_range.
    MEGATRON_EXT_RULES(MEGATRON_EXT_RULE)
#undef MEGATRON_EXT_RULE
  }
}

template <Statistics S, typename M>
void batch_size_type(const Record& r, void* m, void* v, int64_t n, Tally tally[kMoments]) {
  const Coefficients& k = r.coefficients[1];
  switch (r.type[1]) {
    case Type::float32:
      return batch_size_range<M, float, S>(m, v, n, k, tally[0], tally[1]);
    case Type::bfloat16:
      return batch_size_range<M, BFloat16, S>(m, v, n, k, tally[0], tally[1]);
    case Type::float16:
      return batch_size_range<M, _Float16, S>(m, v, n, k, tally[0], tally[1]);
  }
}

inline void* element(const Record& r, int moment, int64_t index) {
  const int64_t size = r.type[moment] == Type::float32 ? 4 : 2;
  return static_cast<char*>(r.data[moment]) + index * size;
}

template <Statistics S>
void transform_record(const Record& r, Range range, Tally tally[kMoments]) {
  const int64_t n = range.end - range.begin;
  if (is_kind(r.rule[1], Kind::joint)) {
    void* const m = element(r, 0, range.begin);
    void* const v = element(r, 1, range.begin);
    switch (r.type[0]) {
      case Type::float32:
        return batch_size_type<S, float>(r, m, v, n, tally);
      case Type::bfloat16:
        return batch_size_type<S, BFloat16>(r, m, v, n, tally);
      case Type::float16:
        return batch_size_type<S, _Float16>(r, m, v, n, tally);
    }
  }
  for (int moment = 0; moment < kMoments; ++moment) {
    if (!visits(r.rule[moment], S)) {
      continue;
    }
    const auto run = r.type[moment] == Type::float32    ? transform_type<float, S>
                     : r.type[moment] == Type::bfloat16 ? transform_type<BFloat16, S>
                                                        : transform_type<_Float16, S>;
    run(r.rule[moment], element(r, moment, range.begin), n, r.coefficients[moment], r.where,
        range.begin - r.begin, lowest_of(moment), tally[moment]);
  }
}

inline void transform_any(const Record& r, Range range, Statistics statistics,
                          Tally tally[kMoments]) {
  switch (statistics) {
    case Statistics::none:
      return transform_record<Statistics::none>(r, range, tally);
    case Statistics::after:
      return transform_record<Statistics::after>(r, range, tally);
    case Statistics::before_and_after:
      return transform_record<Statistics::before_and_after>(r, range, tally);
  }
}

template <typename M, typename W>
Difference compare_range(const M* master, const W* weights, int64_t n) {
  uint32_t elements = 0;
  float largest = 0.0f;
  for (; n > 0; n -= kBlock, master += kBlock, weights += kBlock) {
    const int64_t size = n < kBlock ? n : kBlock;
    Block room_m;
    Block room_w;
    W rounded[kBlock];
    const float* a = room_m.values;
    const float* const b = values_of(weights, size, room_w);
    if constexpr (!std::is_same_v<M, W> && !std::is_same_v<W, float>) {
      widen(master, size, room_m.values);
      narrow(room_m.values, size, rounded);
    } else {
      a = values_of(master, size, room_m);
    }
#pragma omp simd reduction(+ : elements) reduction(max : largest)
    for (int64_t i = 0; i < size; ++i) {
      const float distance = fabsf(a[i] - b[i]);
      elements += is_other(a[i], b[i]) ? 1u : 0u;
      // Two equal infinities have no distance, which is a NaN here.
      largest = distance > largest ? distance : largest;
    }
  }
  return {elements, largest};
}

template <typename M>
Difference compare_type(const M* master, const void* weights, Type type, int64_t begin, int64_t n) {
  switch (type) {
    case Type::float32:
      return compare_range(master, static_cast<const float*>(weights) + begin, n);
    case Type::bfloat16:
      return compare_range(master, static_cast<const BFloat16*>(weights) + begin, n);
    case Type::float16:
      return compare_range(master, static_cast<const _Float16*>(weights) + begin, n);
  }
  return {};
}

inline Difference compare_any(const WeightPair& p, Range range) {
  const int64_t n = range.end - range.begin;
  switch (p.type[0]) {
    case Type::float32:
      return compare_type(static_cast<const float*>(p.data[0]) + range.begin, p.data[1], p.type[1],
                          range.begin, n);
    case Type::bfloat16:
      return compare_type(static_cast<const BFloat16*>(p.data[0]) + range.begin, p.data[1],
                          p.type[1], range.begin, n);
    case Type::float16:
      return compare_type(static_cast<const _Float16*>(p.data[0]) + range.begin, p.data[1],
                          p.type[1], range.begin, n);
  }
  return {};
}

template <typename T>
void histogram_range(const T* x, int64_t n, uint32_t prefix, int shift, int bits, int64_t* counts) {
  const uint32_t mask = (1u << bits) - 1u;
  for (int64_t i = 0; i < n; ++i) {
    const float value = load(x[i]);
    uint32_t key;
    std::memcpy(&key, &value, sizeof(key));
    key &= 0x7FFFFFFFu;
    if ((key >> (shift + bits)) == prefix) {
      ++counts[(key >> shift) & mask];
    }
  }
}

inline void histogram_any(const void* data, Type type, int64_t begin, int64_t n, uint32_t prefix,
                          int shift, int bits, int64_t* counts) {
  switch (type) {
    case Type::float32:
      return histogram_range(static_cast<const float*>(data) + begin, n, prefix, shift, bits,
                             counts);
    case Type::bfloat16:
      return histogram_range(static_cast<const BFloat16*>(data) + begin, n, prefix, shift, bits,
                             counts);
    case Type::float16:
      return histogram_range(static_cast<const _Float16*>(data) + begin, n, prefix, shift, bits,
                             counts);
  }
}

}  // namespace
}  // namespace megatron_ext
