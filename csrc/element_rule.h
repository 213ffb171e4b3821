// The arithmetic of the moment rules for one element, shared by the CPU and the CUDA kernel.
//
// The `reference` methods in megatron_ext/rules/ are the same rules in plain torch. Both give the
// same bits, because every operation is rounded separately, without fused multiply-add
// (-ffp-contract=off on the host, __f*_rn on the device).

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MEGATRON_EXT_INLINE __host__ __device__ __forceinline__
#else
#define MEGATRON_EXT_INLINE inline __attribute__((always_inline))
#endif

namespace megatron_ext {

// How a kernel applies a rule. `kept` changes no element. `pointwise` needs only the element's
// value, and `positional` its global index too. `joint` is for exp_avg_sq and reads exp_avg.
enum class Kind : uint8_t { kept, pointwise, positional, joint };

// All rules, each with its name, code in the segment table, number of coefficients, kind, and
// whether the old value is read. The enum, the checks and the switches expand from this list.
// Python compares it with the registered rules (megatron_ext/rules/registry.py, manifest) before it
// loads a library.
#define MEGATRON_EXT_RULES(RULE)               \
  RULE(keep, 0, 0, kept, true)                 \
  RULE(scale, 1, 1, pointwise, true)           \
  RULE(fill, 2, 1, pointwise, false)           \
  RULE(floor, 3, 2, pointwise, true)           \
  RULE(prune_magnitude, 4, 1, pointwise, true) \
  RULE(prune_random, 5, 1, positional, true)   \
  RULE(batch_size, 6, 6, joint, true)          \
  RULE(clip, 7, 1, pointwise, true)

#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) name = code,
enum class Rule : uint8_t { MEGATRON_EXT_RULES(MEGATRON_EXT_RULE) };
#undef MEGATRON_EXT_RULE

inline constexpr int kCoefficients = 6;

#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) \
  static_assert((coefficients) <= kCoefficients, #name " has too many coefficients");
MEGATRON_EXT_RULES(MEGATRON_EXT_RULE)
#undef MEGATRON_EXT_RULE

#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) value == (code) ||
constexpr MEGATRON_EXT_INLINE bool is_rule(int64_t value) {
  return MEGATRON_EXT_RULES(MEGATRON_EXT_RULE) false;
}
#undef MEGATRON_EXT_RULE

#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) \
  (rule == Rule::name && Kind::kind == wanted) ||
constexpr MEGATRON_EXT_INLINE bool is_kind(Rule rule, Kind wanted) {
  return MEGATRON_EXT_RULES(MEGATRON_EXT_RULE) false;
}
#undef MEGATRON_EXT_RULE

#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) (rule == Rule::name && (reads)) ||
constexpr MEGATRON_EXT_INLINE bool reads_old(Rule rule) {
  return MEGATRON_EXT_RULES(MEGATRON_EXT_RULE) false;
}
#undef MEGATRON_EXT_RULE

// The loops over both moments support only one rule.
#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads)             \
  static_assert(Kind::kind != Kind::joint || Rule::name == Rule::batch_size, \
                "loops over both moments are missing for " #name);
MEGATRON_EXT_RULES(MEGATRON_EXT_RULE)
#undef MEGATRON_EXT_RULE

struct Coefficients {
  float c[kCoefficients];
  uint64_t key;    // of the random stream, from the seed and the parameter
  uint64_t limit;  // prune_random sets an element to 0 if its 53 random bits are below it
};

// The position of a segment's elements in the unsharded parameter. Element j of the segment is
// element start + j of a block, whose rows have row_length elements. Row r of the block begins at
// base + r * row_stride. If row_length is 0, the block is one row.
struct GlobalIndex {
  int64_t start;
  int64_t base;
  int64_t row_length;
  int64_t row_stride;
};

MEGATRON_EXT_INLINE uint64_t global_index(const GlobalIndex& where, int64_t j) {
  const int64_t i = where.start + j;
  if (where.row_length == 0) {
    return static_cast<uint64_t>(where.base + i);
  }
  const int64_t row = i / where.row_length;
  return static_cast<uint64_t>(where.base + row * where.row_stride + (i - row * where.row_length));
}

// splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
// 2014) as a counter-based generator. Returns output `index` of the stream that starts at `key`.
MEGATRON_EXT_INLINE uint64_t random_bits(uint64_t key, uint64_t index) {
  uint64_t z = key + (index + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

MEGATRON_EXT_INLINE float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MEGATRON_EXT_INLINE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

MEGATRON_EXT_INLINE float sub(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

template <Rule R>
inline constexpr bool kUnhandled = false;

// Applies a rule to one moment. A NaN stays a NaN, so that a report can count it.
template <Rule R>
MEGATRON_EXT_INLINE float transform(float x, const Coefficients& k, const GlobalIndex& where,
                                    int64_t j) {
  if constexpr (R == Rule::keep) {
    return x;
  } else if constexpr (R == Rule::scale) {
    return mul(k.c[0], x);
  } else if constexpr (R == Rule::fill) {
    return k.c[0];
  } else if constexpr (R == Rule::floor) {
    const float y = mul(k.c[0], x);
    return y < k.c[1] ? k.c[1] : y;
  } else if constexpr (R == Rule::prune_magnitude) {
    return fabsf(x) <= k.c[0] ? 0.0f : x;
  } else if constexpr (R == Rule::prune_random) {
    return (random_bits(k.key, global_index(where, j)) >> 11) < k.limit ? 0.0f : x;
  } else if constexpr (R == Rule::clip) {
    return x > k.c[0] ? k.c[0] : x < -k.c[0] ? -k.c[0] : x;
  } else {
    static_assert(kUnhandled<R>, "a rule of MEGATRON_EXT_RULES has no arithmetic");
  }
}

// Computes exp_avg_sq for a batch k times as large, from m = exp_avg and v = exp_avg_sq.
// c = {1/(1-b1^t), 1/(1-b2^t), (1-b1)/(1+b1), 1/(1-c), 1/k, 1-b2^t}. v is split into the squared
// gradient and its variance, and the variance is divided by k (BatchSize in
// megatron_ext/rules/batch_size.py has the formula and its limits).
MEGATRON_EXT_INLINE float batch_size(float m, float v, const Coefficients& k) {
  const float m_hat = mul(m, k.c[0]);
  const float v_hat = mul(v, k.c[1]);
  float g2 = mul(sub(mul(m_hat, m_hat), mul(k.c[2], v_hat)), k.c[3]);
  g2 = g2 < 0.0f ? 0.0f : g2;
  g2 = g2 > v_hat ? v_hat : g2;
  return mul(add(g2, mul(sub(v_hat, g2), k.c[4])), k.c[5]);
}

}  // namespace megatron_ext
