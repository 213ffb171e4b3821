// The CUDA kernels as ops of the namespace megatron_ext_emulated, on CPU tensors.

#include "cuda/launch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <stdexcept>
#include <tuple>

#include "read_table.h"

namespace megatron_ext {
namespace {

using torch::headeronly::ScalarType;

Tensor make_table(const Launch& launch, const TableHeader& header) {
  Tensor table = torch::stable::empty({Table::size(header)}, ScalarType::Byte);
  // What the device's allocator hands out is not zero.
  std::memset(table.data_ptr(), 0xFF, table.numel());
  write_table(launch, header, static_cast<unsigned char*>(table.data_ptr()));
  return table;
}

Tensor run(const Tensor& table, const TableHeader& header, Statistics statistics) {
  const int64_t rows = statistics == Statistics::none ? 0 : header.tensors;
  Tensor out = torch::stable::empty({rows, kMoments, kColumns}, ScalarType::Double);
  std::memset(out.data_ptr(), 0xFF, out.numel() * sizeof(double));
  if (launch_transform(Table(static_cast<unsigned char*>(table.data_ptr()), header), header,
                       statistics, static_cast<double*>(out.data_ptr()), nullptr) != cudaSuccess) {
    throw std::runtime_error("launch_transform failed");
  }
  return out;
}

Tensor transform_moments_(const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& segments,
                          const Tensor& coefficients, int64_t statistics) {
  const Launch launch = read_table(exp_avg, exp_avg_sq, segments, coefficients, false, -1);
  const TableHeader header = header_of(launch, -1);
  return run(make_table(launch, header), header, read_statistics(statistics));
}

std::tuple<Tensor, Tensor> launch_table(const Tensors& exp_avg, const Tensors& exp_avg_sq,
                                        const Tensor& segments, const Tensor& coefficients) {
  const Launch launch = read_table(exp_avg, exp_avg_sq, segments, coefficients, false, -1);
  const TableHeader header = header_of(launch, -1);
  return {make_table(launch, header), to_tensor(header)};
}

Tensor transform_prepared_(const Tensor& table, const Tensor& header, int64_t statistics) {
  return run(table, read_header(header, table, false), read_statistics(statistics));
}

Tensor compare_weights(const Tensors& master, const Tensors& weights) {
  const WeightPairs pairs = read_weights(master, weights, false, -1);
  Tensor out = torch::stable::empty({static_cast<int64_t>(master.size()), kDifferences},
                                    ScalarType::Long);
  torch::stable::zero_(out);
  if (pairs.total_chunks > 0) {
    launch_compare(pairs.list.data(), static_cast<int64_t>(pairs.list.size()), pairs.total_chunks,
                   static_cast<int64_t*>(out.data_ptr()), nullptr);
  }
  return out;
}

Tensor magnitude_histogram(const Tensors& tensors, const Tensor& ranges, const Tensor& prefixes,
                           int64_t level) {
  const HistogramLaunch launch = read_histogram(tensors, ranges, prefixes, level, false, -1);
  std::vector<DeviceRange> table;
  for (const HistogramRange& r : launch.ranges) {
    table.push_back(
        {r.data, r.begin, r.end, r.group, r.first_chunk, static_cast<int64_t>(r.type)});
  }
  Tensor out = torch::stable::empty({prefixes.size(0), kBins}, ScalarType::Long);
  torch::stable::zero_(out);
  if (launch.total_chunks > 0) {
    launch_histogram(table.data(), static_cast<int64_t>(table.size()), launch.total_chunks,
                     static_cast<const int64_t*>(prefixes.data_ptr()), kLevelShift[level],
                     kLevelBits[level], static_cast<int64_t*>(out.data_ptr()), kBins, nullptr);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_ext_emulated, library) {
  library.def(
      "transform_moments_(Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor segments, "
      "Tensor coefficients, int statistics) -> Tensor");
  library.def(
      "launch_table(Tensor[] exp_avg, Tensor[] exp_avg_sq, Tensor segments, Tensor coefficients) "
      "-> (Tensor, Tensor)");
  library.def("transform_prepared_(Tensor(a!) table, Tensor header, int statistics) -> Tensor");
  library.def(
      "magnitude_histogram(Tensor[] tensors, Tensor ranges, Tensor prefixes, int level) -> Tensor");
  library.def("compare_weights(Tensor[] master, Tensor[] weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_ext_emulated, CPU, library) {
  library.impl("transform_moments_", TORCH_BOX(&transform_moments_));
  library.impl("launch_table", TORCH_BOX(&launch_table));
  library.impl("transform_prepared_", TORCH_BOX(&transform_prepared_));
  library.impl("compare_weights", TORCH_BOX(&compare_weights));
  library.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
}

}  // namespace megatron_ext
