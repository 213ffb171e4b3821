// The CUDA kernel of magnitude_histogram. The counts do not depend on the order of the atomics,
// because they are integers.

#include "device.cuh"
#include "launch.h"

namespace megatron_ext {
namespace {

constexpr int kMostBins = 2048;

template <typename T>
__device__ __forceinline__ void count_range(const void* data, int64_t begin, int64_t end,
                                            uint32_t prefix, int shift, int bits, uint32_t* bins) {
  const T* const x = static_cast<const T*>(data);
  __builtin_assume(__isGlobal(x));
  const uint32_t mask = (1u << bits) - 1u;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = __float_as_uint(load(x[i])) & 0x7FFFFFFFu;
    if ((key >> (shift + bits)) == prefix) {
      atomicAdd(bins + ((key >> shift) & mask), 1u);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const DeviceRange* __restrict__ ranges, int64_t count, int64_t chunks,
                     const int64_t* __restrict__ prefixes, int shift, int bits,
                     unsigned long long* counts, int64_t stride) {
  __shared__ uint32_t bins[kMostBins];
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    for (int i = threadIdx.x; i < kMostBins; i += kThreads) {
      bins[i] = 0;
    }
    __syncthreads();
    const DeviceRange& r = ranges[find(ranges, count, chunk)];
    const int64_t begin = r.begin + (chunk - r.first_chunk) * kChunk;
    const int64_t end = begin + kChunk < r.end ? begin + kChunk : r.end;
    const uint32_t prefix = static_cast<uint32_t>(prefixes[r.group]);
    switch (static_cast<Type>(r.type)) {
      case Type::float32:
        count_range<float>(r.data, begin, end, prefix, shift, bits, bins);
        break;
      case Type::bfloat16:
        count_range<__nv_bfloat16>(r.data, begin, end, prefix, shift, bits, bins);
        break;
      case Type::float16:
        count_range<__half>(r.data, begin, end, prefix, shift, bits, bins);
        break;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (1 << bits); i += kThreads) {
      if (bins[i] != 0) {
        atomicAdd(counts + r.group * stride + i, static_cast<unsigned long long>(bins[i]));
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_histogram(const DeviceRange* ranges, int64_t count, int64_t chunks,
                             const int64_t* prefixes, int shift, int bits, int64_t* counts,
                             int64_t bins, cudaStream_t stream) {
  static_assert(sizeof(unsigned long long) == sizeof(int64_t));
  unsigned blocks = 0;
  const cudaError_t error = grid_size<histogram_kernel>(chunks, &blocks);
  if (error != cudaSuccess || blocks == 0) {
    return error;
  }
  histogram_kernel<<<blocks, kThreads, 0, stream>>>(ranges, count, chunks, prefixes, shift, bits,
                                                    reinterpret_cast<unsigned long long*>(counts),
                                                    bins);
  return cudaGetLastError();
}

}  // namespace megatron_ext
