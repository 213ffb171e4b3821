// The CPU kernel for one chunk, in the variants that are compiled.

#pragma once

#include "../segment_table.h"
#include "../tally.h"

namespace megatron_ext {

using TransformChunk = void (*)(const Record&, Range, Statistics, Tally tally[kMoments]);
using CompareChunk = Difference (*)(const WeightPair&, Range);

void transform_baseline(const Record&, Range, Statistics, Tally tally[kMoments]);
void transform_avx2(const Record&, Range, Statistics, Tally tally[kMoments]);
void transform_avx512(const Record&, Range, Statistics, Tally tally[kMoments]);

// Rounds master weights to the type of the weights and compares them.
Difference compare_baseline(const WeightPair&, Range);
Difference compare_avx2(const WeightPair&, Range);
Difference compare_avx512(const WeightPair&, Range);

// Adds to counts[2^bits] the elements [begin, begin + n) whose magnitude's bits above
// shift + bits equal prefix, by the `bits` bits that follow.
void histogram(const void* data, Type type, int64_t begin, int64_t n, uint32_t prefix, int shift,
               int bits, int64_t* counts);

}  // namespace megatron_ext
