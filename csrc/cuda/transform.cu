// The CUDA kernel of transform_moments_. Its blocks are persistent and process one chunk of one
// segment at a time.

#include <cassert>

#include "device.cuh"
#include "launch.h"
#include "sums.cuh"

namespace megatron_ext {
namespace {

// A chunk of a segment. Between the first and the last multiple of N in the tensor, a thread gets N
// elements at a time, and before and after them one. The assignment depends only on the element's
// position in the tensor, so that the statistics do not depend on the address. The address decides
// only whether N elements move as 16-byte vectors.
struct Chunk {
  int64_t origin;         // the multiple of kChunk in the tensor from which the others count
  int64_t segment_begin;  // counted from origin
  int begin;
  int end;
};

// The number of bytes that a thread has in flight. It issues their loads before it stores the first
// result.
constexpr int kInFlight = 64;
// The number of resident blocks per multiprocessor for which the registers must suffice.
constexpr int kBlocks = 5;

template <Rule R, int C>
__device__ __forceinline__ void apply(float (&x)[C], const Coefficients& k) {
#pragma unroll
  for (int i = 0; i < C; ++i) {
    x[i] = transform<R>(x[i], k, {}, 0);
  }
}

// The rule is the same for a whole segment, so that the branch never diverges. A positional rule is
// applied element by element (transform_one), and a joint rule in a loop over both moments.
template <int C>
__device__ __forceinline__ void apply(Rule rule, float (&x)[C], const Coefficients& k) {
  switch (rule) {
#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) \
  case Rule::name:                                               \
    if constexpr (Kind::kind == Kind::pointwise) {               \
      apply<Rule::name>(x, k);                                   \
    }                                                            \
    return;
    MEGATRON_EXT_RULES(MEGATRON_EXT_RULE)
#undef MEGATRON_EXT_RULE
  }
}

// A segment's rule for one moment. The coefficients are a copy in registers: through a reference
// the compiler would read them again after every store, which might have changed them.
struct Unary {
  Rule rule;
  Coefficients k;
  const GlobalIndex& where;
  int64_t segment_begin;
  float lowest;  // of the moment
};

template <typename T, Statistics S>
__device__ __forceinline__ void transform_one(T* x, int at, const Unary& unary, Tally& tally) {
  const bool needs = reads(unary.rule, S);
  const float old = needs ? load(x[at]) : 0.0f;
  float y[1] = {old};
  if (is_kind(unary.rule, Kind::positional)) {
    switch (unary.rule) {
#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads)                         \
  case Rule::name:                                                                       \
    if constexpr (Kind::kind == Kind::positional) {                                      \
      y[0] = transform<Rule::name>(old, unary.k, unary.where, at - unary.segment_begin); \
    }                                                                                    \
    break;
      MEGATRON_EXT_RULES(MEGATRON_EXT_RULE)
#undef MEGATRON_EXT_RULE
    }
  } else {
    apply(unary.rule, y, unary.k);
  }
  if (unary.rule != Rule::keep) {
    const T stored = store<T>(y[0]);
    x[at] = stored;
    y[0] = load(stored);
  }
  count<S>(tally, old, y[0], unary.lowest);
}

// Processes U 16-byte vectors at a time.
template <typename T, Statistics S>
__device__ __forceinline__ void transform_vectors(T* x, int begin, int end, const Unary& unary,
                                                  Tally& tally) {
  constexpr int N = 16 / sizeof(T);
  constexpr int U = kInFlight / sizeof(Vector<T, N>);
  constexpr int kStride = kThreads * N;
  const bool needs = reads(unary.rule, S);
  for (int base = begin + threadIdx.x * N; base < end; base += U * kStride) {
    Vector<T, N> vector[U] = {};
    if (needs) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (base + u * kStride < end) {
          vector[u].read(x + base + u * kStride);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (base + u * kStride >= end) {
        break;
      }
      float old[N];
      float y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        old[i] = y[i] = load(vector[u].x[i]);
      }
      apply(unary.rule, y, unary.k);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        // A kept element is not written, because a NaN would lose its bits.
        vector[u].x[i] = store<T>(y[i]);
        y[i] = load(vector[u].x[i]);
      }
      count_vector<S>(tally, old, y, unary.lowest);
      if (unary.rule != Rule::keep) {
        vector[u].write(x + base + u * kStride);
      }
    }
  }
}

