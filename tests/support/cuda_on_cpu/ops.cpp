// The CUDA kernels as ops of the namespace megatron_ext_emulated, on CPU tensors.

#include "cuda/launch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>
#include <stdexcept>

#include "read_table.h"

namespace megatron_ext {
namespace {

using torch::headeronly::ScalarType;

Tensor transform_moments_(const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& segments,
                          const Tensor& coefficients, int64_t statistics_code,
                          std::optional<Tensor>, std::optional<Tensor>) {
  const Statistics statistics = read_statistics(statistics_code);
  const Launch launch = read_table(exp_avg, exp_avg_sq, segments, coefficients, false, -1);
  const std::vector<unsigned char> bytes = table_bytes(launch.records, launch.first_chunk,
                                                       segments.size(0));
  const int64_t tensors = static_cast<int64_t>(exp_avg.size());
  const bool counts = statistics != Statistics::none;
  Tensor out = torch::stable::empty({counts ? tensors : 0, kMoments, kColumns}, ScalarType::Double);
  // What the device's allocator hands out is not zero.
  std::memset(out.data_ptr(), 0xFF, out.numel() * sizeof(double));
  std::vector<Partial> partials(launch.total_chunks());
  std::memset(static_cast<void*>(partials.data()), 0xFF, partials.size() * sizeof(Partial));
  std::vector<uint32_t> done(tensors, 0xFFFFFFFFu);
  if (launch_transform(bytes.data(), launch.total_chunks(), tensors, statistics, done.data(),
                       partials.data(), static_cast<double*>(out.data_ptr()), nullptr) !=
      cudaSuccess) {
    throw std::runtime_error("launch_transform failed");
  }
  return out;
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
      "Tensor coefficients, int statistics, Tensor? device_table=None, Tensor? host_table=None) "
      "-> Tensor");
  library.def(
      "magnitude_histogram(Tensor[] tensors, Tensor ranges, Tensor prefixes, int level) -> Tensor");
  library.def("compare_weights(Tensor[] master, Tensor[] weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_ext_emulated, CPU, library) {
  library.impl("transform_moments_", TORCH_BOX(&transform_moments_));
  library.impl("compare_weights", TORCH_BOX(&compare_weights));
  library.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
}

}  // namespace megatron_ext
