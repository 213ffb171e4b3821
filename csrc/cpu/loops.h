// The CPU kernel's loops, compiled once for each instruction set (loops_*.cpp).
//
// Everything here has internal linkage or is forced inline. If the translation units shared an
// instantiation, the linker might keep one that a machine cannot run.

#pragma once

#include <cstring>

#include "../segment_table.h"
#include "../tally.h"

#if !defined(__FLT16_MANT_DIG__)
#error "the CPU kernel needs a compiler with _Float16: GCC 12 or clang 15"
#endif

namespace megatron_ext {
namespace {

struct BFloat16 {
  uint16_t bits;
};

MEGATRON_EXT_INLINE float load(float x) { return x; }
MEGATRON_EXT_INLINE float load(_Float16 x) { return static_cast<float>(x); }
MEGATRON_EXT_INLINE float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

template <typename T>
struct Store;
template <>
struct Store<float> {
  MEGATRON_EXT_INLINE static float from(float x) { return x; }
};
template <>
struct Store<_Float16> {
  MEGATRON_EXT_INLINE static _Float16 from(float x) { return static_cast<_Float16>(x); }
};
template <>
struct Store<BFloat16> {
  // Rounds to nearest, ties to even. A NaN must not be rounded to infinity.
  MEGATRON_EXT_INLINE static BFloat16 from(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
  }
};

// The number of elements per block. Each statistic is one pass over a block, which stays in the
// first-level cache, because separate loops are vectorized better than one loop for all sums.
inline constexpr int64_t kBlock = 2048;

// Adds the current values of a block's elements to the statistics.
template <typename T>
MEGATRON_EXT_INLINE void count_values(const T* x, int64_t n, float lowest, Tally& tally) {
  double squares = 0.0;
  float largest = 0.0f;
  uint32_t nonfinite = 0;
#pragma omp simd reduction(+ : squares, nonfinite) reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float value = load(x[i]);
    Tally one;
    count<Statistics::after>(one, value, value, lowest);
    squares += one.after;
    largest = one.largest > largest ? one.largest : largest;
    nonfinite += one.nonfinite;
  }
  tally.after += squares;
  tally.largest = largest > tally.largest ? largest : tally.largest;
  tally.nonfinite += nonfinite;
}

template <typename T>
MEGATRON_EXT_INLINE double sum_of_squares(const T* x, int64_t n) {
  double squares = 0.0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    const float value = load(x[i]);
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  return squares;
}

// Returns the number of changed elements if S requests it.
template <typename T, Rule R, Statistics S>
MEGATRON_EXT_INLINE uint32_t apply(T* x, int64_t n, const Coefficients& k, const GlobalIndex& where,
                                   int64_t first) {
  uint32_t changed = 0;
#pragma omp simd reduction(+ : changed)
  for (int64_t i = 0; i < n; ++i) {
    const float old = reads(R, S) ? load(x[i]) : 0.0f;
    const T stored = Store<T>::from(transform<R>(old, k, where, first + i));
    x[i] = stored;
    if constexpr (S == Statistics::before_and_after) {
      changed += is_changed(old, load(stored)) ? 1u : 0u;
    }
  }
  return changed;
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
    if constexpr (R != Rule::keep) {
      if constexpr (S == Statistics::before_and_after) {
        total.before += sum_of_squares(x + i, size);
      }
      total.changed += apply<T, R, S>(x + i, size, k, where, first + i);
    }
    if constexpr (S != Statistics::none) {
      count_values(x + i, size, lowest, total);
    }
  }
  if constexpr (R == Rule::keep) {
    total.before = total.after;
  }
  tally = total;
}

template <typename M, typename V, Statistics S>
void batch_size_range(void* exp_avg, void* exp_avg_sq, int64_t n, const Coefficients& coefficients,
                      Tally& tally_m, Tally& tally_v) {
  const Coefficients k = coefficients;
  const M* const m = static_cast<const M*>(exp_avg);
  V* const v = static_cast<V*>(exp_avg_sq);
  double squares_m = 0.0;
  double before = 0.0;
  double after = 0.0;
  float largest_m = 0.0f;
  float largest_v = 0.0f;
  uint32_t nonfinite_m = 0;
  uint32_t nonfinite_v = 0;
  uint32_t changed = 0;
#pragma omp simd reduction(+ : squares_m, before, after, nonfinite_m, nonfinite_v, changed) \
    reduction(max : largest_m, largest_v)
  for (int64_t i = 0; i < n; ++i) {
    const float momentum = load(m[i]);
    const float old = load(v[i]);
    const V stored = Store<V>::from(batch_size(momentum, old, k));
    v[i] = stored;
    Tally one_m;
    Tally one_v;
    count<S>(one_m, momentum, momentum, lowest_of(0));
    count<S>(one_v, old, load(stored), lowest_of(1));
    squares_m += one_m.after;
    before += one_v.before;
    after += one_v.after;
    largest_m = one_m.largest > largest_m ? one_m.largest : largest_m;
    largest_v = one_v.largest > largest_v ? one_v.largest : largest_v;
    nonfinite_m += one_m.nonfinite;
    nonfinite_v += one_v.nonfinite;
    changed += one_v.changed;
  }
  tally_m = {squares_m, squares_m, largest_m, nonfinite_m, 0};
  tally_v = {before, after, largest_v, nonfinite_v, changed};
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
#pragma omp simd reduction(+ : elements) reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float rounded = load(Store<W>::from(load(master[i])));
    const float weight = load(weights[i]);
    const float distance = fabsf(rounded - weight);
    elements += is_other(rounded, weight) ? 1u : 0u;
    // Two equal infinities have no distance, which is a NaN here.
    largest = distance > largest ? distance : largest;
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
