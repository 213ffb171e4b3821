// The statistics of a transform: of a vector, a block, a chunk and a tensor.

#pragma once

#include "../launch_table.h"
#include "device.cuh"

namespace megatron_ext {
namespace {

__device__ __forceinline__ void add(Tally& a, const Tally& b) {
  a.before += b.before;
  a.after += b.after;
  a.largest = b.largest > a.largest ? b.largest : a.largest;
  a.nonfinite += b.nonfinite;
  a.changed += b.changed;
}

__device__ __forceinline__ Tally shuffle_down(const Tally& t, int by) {
  return {__shfl_down_sync(kWholeWarp, t.before, by), __shfl_down_sync(kWholeWarp, t.after, by),
          __shfl_down_sync(kWholeWarp, t.largest, by),
          __shfl_down_sync(kWholeWarp, t.nonfinite, by),
          __shfl_down_sync(kWholeWarp, t.changed, by)};
}

// Writes the block's sum, always added in the same order, to `sum` in shared memory. Thread 0 may
// read it immediately.
__device__ __forceinline__ void block_sum(Tally t, Tally& sum) {
  __shared__ Tally of_warp[kThreads / kWarp];
  __syncthreads();  // thread 0 may still read an earlier sum
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
    add(t, shuffle_down(t, by));
  }
  if (threadIdx.x % kWarp == 0) {
    of_warp[threadIdx.x / kWarp] = t;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kThreads / kWarp; ++w) {
      add(t, of_warp[w]);
    }
    sum = t;
  }
}

// Counts a vector as count() does its elements. What is rare, values that are not finite or below
// the lowest, is looked for in sums on the FMA pipe, which has little to do. The comparisons of
// count() would fill the ALU pipe (benchmarks/kernel/NOTES.md).
template <Statistics S, int N>
__device__ __forceinline__ void count_vector(Tally& t, const float (&before)[N],
                                             const float (&after)[N], float lowest) {
  if constexpr (S != Statistics::none) {
    constexpr bool kBefore = S == Statistics::before_and_after;
    float sum = 0.0f;
    uint32_t signs = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum += fabsf(after[i]);
      signs |= bits(after[i]);
    }
    if (sum <= FLT_MAX && (lowest < 0.0f || signs >> 31 == 0)) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        count_squares<S>(t, before[i], after[i]);
        t.largest = fmaxf(t.largest, fabsf(after[i]));
        t.changed += kBefore && before[i] != after[i] ? 1u : 0u;  // a NaN before is none now
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        count<S>(t, before[i], after[i], lowest);
      }
    }
  }
}

template <Statistics S>
__device__ __forceinline__ void write_row(double* out, int64_t tensor, int moment, double before,
                                          double after, double largest, double nonfinite,
                                          double changed) {
  double* const row = out + (tensor * kMoments + moment) * kColumns;
  constexpr bool kBefore = S == Statistics::before_and_after;
  row[0] = kBefore ? before : -1.0;
  row[1] = after;
  row[2] = largest;
  row[3] = nonfinite;
  row[4] = kBefore ? changed : -1.0;
}

// Sums over possibly more than 2^32 elements, so that the counts are double as well.
struct Total {
  double v[kColumns];
};

template <Statistics S>
__device__ __forceinline__ void write_total(const Partial* partials, int64_t first, int64_t last,
                                            int64_t tensor, int moment, double* out) {
  __shared__ Total of_thread[kThreads];
  Total sum{};
  for (int64_t c = first + threadIdx.x; c < last; c += kThreads) {
    const Tally t = partials[c].tally[moment];
    sum.v[0] += t.before;
    sum.v[1] += t.after;
    sum.v[2] = t.largest > sum.v[2] ? t.largest : sum.v[2];
    sum.v[3] += t.nonfinite;
    sum.v[4] += t.changed;
  }
  __syncthreads();
  of_thread[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      Total& a = of_thread[threadIdx.x];
      const Total& b = of_thread[threadIdx.x + half];
      a.v[0] += b.v[0];
      a.v[1] += b.v[1];
      a.v[2] = b.v[2] > a.v[2] ? b.v[2] : a.v[2];
      a.v[3] += b.v[3];
      a.v[4] += b.v[4];
    }
  }
  if (threadIdx.x == 0) {
    const Total& t = of_thread[0];
    write_row<S>(out, tensor, moment, t.v[0], t.v[1], t.v[2], t.v[3], t.v[4]);
  }
}

// Writes a chunk's tallies. The block that writes the last ones of a tensor sums them all in the
// order of the chunks.
template <Statistics S>
__device__ __forceinline__ void hand_in(const Tally* sums, int chunk, int tensor,
                                        const Table& table, double* out) {
  __shared__ bool is_last;
  const Tally& m = sums[0];
  const Tally& v = sums[1];
  const int64_t first = table.first_chunk[tensor];
  const int64_t last = table.first_chunk[tensor + 1];
  if (last - first == 1) {
    if (threadIdx.x == 0) {
      write_row<S>(out, tensor, 0, m.before, m.after, m.largest, m.nonfinite, m.changed);
      write_row<S>(out, tensor, 1, v.before, v.after, v.largest, v.nonfinite, v.changed);
    }
    return;
  }
  if (threadIdx.x == 0) {
    table.partials[chunk].tally[0] = m;
    table.partials[chunk].tally[1] = v;
    __threadfence();
    is_last = atomicAdd(table.done + tensor, 1u) == static_cast<uint32_t>(last - first - 1);
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    write_total<S>(table.partials, first, last, tensor, 0, out);
    write_total<S>(table.partials, first, last, tensor, 1, out);
    if (threadIdx.x == 0) {
      table.done[tensor] = 0;  // for the next launch
    }
  }
  __syncthreads();
}

// Writes the rows of tensors without a segment, for which no chunk writes tallies.
template <Statistics S>
__device__ __forceinline__ void write_empty(const int64_t* first_chunk, int64_t tensors,
                                            double* out) {
  for (int64_t t = threadIdx.x; t < tensors; t += kThreads) {
    if (first_chunk[t] == first_chunk[t + 1]) {
      write_row<S>(out, t, 0, 0.0, 0.0, 0.0, 0.0, 0.0);
      write_row<S>(out, t, 1, 0.0, 0.0, 0.0, 0.0, 0.0);
    }
  }
}

}  // namespace
}  // namespace megatron_ext
