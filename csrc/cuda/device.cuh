// Element types, 16-byte accesses and the size of the grid.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace megatron_ext {

inline constexpr int kThreads = 128;
inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T store(float x);
template <>
__device__ __forceinline__ float store<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 store<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half store<__half>(float x) {
  return __float2half_rn(x);
}

// N elements at p. Their size is a multiple of 16 bytes, and p is a 16-byte address.
template <typename T, int N>
struct alignas(16) Vector {
  static_assert(N * sizeof(T) % 16 == 0, "a vector is a whole number of 16-byte accesses");
  static constexpr int kAccesses = N * sizeof(T) / 16;

  T x[N];

  __device__ __forceinline__ void read(const T* p) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<uint4*>(x)[i] = reinterpret_cast<const uint4*>(p)[i];
    }
  }

  __device__ __forceinline__ void write(T* p) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(x)[i];
    }
  }
};

__device__ __forceinline__ bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Computes the number of blocks: as many as the device holds at once, at most one per chunk. The
// device is asked once for each kernel, because a launch takes no longer than the question.
template <auto kKernel>
cudaError_t grid_size(int64_t chunks, unsigned* blocks) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  int most = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (error == cudaSuccess && most == 0) {
    int processors = 0;
    int resident = 0;
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kKernel, kThreads, 0);
    }
    most = processors * resident;
    if (device < kDevices) {
      known[device].store(most, std::memory_order_relaxed);
    }
  }
  *blocks = static_cast<unsigned>(chunks < most ? chunks : most);
  return error;
}

}  // namespace megatron_ext
