// The functions of the .cu files that ops.cpp calls. The .cu files include no torch header.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../launch_table.h"

namespace megatron_ext {

// Launches one kernel on `stream` without synchronization. `table` is in device memory. With
// statistics all of `out` (double [tensors, kMoments, kColumns]) is written.
cudaError_t launch_transform(const Table& table, const TableHeader& header, Statistics statistics,
                             double* out, cudaStream_t stream);

// Launches one kernel on `stream` that adds to out, int64 [tensors, kDifferences].
cudaError_t launch_compare(const WeightPair* pairs, int64_t count, int64_t chunks, int64_t* out,
                           cudaStream_t stream);

struct DeviceRange {
  const void* data;
  int64_t begin;
  int64_t end;
  int64_t group;
  int64_t first_chunk;
  int64_t type;
};

// Launches one kernel on `stream` that adds to counts, int64 [groups, bins].
cudaError_t launch_histogram(const DeviceRange* ranges, int64_t count, int64_t chunks,
                             const int64_t* prefixes, int shift, int bits, int64_t* counts,
                             int64_t bins, cudaStream_t stream);

}  // namespace megatron_ext
