// The CPU kernels of the ops that megatron_ext/_ops/schema.py declares.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../read_table.h"
#include "kernel.h"

namespace megatron_ext {
namespace {

using torch::headeronly::ScalarType;

struct Kernels {
  TransformChunk transform;
  CompareChunk compare;
};

Kernels best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("f16c")) {
    return {transform_avx512, compare_avx512};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return {transform_avx2, compare_avx2};
  }
#endif
  return {transform_baseline, compare_baseline};
}

const Kernels& kernels() {
  static const Kernels best = best_kernels();
  return best;
}

// The partial results are summed in the order of the chunks, so that the result does not depend on
// the number of threads.
void add_up(const Table& table, int64_t tensors, Statistics statistics, double* out) {
  for (int64_t t = 0; t < tensors; ++t) {
    for (int moment = 0; moment < kMoments; ++moment, out += kColumns) {
      double sums[kColumns] = {};
      for (int64_t c = table.first_chunk[t]; c < table.first_chunk[t + 1]; ++c) {
        const Tally& tally = table.partials[c].tally[moment];
        sums[0] += tally.before;
        sums[1] += tally.after;
        sums[2] = std::max(sums[2], static_cast<double>(tally.largest));
        sums[3] += tally.nonfinite;
        sums[4] += tally.changed;
      }
      if (statistics == Statistics::after) {
        sums[0] = sums[4] = -1.0;  // not counted
      }
      std::copy(sums, sums + kColumns, out);
    }
  }
}

Tensor make_table(const Launch& launch, const TableHeader& header) {
  Tensor table = torch::stable::empty({Table::size(header)}, ScalarType::Byte);
  write_table(launch, header, static_cast<unsigned char*>(table.data_ptr()));
  return table;
}

Tensor run(const Tensor& bytes, const TableHeader& header, Statistics statistics) {
  const TransformChunk transform_chunk = kernels().transform;
  const Table table(static_cast<unsigned char*>(bytes.data_ptr()), header);
  const bool counts = statistics != Statistics::none;
  torch::stable::parallel_for(0, header.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const Record& r = table.records[table.record_of_chunk[chunk]];
      Partial partial;
      transform_chunk(r, range(r, chunk), statistics, partial.tally);
      if (counts) {
        table.partials[chunk] = partial;
      }
    }
  });
  Tensor out =
      torch::stable::empty({counts ? header.tensors : 0, kMoments, kColumns}, ScalarType::Double);
  if (counts) {
    add_up(table, header.tensors, statistics, static_cast<double*>(out.data_ptr()));
  }
  return out;
}

Tensor transform_moments_(const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& segments,
                          const Tensor& coefficients, int64_t statistics_code) {
  const Statistics statistics = read_statistics(statistics_code);
  const Launch launch = read_table(exp_avg, exp_avg_sq, segments, coefficients, false, -1);
  const TableHeader header = header_of(launch, -1);
  return run(make_table(launch, header), header, statistics);
}

std::tuple<Tensor, Tensor> launch_table(const Tensors& exp_avg, const Tensors& exp_avg_sq,
                                        const Tensor& segments, const Tensor& coefficients) {
  const Launch launch = read_table(exp_avg, exp_avg_sq, segments, coefficients, false, -1);
  const TableHeader header = header_of(launch, -1);
  return {make_table(launch, header), to_tensor(header)};
}

Tensor transform_prepared_(const Tensor& table, const Tensor& header_words,
                           int64_t statistics_code) {
  const Statistics statistics = read_statistics(statistics_code);
  return run(table, read_header(header_words, table, false), statistics);
}

Tensor compare_weights(const Tensors& master, const Tensors& weights) {
  const WeightPairs pairs = read_weights(master, weights, false, -1);
  const CompareChunk compare = kernels().compare;
  const int64_t count = static_cast<int64_t>(pairs.list.size());
  std::vector<Difference> of_chunk(pairs.total_chunks);
  torch::stable::parallel_for(0, pairs.total_chunks, 1, [&](int64_t begin, int64_t end) {
    int64_t pair = find(pairs.list.data(), count, begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (pair + 1 < count && pairs.list[pair + 1].first_chunk <= chunk) {
        ++pair;
      }
      of_chunk[chunk] = compare(pairs.list[pair], range(pairs.list[pair], chunk));
    }
  });
  Tensor out =
      torch::stable::empty({static_cast<int64_t>(master.size()), kDifferences}, ScalarType::Long);
  int64_t* const rows = static_cast<int64_t*>(out.data_ptr());
  std::fill(rows, rows + out.numel(), 0);
  for (const WeightPair& p : pairs.list) {
    int64_t* const row = rows + p.tensor * kDifferences;
    for (int64_t c = p.first_chunk; c < p.first_chunk + chunks(p); ++c) {
      row[0] += of_chunk[c].elements;
      row[1] = std::max(row[1], static_cast<int64_t>(bits(of_chunk[c].largest)));
    }
  }
  return out;
}

Tensor magnitude_histogram(const Tensors& tensors, const Tensor& ranges, const Tensor& prefixes,
                           int64_t level) {
  const HistogramLaunch launch = read_histogram(tensors, ranges, prefixes, level, false, -1);
  Tensor out = torch::stable::empty({prefixes.size(0), kBins}, ScalarType::Long);
  int64_t* const counts = static_cast<int64_t*>(out.data_ptr());
  std::fill(counts, counts + prefixes.size(0) * kBins, 0);
  const int64_t* const prefix = static_cast<const int64_t*>(prefixes.data_ptr());
  const int64_t parts = std::min<int64_t>(launch.total_chunks, torch::stable::get_num_threads());
  std::vector<std::vector<int64_t>> local(parts > 1 ? parts - 1 : 0);
  for (auto& bins : local) {
    bins.assign(prefixes.size(0) * kBins, 0);
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      int64_t* const bins = part == 0 ? counts : local[part - 1].data();
      const int64_t begin = launch.total_chunks * part / parts;
      const int64_t end = launch.total_chunks * (part + 1) / parts;
      for (const HistogramRange& r : launch.ranges) {
        const int64_t from = r.begin + std::max<int64_t>(begin - r.first_chunk, 0) * kChunk;
        const int64_t to = std::min(r.end, r.begin + (end - r.first_chunk) * kChunk);
        if (from < to) {
          histogram(r.data, r.type, from, to - from, static_cast<uint32_t>(prefix[r.group]),
                    kLevelShift[level], kLevelBits[level], bins + r.group * kBins);
        }
      }
    }
  });
  for (const auto& bins : local) {
    for (size_t i = 0; i < bins.size(); ++i) {
      counts[i] += bins[i];
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ext, CPU, library) {
  library.impl("transform_moments_", TORCH_BOX(&transform_moments_));
  library.impl("launch_table", TORCH_BOX(&launch_table));
  library.impl("transform_prepared_", TORCH_BOX(&transform_prepared_));
  library.impl("compare_weights", TORCH_BOX(&compare_weights));
  library.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
}

}  // namespace megatron_ext