template <typename T, Statistics S>
__device__ __forceinline__ void transform_moment(void* data, const Chunk& c, const Unary& unary,
                                                 Tally& tally) {
  constexpr int N = 16 / sizeof(T);
  T* const x = static_cast<T*>(data) + c.origin;
  __builtin_assume(__isGlobal(x));
  const int begin = min((c.begin + N - 1) / N * N, c.end);
  const int end = max(c.end / N * N, begin);
  for (int at = c.begin + threadIdx.x; at < begin; at += kThreads) {
    transform_one<T, S>(x, at, unary, tally);
  }
  if (aligned(x) && !is_kind(unary.rule, Kind::positional)) {
    transform_vectors<T, S>(x, begin, end, unary, tally);
  } else {
    for (int base = begin + threadIdx.x * N; base < end; base += kThreads * N) {
#pragma unroll 1
      for (int i = 0; i < N; ++i) {
        transform_one<T, S>(x, base + i, unary, tally);
      }
    }
  }
  for (int at = end + threadIdx.x; at < c.end; at += kThreads) {
    transform_one<T, S>(x, at, unary, tally);
  }
}

// Kept elements have the same sum before and after, so that it is computed once.
template <Statistics S>
constexpr Statistics kKept = S == Statistics::none ? Statistics::none : Statistics::after;

template <typename M, typename V, Statistics S>
__device__ __forceinline__ void batch_size_one(const M* m, V* v, int at, const Coefficients& k,
                                               Tally* tally) {
  const float momentum = load(m[at]);
  const float old = load(v[at]);
  const V stored = store<V>(batch_size(momentum, old, k));
  v[at] = stored;
  count<kKept<S>>(tally[0], momentum, momentum, lowest_of(0));
  count<S>(tally[1], old, load(stored), lowest_of(1));
}

template <typename M, typename V, Statistics S>
__device__ __forceinline__ void batch_size_vectors(const M* m, V* v, int begin, int end,
                                                   const Coefficients& k, Tally* tally) {
  constexpr int N = sizeof(M) == 4 && sizeof(V) == 4 ? 4 : 8;
  constexpr int U = kInFlight / (sizeof(Vector<M, N>) + sizeof(Vector<V, N>));
  constexpr int kStride = kThreads * N;
  for (int base = begin + threadIdx.x * N; base < end; base += U * kStride) {
    Vector<M, N> momentum[U] = {};
    Vector<V, N> vector[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (base + u * kStride < end) {
        momentum[u].read(m + base + u * kStride);
        vector[u].read(v + base + u * kStride);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (base + u * kStride >= end) {
        break;
      }
      float first[N];
      float old[N];
      float y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        first[i] = load(momentum[u].x[i]);
        old[i] = load(vector[u].x[i]);
        vector[u].x[i] = store<V>(batch_size(first[i], old[i], k));
        y[i] = load(vector[u].x[i]);
      }
      count_vector<kKept<S>>(tally[0], first, first, lowest_of(0));
      count_vector<S>(tally[1], old, y, lowest_of(1));
      vector[u].write(v + base + u * kStride);
    }
  }
}

template <typename M, typename V, Statistics S>
__device__ __forceinline__ void batch_size_moments(const Record& r, const Chunk& c, Tally* sums) {
  Tally tally[kMoments];
  constexpr int N = sizeof(M) == 4 && sizeof(V) == 4 ? 4 : 8;
  const M* const m = static_cast<const M*>(r.data[0]) + c.origin;
  V* const v = static_cast<V*>(r.data[1]) + c.origin;
  __builtin_assume(__isGlobal(m) && __isGlobal(v));
  const Coefficients k = r.coefficients[1];
  const int begin = min((c.begin + N - 1) / N * N, c.end);
  const int end = max(c.end / N * N, begin);
  for (int at = c.begin + threadIdx.x; at < begin; at += kThreads) {
    batch_size_one<M, V, S>(m, v, at, k, tally);
  }
  if (aligned(m) && aligned(v)) {
    batch_size_vectors<M, V, S>(m, v, begin, end, k, tally);
  } else {
    for (int base = begin + threadIdx.x * N; base < end; base += kThreads * N) {
#pragma unroll 1
      for (int i = 0; i < N; ++i) {
        batch_size_one<M, V, S>(m, v, base + i, k, tally);
      }
    }
  }
  for (int at = end + threadIdx.x; at < c.end; at += kThreads) {
    batch_size_one<M, V, S>(m, v, at, k, tally);
  }
  if constexpr (S != Statistics::none) {
    tally[0].before = tally[0].after;
    block_sum(tally[0], sums[0]);
    block_sum(tally[1], sums[1]);
  }
}

