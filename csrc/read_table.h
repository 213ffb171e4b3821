// Converts the op's arguments to records, and checks that the kernels stay inside the tensors.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "launch_table.h"

namespace megatron_ext {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

struct Launch {
  std::vector<Record> records;       // in order of (tensor, begin); none is empty
  std::vector<int64_t> first_chunk;  // of each tensor, and the total at the end
  int64_t total_chunks() const { return first_chunk.back(); }
};

// Throws std::runtime_error before any write if the lists have different lengths, if a tensor is
// not contiguous, is on another device than `cuda` and `device_index` say or has another dtype, if
// tensors share memory, if a table has another shape or dtype, if a rule is unknown, if a range is
// outside its tensor, or if ranges overlap.
Launch read_table(const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& segments,
                  const Tensor& coefficients, bool cuda, int32_t device_index);

// The header of a launch's table, also as the int64 CPU tensor that launch_table returns.
TableHeader header_of(const Launch& launch, int32_t device_index);
Tensor to_tensor(const TableHeader& header);

// Writes the table without its partial results: Table::partials_at(header) bytes.
void write_table(const Launch& launch, const TableHeader& header, unsigned char* bytes);

// Reads what launch_table returned. Throws if it is something else, or for another device.
TableHeader read_header(const Tensor& header, const Tensor& table, bool cuda);

struct WeightPairs {
  std::vector<WeightPair> list;  // none is empty
  int64_t total_chunks;
};

// Throws like read_table if the lists or the tensors of a pair have different lengths, or if a
// tensor cannot be read.
WeightPairs read_weights(const Tensors& master, const Tensors& weights, bool cuda,
                         int32_t device_index);

struct HistogramRange {
  const void* data;
  int64_t begin;
  int64_t end;
  int64_t group;
  int64_t first_chunk;
  Type type;
};

struct HistogramLaunch {
  std::vector<HistogramRange> ranges;  // none is empty
  int64_t total_chunks;
};

// The bits of a magnitude (fp32 without its sign) by which one level of the histogram sorts.
inline constexpr int kLevels = 3;
inline constexpr int kLevelBits[kLevels] = {11, 10, 10};
inline constexpr int kLevelShift[kLevels] = {20, 10, 0};
inline constexpr int64_t kBins = 2048;

HistogramLaunch read_histogram(const Tensors& tensors, const Tensor& ranges, const Tensor& prefixes,
                               int64_t level, bool cuda, int32_t device_index);

Statistics read_statistics(int64_t statistics);

}  // namespace megatron_ext
