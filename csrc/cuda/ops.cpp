// The CUDA kernels of the ops that megatron_ext/_ops/schema.py declares.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../read_table.h"
#include "launch.h"

namespace megatron_ext {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

torch::stable::Device cuda_device(int32_t index) { return {DeviceType::CUDA, index}; }

// Returns the device of the first tensor on a CUDA device. The others are compared with it.
int32_t device_of(const Tensors& a, const Tensors& b) {
  for (const Tensors* list : {&a, &b}) {
    for (const Tensor& x : *list) {
      if (x.is_cuda()) {
        return x.get_device_index();
      }
    }
  }
  throw std::runtime_error("no tensor is on a CUDA device");
}

Tensor pinned(const void* bytes, size_t size) {
  Tensor out = torch::stable::empty({static_cast<int64_t>(size)}, ScalarType::Byte, std::nullopt,
                                    torch::stable::Device(DeviceType::CPU), true);
  std::memcpy(out.data_ptr(), bytes, size);
  return out;
}

// Copies from pinned memory on the current stream, without waiting. torch's host allocator keeps
// the pinned memory until the copy is done.
Tensor to_device(const Tensor& host, int32_t device_index) {
  return torch::stable::to(host, cuda_device(device_index), true);
}

// Makes the table of a launch in device memory, on the current stream.
Tensor make_table(const Launch& launch, const TableHeader& header, int32_t device_index) {
  if (is_capturing(current_stream(device_index))) {
    throw std::runtime_error(
        "a CUDA graph is being captured, which would read the launch table after it is gone: "
        "prepare the transform before the capture");
  }
  const int64_t size = Table::partials_at(header);
  Tensor host = torch::stable::empty({size}, ScalarType::Byte, std::nullopt,
                                     torch::stable::Device(DeviceType::CPU), true);
  write_table(launch, header, static_cast<unsigned char*>(host.data_ptr()));
  Tensor table = torch::stable::empty({Table::size(header)}, ScalarType::Byte, std::nullopt,
                                      cuda_device(device_index));
  Tensor copied = torch::stable::narrow(table, 0, 0, size);
  torch::stable::copy_(copied, host, true);
  return table;
}

Tensor run(const Tensor& table, const TableHeader& header, Statistics statistics,
           int32_t device_index) {
  const int64_t rows = statistics == Statistics::none ? 0 : header.tensors;
  Tensor out = torch::stable::empty({rows, kMoments, kColumns}, ScalarType::Double, std::nullopt,
                                    cuda_device(device_index));
  check(launch_transform(Table(static_cast<unsigned char*>(table.data_ptr()), header), header,
                         statistics, static_cast<double*>(out.data_ptr()),
                         current_stream(device_index)),
        "transform_moments_");
  return out;
}

Tensor transform_moments_(const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& segments,
                          const Tensor& coefficients, int64_t statistics_code) {
  const Statistics statistics = read_statistics(statistics_code);
  const int32_t device_index = device_of(exp_avg, exp_avg_sq);
  const Launch launch = read_table(exp_avg, exp_avg_sq, segments, coefficients, true, device_index);
  const TableHeader header = header_of(launch, device_index);
  const DeviceGuard guard(device_index);
  return run(make_table(launch, header, device_index), header, statistics, device_index);
}

std::tuple<Tensor, Tensor> launch_table(const Tensors& exp_avg, const Tensors& exp_avg_sq,
                                        const Tensor& segments, const Tensor& coefficients) {
  const int32_t device_index = device_of(exp_avg, exp_avg_sq);
  const Launch launch = read_table(exp_avg, exp_avg_sq, segments, coefficients, true, device_index);
  const TableHeader header = header_of(launch, device_index);
  const DeviceGuard guard(device_index);
  return {make_table(launch, header, device_index), to_tensor(header)};
}

Tensor transform_prepared_(const Tensor& table, const Tensor& header_words,
                           int64_t statistics_code) {
  const Statistics statistics = read_statistics(statistics_code);
  const TableHeader header = read_header(header_words, table, true);
  const int32_t device_index = static_cast<int32_t>(header.device);
  const DeviceGuard guard(device_index);
  return run(table, header, statistics, device_index);
}

Tensor compare_weights(const Tensors& master, const Tensors& weights) {
  const int32_t device_index = device_of(master, weights);
  const WeightPairs pairs = read_weights(master, weights, true, device_index);
  const DeviceGuard guard(device_index);
  const cudaStream_t stream = current_stream(device_index);
  Tensor out = torch::stable::empty({static_cast<int64_t>(master.size()), kDifferences},
                                    ScalarType::Long, std::nullopt, cuda_device(device_index));
  torch::stable::zero_(out);
  if (pairs.total_chunks == 0) {
    return out;
  }
  if (is_capturing(stream)) {
    throw std::runtime_error("compare_weights cannot be captured into a CUDA graph");
  }
  Tensor on_device =
      to_device(pinned(pairs.list.data(), pairs.list.size() * sizeof(WeightPair)), device_index);
  check(launch_compare(static_cast<const WeightPair*>(on_device.data_ptr()),
                       static_cast<int64_t>(pairs.list.size()), pairs.total_chunks,
                       static_cast<int64_t*>(out.data_ptr()), stream),
        "compare_weights");
  return out;
}

Tensor magnitude_histogram(const Tensors& tensors, const Tensor& ranges, const Tensor& prefixes,
                           int64_t level) {
  const int32_t device_index = device_of(tensors, {prefixes});
  const HistogramLaunch launch =
      read_histogram(tensors, ranges, prefixes, level, true, device_index);
  std::vector<DeviceRange> table;
  table.reserve(launch.ranges.size());
  for (const HistogramRange& r : launch.ranges) {
    table.push_back({r.data, r.begin, r.end, r.group, r.first_chunk, static_cast<int64_t>(r.type)});
  }
  const DeviceGuard guard(device_index);
  const cudaStream_t stream = current_stream(device_index);
  Tensor out = torch::stable::empty({prefixes.size(0), kBins}, ScalarType::Long, std::nullopt,
                                    cuda_device(device_index));
  torch::stable::zero_(out);
  if (launch.total_chunks == 0) {
    return out;
  }
  if (is_capturing(stream)) {
    throw std::runtime_error("magnitude_histogram cannot be captured into a CUDA graph");
  }
  Tensor on_device =
      to_device(pinned(table.data(), table.size() * sizeof(DeviceRange)), device_index);
  check(launch_histogram(static_cast<const DeviceRange*>(on_device.data_ptr()),
                         static_cast<int64_t>(table.size()), launch.total_chunks,
                         static_cast<const int64_t*>(prefixes.data_ptr()), kLevelShift[level],
                         kLevelBits[level], static_cast<int64_t*>(out.data_ptr()), kBins, stream),
        "magnitude_histogram");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ext, CUDA, library) {
  library.impl("transform_moments_", TORCH_BOX(&transform_moments_));
  library.impl("launch_table", TORCH_BOX(&launch_table));
  library.impl("transform_prepared_", TORCH_BOX(&transform_prepared_));
  library.impl("compare_weights", TORCH_BOX(&compare_weights));
  library.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
}

}  // namespace megatron_ext
