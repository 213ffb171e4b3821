// The functions of the .cu files that ops.cpp calls. The .cu files include no torch header.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "../segment_table.h"
#include "../tally.h"

namespace megatron_ext {

// The launch table in device memory: this header, the records, first_chunk[tensors + 1].
struct TableHeader {
  int64_t records;
  int64_t tensors;
};

struct Partial {
  Tally tally[kMoments];
};

// Builds the bytes of the launch table. `rows` includes empty segments, which have no record, so
// that the size depends only on the arguments' shapes.
inline std::vector<unsigned char> table_bytes(const std::vector<Record>& records,
                                              const std::vector<int64_t>& first_chunk,
                                              int64_t rows) {
  const TableHeader header{static_cast<int64_t>(records.size()),
                           static_cast<int64_t>(first_chunk.size()) - 1};
  const size_t of_records = records.size() * sizeof(Record);
  const size_t of_chunks = first_chunk.size() * sizeof(int64_t);
  std::vector<unsigned char> bytes(sizeof(header) + rows * sizeof(Record) + of_chunks);
  unsigned char* at = bytes.data();
  std::memcpy(at, &header, sizeof(header));
  at += sizeof(header);
  if (of_records > 0) {
    std::memcpy(at, records.data(), of_records);
  }
  std::memcpy(at + of_records, first_chunk.data(), of_chunks);
  return bytes;
}

// Launches one kernel on `stream` without synchronization. With statistics, `done` (uint32
// [tensors]) is set to zero first, `partials` has one entry per chunk, and all of `out` (double
// [tensors, kMoments, kColumns]) is written.
cudaError_t launch_transform(const unsigned char* table, int64_t chunks, int64_t tensors,
                             Statistics statistics, uint32_t* done, Partial* partials, double* out,
                             cudaStream_t stream);

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
