// The loops for any CPU.

#include "kernel.h"
#include "loops.h"

namespace megatron_ext {

void transform_baseline(const Record& r, Range range, Statistics s, Tally tally[kMoments]) {
  transform_any(r, range, s, tally);
}

Difference compare_baseline(const WeightPair& p, Range range) { return compare_any(p, range); }

void histogram(const void* data, Type type, int64_t begin, int64_t n, uint32_t prefix, int shift,
               int bits, int64_t* counts) {
  histogram_any(data, type, begin, n, prefix, shift, bits, counts);
}

}  // namespace megatron_ext