template <typename M, Statistics S>
__device__ __forceinline__ void batch_size_type(const Record& r, const Chunk& c, Tally* sums) {
  switch (r.type[1]) {
    case Type::float32:
      return batch_size_moments<M, float, S>(r, c, sums);
    case Type::bfloat16:
      return batch_size_moments<M, __nv_bfloat16, S>(r, c, sums);
    case Type::float16:
      return batch_size_moments<M, __half, S>(r, c, sums);
  }
}

template <Statistics S>
__device__ __forceinline__ void transform_record(const Record& r, const Chunk& c, Tally* sums) {
  if (is_kind(r.rule[1], Kind::joint)) {
    switch (r.type[0]) {
      case Type::float32:
        return batch_size_type<float, S>(r, c, sums);
      case Type::bfloat16:
        return batch_size_type<__nv_bfloat16, S>(r, c, sums);
      case Type::float16:
        return batch_size_type<__half, S>(r, c, sums);
    }
  }
#pragma unroll 1
  for (int moment = 0; moment < kMoments; ++moment) {
    if (!visits(r.rule[moment], S)) {
      continue;
    }
    const Unary unary{r.rule[moment], r.coefficients[moment], r.where, c.segment_begin,
                      lowest_of(moment)};
    Tally t;
    switch (r.type[moment]) {
      case Type::float32:
        transform_moment<float, S>(r.data[moment], c, unary, t);
        break;
      case Type::bfloat16:
        transform_moment<__nv_bfloat16, S>(r.data[moment], c, unary, t);
        break;
      case Type::float16:
        transform_moment<__half, S>(r.data[moment], c, unary, t);
        break;
    }
    if constexpr (S != Statistics::none) {
      block_sum(t, sums[moment]);
    }
  }
}

template <Statistics S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    transform_kernel(const Table table, int64_t tensors, int chunks, double* out) {
  assert(*table.mark == kTableMark &&
         "megatron_ext: a CUDA graph outlived the prepared Transform that it launches");
  if (S != Statistics::none && blockIdx.x == 0) {
    write_empty<S>(table.first_chunk, tensors, out);
  }
  __shared__ Tally sums[kMoments];  // of thread 0
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const Record& r = table.records[table.record_of_chunk[chunk]];
    const Range elements = range(r, chunk);
    const int64_t origin = elements.begin / kChunk * kChunk;
    const Chunk c{origin, r.begin - origin, static_cast<int>(elements.begin - origin),
                  static_cast<int>(elements.end - origin)};
    transform_record<S>(r, c, sums);
    if constexpr (S != Statistics::none) {
      hand_in<S>(sums, chunk, r.tensor, table, out);
    }
  }
}

template <Statistics S>
cudaError_t launch(const Table& table, const TableHeader& header, double* out,
                   cudaStream_t stream) {
  unsigned blocks = 0;
  const int64_t chunks = header.chunks > 0 ? header.chunks : 1;  // one block writes empty rows
  const cudaError_t error = grid_size<transform_kernel<S>>(chunks, &blocks);
  if (error != cudaSuccess || blocks == 0) {
    return error;
  }
  transform_kernel<S><<<blocks, kThreads, 0, stream>>>(table, header.tensors,
                                                       static_cast<int>(header.chunks), out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_transform(const Table& table, const TableHeader& header, Statistics statistics,
                             double* out, cudaStream_t stream) {
  if (statistics == Statistics::none ? header.chunks == 0 : header.tensors == 0) {
    return cudaSuccess;
  }
  switch (statistics) {
    case Statistics::none:
      return launch<Statistics::none>(table, header, out, stream);
    case Statistics::after:
      return launch<Statistics::after>(table, header, out, stream);
    case Statistics::before_and_after:
      return launch<Statistics::before_and_after>(table, header, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace megatron_ext
