// As much of CUDA as csrc/cuda/*.cu uses, on the CPU: a thread of the block is a coroutine that
// runs until it waits at a barrier, and blocks run one after the other. It shows that the kernels'
// arithmetic, indices, barriers and last-block logic are right; it shows nothing of races between
// blocks or of speed. A warp runs as far as it can before the next one does, first to last in one
// launch and last to first in the next: what needs a barrier that is not there is wrong in one of
// them.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __builtin_assume(condition)
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
inline Dim threadIdx;
inline Dim blockIdx;
inline Dim gridDim;

namespace emulation {

inline constexpr int kWarp = 32;
inline constexpr size_t kStack = 64 * 1024;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

struct Barrier {
  int expected;
  int arrived = 0;
  uint64_t passed = 0;
};

inline std::vector<Thread> threads;
inline ucontext_t launcher;
inline std::function<void()> body;
inline Barrier block;
inline std::vector<Barrier> warps;
inline std::vector<uint64_t> lanes;
inline bool backwards = false;
inline uint64_t steps = 0;  // threads that came to a barrier or to their end

// Lets the other threads run.
inline void yield() {
  const unsigned me = threadIdx.x;
  swapcontext(&threads[me].context, &launcher);
  threadIdx.x = me;
}

inline void wait(Barrier& barrier) {
  const uint64_t passed = barrier.passed;
  ++steps;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
  while (barrier.passed == passed) {
    yield();
  }
}

inline void run_thread() {
  body();
  ++steps;
  threads[threadIdx.x].done = true;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int warp = threadIdx.x / emulation::kWarp;
  const int lane = threadIdx.x % emulation::kWarp;
  std::memcpy(&emulation::lanes[threadIdx.x], &value, sizeof(T));
  emulation::wait(emulation::warps[warp]);
  if (lane + by < emulation::kWarp) {
    std::memcpy(&value, &emulation::lanes[threadIdx.x + by], sizeof(T));
  }
  emulation::wait(emulation::warps[warp]);
  return value;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  for (int by = 1; by < emulation::kWarp; by *= 2) {
    const unsigned other = __shfl_down_sync(mask, value, by);
    value += threadIdx.x % emulation::kWarp + by < emulation::kWarp ? other : 0u;
  }
  return value;  // right in lane 0, which is all that asks
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  for (int by = 1; by < emulation::kWarp; by *= 2) {
    value = max(value, __shfl_down_sync(mask, value, by));
  }
  return value;
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T atomicAdd(T* p, T value) {
  return std::atomic_ref<T>(*p).fetch_add(value);
}

template <typename T>
T atomicMax(T* p, T value) {
  const T old = *p;  // a block runs alone, and a thread until it waits
  *p = max(old, value);
  return old;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

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
void emulate(Kernel kernel, unsigned blocks, int threads_per_block, Arguments... arguments) {
  using namespace emulation;
  gridDim.x = blocks;
  backwards = !backwards;
  threads = std::vector<Thread>(threads_per_block);
  body = [=] { kernel(arguments...); };
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    block = {threads_per_block};
    warps.assign(threads_per_block / kWarp, {kWarp});
    lanes.assign(threads_per_block, 0);
    for (Thread& t : threads) {
      getcontext(&t.context);
      t.stack.resize(kStack);
      t.context.uc_stack.ss_sp = t.stack.data();
      t.context.uc_stack.ss_size = kStack;
      t.context.uc_link = &launcher;
      t.done = false;
      makecontext(&t.context, run_thread, 0);
    }
    for (int left = threads_per_block; left > 0;) {
      const uint64_t before_round = steps;
      for (int w = 0; w < threads_per_block / kWarp; ++w) {
        const int first = kWarp * (backwards ? threads_per_block / kWarp - 1 - w : w);
        for (uint64_t before = steps - 1; before != steps;) {
          before = steps;
          for (int i = first; i < first + kWarp; ++i) {
            threadIdx.x = i;
            if (!threads[i].done) {
              swapcontext(&launcher, &threads[i].context);
              left -= threads[i].done;
            }
          }
        }
      }
      if (left > 0 && steps == before_round) {
        throw std::runtime_error("the threads of a block wait at different barriers");
      }
    }
  }
}
