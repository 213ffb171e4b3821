// The element types of the CPU kernel, and their conversion a block at a time.
//
// Everything here has internal linkage or is forced inline, as in loops.h.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../element_rule.h"

#if !defined(__FLT16_MANT_DIG__)
#error "the CPU kernel needs a compiler with _Float16: GCC 12 or clang 15"
#endif

// GCC 12 does not see that a loop reads as much of a block as another has written.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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
  MEGATRON_EXT_INLINE static uint32_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded;
  }
  MEGATRON_EXT_INLINE static BFloat16 from(float x) { return {static_cast<uint16_t>(rounded(x))}; }
};

// The number of elements per block. Each statistic is one pass over a block, which stays in the
// first-level cache, because separate loops are vectorized better than one loop for all sums.
// Elements of 16 bits are converted a block at a time: a compiler does not vectorize the conversion
// of fp16, and folds one to double into a call.
inline constexpr int64_t kBlock = 1024;

// Elements of 16 bits are converted, changed and converted back so many at a time. A load finds
// what has just been stored faster than in a whole block.
inline constexpr int64_t kStep = 256;

struct Block {
  // Behind them a line, so that two blocks do not lie a multiple of a page apart: a processor would
  // take a load from one for a load of what it has just stored to the other.
  alignas(64) float values[kBlock + 16];
};

template <typename T>
MEGATRON_EXT_INLINE void widen(const T* x, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = load(x[i]);
  }
}

// Stores the values, and leaves in `x` what they were rounded to.
template <typename T>
MEGATRON_EXT_INLINE void narrow(float* x, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T stored = Store<T>::from(x[i]);
    out[i] = stored;
    x[i] = load(stored);
  }
}

// In two loops, because a compiler does not vectorize one over elements of two sizes.
template <>
MEGATRON_EXT_INLINE void narrow(float* x, int64_t n, BFloat16* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t rounded = Store<BFloat16>::rounded(x[i]) << 16;
    std::memcpy(x + i, &rounded, sizeof(rounded));
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t value;
    std::memcpy(&value, x + i, sizeof(value));
    out[i].bits = static_cast<uint16_t>(value >> 16);
  }
}

#if defined(MEGATRON_EXT_VECTORS)
// The conversions of fp16, 16 or 8 elements at a time. GCC sees from the bounds that a whole step
// has no rest.
template <>
MEGATRON_EXT_INLINE void widen(const _Float16* x, int64_t n, float* out) {
  int64_t i = 0;
#if defined(MEGATRON_EXT_AVX512)
  for (; i < (n & ~15); i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(half));
  }
#endif
  for (; i < (n & ~7); i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  for (i = n & ~7; i < n; ++i) {
    out[i] = load(x[i]);
  }
}

template <>
MEGATRON_EXT_INLINE void narrow(float* x, int64_t n, _Float16* out) {
  int64_t i = 0;
#if defined(MEGATRON_EXT_AVX512)
  for (; i < (n & ~15); i += 16) {
    const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), half);
    _mm512_storeu_ps(x + i, _mm512_cvtph_ps(half));
  }
#endif
  for (; i < (n & ~7); i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
    _mm256_storeu_ps(x + i, _mm256_cvtph_ps(half));
  }
  for (i = n & ~7; i < n; ++i) {
    out[i] = static_cast<_Float16>(x[i]);
    x[i] = load(out[i]);
  }
}
#endif

// Returns the values of a block: fp32 where they are, others in `room`.
template <typename T>
MEGATRON_EXT_INLINE const float* values_of(const T* x, int64_t n, Block& room) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    widen(x, n, room.values);
    return room.values;
  }
}

}  // namespace
}  // namespace megatron_ext
