// As much of CUDA as csrc/cuda/*.cu uses, on the CPU: a thread of the block is a thread, a barrier is
// a barrier, and blocks run one after the other. It shows that the kernels' arithmetic, indices,
// barriers and last-block logic are right; it shows nothing of races between blocks or of speed.

#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct Dim {
  unsigned x;
};
inline thread_local Dim threadIdx;
inline thread_local Dim blockIdx;
inline Dim gridDim;

namespace emulation {

inline constexpr int kWarp = 32;
inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline std::vector<uint64_t> lanes;

}  // namespace emulation

inline void __syncthreads() { emulation::block->arrive_and_wait(); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int warp = threadIdx.x / emulation::kWarp;
  const int lane = threadIdx.x % emulation::kWarp;
  std::memcpy(&emulation::lanes[threadIdx.x], &value, sizeof(T));
  emulation::warps[warp]->arrive_and_wait();
  if (lane + by < emulation::kWarp) {
    std::memcpy(&value, &emulation::lanes[threadIdx.x + by], sizeof(T));
  }
  emulation::warps[warp]->arrive_and_wait();
  return value;
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T atomicAdd(T* p, T value) {
  return std::atomic_ref<T>(*p).fetch_add(value);
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  std::memset(p, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) {
  *blocks = 1;
  return cudaSuccess;
}

// kernel<<<blocks, threads>>>(arguments...)
template <typename Kernel, typename... Arguments>
void emulate(Kernel kernel, unsigned blocks, int threads, Arguments... arguments) {
  gridDim.x = blocks;
  emulation::block = std::make_unique<std::barrier<>>(threads);
  emulation::warps.clear();
  for (int w = 0; w < threads / emulation::kWarp; ++w) {
    emulation::warps.push_back(std::make_unique<std::barrier<>>(emulation::kWarp));
  }
  emulation::lanes.assign(threads, 0);
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([=] {
      threadIdx.x = t;
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx.x = b;
        kernel(arguments...);
        __syncthreads();
      }
    });
  }
  for (std::thread& t : running) {
    t.join();
  }
}
