// The segment table as the kernels read it. It has one record per segment, and records are cut into
// chunks.
//
// Chunks begin at multiples of kChunk in the tensor, not in memory and not in the grid, and each
// chunk's statistics are one partial result. The same input therefore gives the same bits with any
// number of threads, alignment and free memory.

#pragma once

#include <cstdint>

#include "element_rule.h"

namespace megatron_ext {

inline constexpr int64_t kChunk = 32768;

enum class Type : uint8_t { float32 = 0, bfloat16 = 1, float16 = 2 };

enum class Statistics : int { none = 0, after = 1, before_and_after = 2 };

inline constexpr int kMoments = 2;  // exp_avg, exp_avg_sq

struct Record {
  int64_t begin;  // in the tensor
  int64_t end;
  int64_t first_chunk;
  void* data[kMoments];  // of the tensor's first element
  GlobalIndex where;
  Coefficients coefficients[kMoments];
  int32_t tensor;
  Rule rule[kMoments];
  Type type[kMoments];
};

MEGATRON_EXT_INLINE int64_t chunks(const Record& r) {
  return r.begin == r.end ? 0 : (r.end + kChunk - 1) / kChunk - r.begin / kChunk;
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The master weights of a shard and the weights of the model. `data` and `type` have the master
// weights first.
struct WeightPair {
  const void* data[2];
  int64_t elements;
  int64_t first_chunk;
  int64_t tensor;
  Type type[2];
};

MEGATRON_EXT_INLINE int64_t chunks(const WeightPair& p) {
  return (p.elements + kChunk - 1) / kChunk;
}

MEGATRON_EXT_INLINE Range range(const WeightPair& p, int64_t chunk) {
  const int64_t begin = (chunk - p.first_chunk) * kChunk;
  const int64_t end = begin + kChunk;
  return {begin, end > p.elements ? p.elements : end};
}

// Returns the elements of a record that are in chunk `chunk` of the launch.
MEGATRON_EXT_INLINE Range range(const Record& r, int64_t chunk) {
  const int64_t begin = (r.begin / kChunk + (chunk - r.first_chunk)) * kChunk;
  const int64_t end = begin + kChunk;
  return {begin < r.begin ? r.begin : begin, end > r.end ? r.end : end};
}

// Finds the record (or another struct with first_chunk) that has chunk `chunk`. Records are in
// order, and none is empty.
template <typename R>
MEGATRON_EXT_INLINE int64_t find(const R* records, int64_t count, int64_t chunk) {
  int64_t low = 0;
  int64_t high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (records[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Whether a moment has to be visited, and whether its old value is needed.
constexpr MEGATRON_EXT_INLINE bool visits(Rule rule, Statistics statistics) {
  return rule != Rule::keep || statistics != Statistics::none;
}
constexpr MEGATRON_EXT_INLINE bool reads(Rule rule, Statistics statistics) {
  return reads_old(rule) || statistics == Statistics::before_and_after;
}

}  // namespace megatron_ext
