// The CUDA kernel of compare_weights: one read of the master weights and of the weights. A warp
// writes only if it found a difference, which a right checkpoint has not. The result does not
// depend on the order of the atomics, because they are integers.

#include "device.cuh"
#include "launch.h"

namespace megatron_ext {
namespace {

constexpr int kVector = 8;  // elements; two 16-byte accesses of fp32, one of a 16-bit type

template <typename W>
__device__ __forceinline__ void compare(float master, W weight, Difference& out) {
  const float rounded = load(store<W>(master));
  const float value = load(weight);
  if (is_other(rounded, value)) {
    const float distance = fabsf(rounded - value);
    ++out.elements;
    out.largest = distance > out.largest ? distance : out.largest;
  }
}

template <typename M, typename W>
__device__ __forceinline__ void compare_range(const WeightPair& p, Range range, Difference& out) {
  const M* const master = static_cast<const M*>(p.data[0]);
  const W* const weights = static_cast<const W*>(p.data[1]);
  __builtin_assume(__isGlobal(master) && __isGlobal(weights));
  int64_t i = range.begin;
  if (aligned(master + i) && aligned(weights + i)) {
    for (int64_t at = i + threadIdx.x * kVector; at + kVector <= range.end;
         at += kThreads * kVector) {
      Vector<M, kVector> m;
      Vector<W, kVector> w;
      m.read(master + at);
      w.read(weights + at);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        compare(load(m.x[j]), w.x[j], out);
      }
    }
    i += (range.end - i) / kVector * kVector;
  }
  for (i += threadIdx.x; i < range.end; i += kThreads) {
    compare(load(master[i]), weights[i], out);
  }
}

template <typename M>
__device__ __forceinline__ void compare_type(const WeightPair& p, Range range, Difference& out) {
  switch (p.type[1]) {
    case Type::float32:
      return compare_range<M, float>(p, range, out);
    case Type::bfloat16:
      return compare_range<M, __nv_bfloat16>(p, range, out);
    case Type::float16:
      return compare_range<M, __half>(p, range, out);
  }
}

__global__ void __launch_bounds__(kThreads)
    compare_kernel(const WeightPair* __restrict__ pairs, int64_t count, int64_t chunks,
                   unsigned long long* out) {
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const WeightPair& p = pairs[find(pairs, count, chunk)];
    Difference found;
    switch (p.type[0]) {
      case Type::float32:
        compare_type<float>(p, range(p, chunk), found);
        break;
      case Type::bfloat16:
        compare_type<__nv_bfloat16>(p, range(p, chunk), found);
        break;
      case Type::float16:
        compare_type<__half>(p, range(p, chunk), found);
        break;
    }
    // Where many elements differ, threads would wait for each other at the two counters.
    const uint32_t elements = __reduce_add_sync(kWholeWarp, found.elements);
    const uint32_t largest = __reduce_max_sync(kWholeWarp, bits(found.largest));
    if (elements != 0 && threadIdx.x % kWarp == 0) {
      unsigned long long* const row = out + p.tensor * kDifferences;
      atomicAdd(row, static_cast<unsigned long long>(elements));
      atomicMax(row + 1, static_cast<unsigned long long>(largest));
    }
  }
}

}  // namespace

cudaError_t launch_compare(const WeightPair* pairs, int64_t count, int64_t chunks, int64_t* out,
                           cudaStream_t stream) {
  static_assert(sizeof(unsigned long long) == sizeof(int64_t));
  unsigned blocks = 0;
  const cudaError_t error = grid_size<compare_kernel>(chunks, &blocks);
  if (error != cudaSuccess || blocks == 0) {
    return error;
  }
  compare_kernel<<<blocks, kThreads, 0, stream>>>(pairs, count, chunks,
                                                  reinterpret_cast<unsigned long long*>(out));
  return cudaGetLastError();
}

}  // namespace megatron_ext
