#include "read_table.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>

// The list of rules. Python finds it in the library's file by its first words, because the kernels
// of a loaded library cannot be unloaded.
#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) \
  "\n" #name " " #code " " #coefficients " " #kind " " #reads
extern "C" {
__attribute__((visibility("default"))) extern const char megatron_ext_rules[];
const char megatron_ext_rules[] = "megatron_ext rules:" MEGATRON_EXT_RULES(MEGATRON_EXT_RULE);
}
#undef MEGATRON_EXT_RULE

namespace megatron_ext {
namespace {

using torch::headeronly::ScalarType;

// Columns of the segment table (megatron_ext/_ops/segments.py, COLUMNS).
enum Column : int64_t {
  kTensor,
  kBegin,
  kEnd,
  kRuleM,
  kRuleV,
  kStart,
  kBase,
  kRowLength,
  kRowStride,
  kKeyM,
  kKeyV,
  kIntegers,
};

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

const char* device_name(bool cuda) { return cuda ? "CUDA" : "CPU"; }

// Checks every tensor of a call. Each getter of the stable ABI is a call into libtorch, and there
// may be thousands of tensors, so that no getter is called twice for a tensor.
class TensorCheck {
 public:
  TensorCheck(bool cuda, int32_t device_index)
      : cuda_(cuda),
        device_index_(device_index),
        device_type_(cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu()),
        dtypes_{aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                aoti_torch_dtype_float16()} {}

  // Returns the data of a tensor, and sets its type and length.
  void* operator()(const Tensor& x, const char* list, size_t index, Type& type,
                   int64_t& numel) const {
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
    if (device_type != device_type_) {
      fail(list, "[", index, "] is not on the ", device_name(cuda_), " as the others are");
    }
    if (cuda_ && x.get_device_index() != device_index_) {
      fail(list, "[", index, "] is on device ", x.get_device_index(), ", the first tensor on ",
           device_index_);
    }
    if (!x.is_contiguous()) {
      fail(list, "[", index, "] is not contiguous");
    }
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    const auto* found = std::find(std::begin(dtypes_), std::end(dtypes_), dtype);
    if (found == std::end(dtypes_)) {
      fail(list, "[", index, "] is neither float32, bfloat16 nor float16");
    }
    type = static_cast<Type>(found - std::begin(dtypes_));
    numel = x.numel();
    return x.data_ptr();
  }

 private:
  bool cuda_;
  int32_t device_index_;
  int32_t device_type_;
  int32_t dtypes_[3];  // in the order of Type
};

void check_table(const Tensor& x, const char* name, ScalarType dtype, const char* dtype_name,
                 int64_t width) {
  if (!x.is_cpu() || x.scalar_type() != dtype || !x.is_contiguous() || x.dim() != 2 ||
      x.size(1) != width) {
    fail(name, " must be a contiguous CPU tensor of dtype ", dtype_name, " and shape [n, ", width,
         "]");
  }
}

const char* name(Rule rule) {
  switch (rule) {
#define MEGATRON_EXT_RULE(name, code, coefficients, kind, reads) \
  case Rule::name:                                               \
    return #name;
    MEGATRON_EXT_RULES(MEGATRON_EXT_RULE)
#undef MEGATRON_EXT_RULE
  }
  return "no rule";
}

Rule read_rule(int64_t value, int64_t segment, const char* moment) {
  if (!is_rule(value)) {
    fail("segment ", segment, ": ", value, " is no rule for ", moment);
  }
  return static_cast<Rule>(value);
}

Coefficients read_coefficients(const double* values, uint64_t key, Rule rule) {
  Coefficients out{};
  for (int i = 0; i < kCoefficients; ++i) {
    out.c[i] = static_cast<float>(values[i]);
  }
  out.key = key;
  if (rule == Rule::prune_random) {
    const double probability = values[0];
    if (!(probability >= 0.0 && probability <= 1.0)) {
      fail("prune_random: a probability of ", probability, " is not within 0 and 1");
    }
    out.limit = static_cast<uint64_t>(std::llround(std::ldexp(probability, 53)));
  }
  return out;
}

struct Memory {
  const char* begin;
  const char* end;
  const char* list;
  size_t index;
};

void check_no_shared_memory(std::vector<Memory>& memory) {
  auto before = [](const Memory& a, const Memory& b) { return a.begin < b.begin; };
  if (!std::is_sorted(memory.begin(), memory.end(), before)) {
    std::sort(memory.begin(), memory.end(), before);
  }
  for (size_t i = 1; i < memory.size(); ++i) {
    const Memory& a = memory[i - 1];
    const Memory& b = memory[i];
    if (b.begin < a.end) {
      fail(a.list, "[", a.index, "] and ", b.list, "[", b.index, "] share memory");
    }
  }
}

}  // namespace

Statistics read_statistics(int64_t statistics) {
  if (statistics < 0 || statistics > 2) {
    fail("statistics must be 0 (none), 1 (after) or 2 (before and after), not ", statistics);
  }
  return static_cast<Statistics>(statistics);
}

Launch read_table(const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& segments,
                  const Tensor& coefficients, bool cuda, int32_t device_index) {
  const size_t count = exp_avg.size();
  if (exp_avg_sq.size() != count) {
    fail("exp_avg has ", count, " tensors, exp_avg_sq ", exp_avg_sq.size());
  }
  const TensorCheck check_tensor(cuda, device_index);
  struct Pair {
    void* data[kMoments];
    Type type[kMoments];
    int64_t numel;
  };
  std::vector<Pair> pairs(count);
  std::vector<Memory> memory;
  memory.reserve(2 * count);
  for (size_t i = 0; i < count; ++i) {
    Pair& pair = pairs[i];
    int64_t numel_v = 0;
    pair.data[0] = check_tensor(exp_avg[i], "exp_avg", i, pair.type[0], pair.numel);
    pair.data[1] = check_tensor(exp_avg_sq[i], "exp_avg_sq", i, pair.type[1], numel_v);
    if (pair.numel != numel_v) {
      fail("exp_avg[", i, "] has ", pair.numel, " elements, exp_avg_sq[", i, "] ", numel_v);
    }
    if (pair.numel > 0) {
      for (int moment = 0; moment < kMoments; ++moment) {
        const char* begin = static_cast<const char*>(pair.data[moment]);
        const int64_t size = pair.type[moment] == Type::float32 ? 4 : 2;
        memory.push_back(
            {begin, begin + pair.numel * size, moment == 0 ? "exp_avg" : "exp_avg_sq", i});
      }
    }
  }
  check_no_shared_memory(memory);

  check_table(segments, "segments", ScalarType::Long, "int64", kIntegers);
  check_table(coefficients, "coefficients", ScalarType::Double, "float64",
              kMoments * kCoefficients);
  const int64_t rows = segments.size(0);
  if (coefficients.size(0) != rows) {
    fail("segments has ", rows, " rows, coefficients ", coefficients.size(0));
  }
  const int64_t* integers = static_cast<const int64_t*>(segments.data_ptr());
  const double* values = static_cast<const double*>(coefficients.data_ptr());

  Launch launch;
  launch.records.reserve(rows);
  for (int64_t s = 0; s < rows; ++s, integers += kIntegers, values += kMoments * kCoefficients) {
    const int64_t tensor = integers[kTensor];
    if (tensor < 0 || tensor >= static_cast<int64_t>(count)) {
      fail("segment ", s, ": there is no tensor ", tensor, ", only ", count);
    }
    const Pair& pair = pairs[tensor];
    Record r{};
    r.begin = integers[kBegin];
    r.end = integers[kEnd];
    if (r.begin < 0 || r.end < r.begin || r.end > pair.numel) {
      fail("segment ", s, ": elements ", r.begin, " to ", r.end, " are not within tensor ", tensor,
           " of ", pair.numel, " elements");
    }
    r.where = {integers[kStart], integers[kBase], integers[kRowLength], integers[kRowStride]};
    if (r.where.start < 0 || r.where.base < 0 || r.where.row_length < 0 || r.where.row_stride < 0) {
      fail("segment ", s, ": start, base, row_length and row_stride must not be negative");
    }
    r.tensor = static_cast<int32_t>(tensor);
    r.rule[0] = read_rule(integers[kRuleM], s, "exp_avg");
    r.rule[1] = read_rule(integers[kRuleV], s, "exp_avg_sq");
    if (is_kind(r.rule[0], Kind::joint)) {
      fail("segment ", s, ": ", name(r.rule[0]), " is a rule for exp_avg_sq, not for exp_avg");
    }
    if (is_kind(r.rule[1], Kind::joint) && !is_kind(r.rule[0], Kind::kept)) {
      fail("segment ", s, ": ", name(r.rule[1]), " reads exp_avg, which must be kept beside it");
    }
    for (int moment = 0; moment < kMoments; ++moment) {
      r.data[moment] = pair.data[moment];
      r.type[moment] = pair.type[moment];
      r.coefficients[moment] = read_coefficients(
          values + moment * kCoefficients,
          static_cast<uint64_t>(integers[moment == 0 ? kKeyM : kKeyV]), r.rule[moment]);
    }
    if (r.begin < r.end) {
      launch.records.push_back(r);
    }
  }

  auto before = [](const Record& a, const Record& b) {
    return a.tensor != b.tensor ? a.tensor < b.tensor : a.begin < b.begin;
  };
  if (!std::is_sorted(launch.records.begin(), launch.records.end(), before)) {
    std::sort(launch.records.begin(), launch.records.end(), before);
  }
  launch.first_chunk.assign(count + 1, 0);
  int64_t chunk = 0;
  for (size_t i = 0; i < launch.records.size(); ++i) {
    Record& r = launch.records[i];
    if (i > 0 && launch.records[i - 1].tensor == r.tensor && launch.records[i - 1].end > r.begin) {
      fail("segments overlap in tensor ", r.tensor, ": ", launch.records[i - 1].begin, " to ",
           launch.records[i - 1].end, " and ", r.begin, " to ", r.end);
    }
    r.first_chunk = chunk;
    chunk += chunks(r);
    launch.first_chunk[r.tensor + 1] = chunk;
  }
  for (size_t t = 1; t <= count; ++t) {
    launch.first_chunk[t] = std::max(launch.first_chunk[t], launch.first_chunk[t - 1]);
  }
  return launch;
}

TableHeader header_of(const Launch& launch, int32_t device_index) {
  return {kTableMark, static_cast<int64_t>(launch.records.size()),
          static_cast<int64_t>(launch.first_chunk.size()) - 1, launch.total_chunks(), device_index};
}

Tensor to_tensor(const TableHeader& header) {
  Tensor out = torch::stable::empty({kHeaderWords}, ScalarType::Long);
  std::memcpy(out.data_ptr(), &header, sizeof(header));
  return out;
}

void write_table(const Launch& launch, const TableHeader& header, unsigned char* bytes) {
  std::memset(bytes, 0, Table::partials_at(header));
  std::memcpy(bytes, &header, sizeof(header));
  if (header.records > 0) {
    std::memcpy(bytes + Table::kRecordsAt, launch.records.data(), header.records * sizeof(Record));
  }
  std::memcpy(bytes + Table::first_chunk_at(header), launch.first_chunk.data(),
              launch.first_chunk.size() * sizeof(int64_t));
  int32_t* of_chunk = reinterpret_cast<int32_t*>(bytes + Table::record_of_chunk_at(header));
  for (int64_t i = 0; i < header.records; ++i) {
    of_chunk = std::fill_n(of_chunk, chunks(launch.records[i]), static_cast<int32_t>(i));
  }
}

TableHeader read_header(const Tensor& header, const Tensor& table, bool cuda) {
  TableHeader out{};
  const bool is_header = header.is_cpu() && header.scalar_type() == ScalarType::Long &&
                         header.is_contiguous() && header.numel() == kHeaderWords;
  if (is_header) {
    std::memcpy(&out, header.data_ptr(), sizeof(out));
  }
  const bool is_table = table.scalar_type() == ScalarType::Byte && table.is_contiguous() &&
                        (cuda ? table.is_cuda() && table.get_device_index() == out.device
                              : table.is_cpu() && out.device == -1);
  if (out.mark != kTableMark || !is_table || table.numel() != Table::size(out)) {
    fail("table and header are not what launch_table returned for the ", device_name(cuda));
  }
  return out;
}

WeightPairs read_weights(const Tensors& master, const Tensors& weights, bool cuda,
                         int32_t device_index) {
  if (master.size() != weights.size()) {
    fail("master has ", master.size(), " tensors, weights ", weights.size());
  }
  const TensorCheck check_tensor(cuda, device_index);
  WeightPairs pairs{{}, 0};
  for (size_t i = 0; i < master.size(); ++i) {
    WeightPair p{};
    int64_t of_weights = 0;
    p.data[0] = check_tensor(master[i], "master", i, p.type[0], p.elements);
    p.data[1] = check_tensor(weights[i], "weights", i, p.type[1], of_weights);
    if (p.elements != of_weights) {
      fail("master[", i, "] has ", p.elements, " elements, weights[", i, "] ", of_weights);
    }
    if (p.elements == 0) {
      continue;
    }
    p.tensor = static_cast<int64_t>(i);
    p.first_chunk = pairs.total_chunks;
    pairs.total_chunks += chunks(p);
    pairs.list.push_back(p);
  }
  return pairs;
}

HistogramLaunch read_histogram(const Tensors& tensors, const Tensor& ranges, const Tensor& prefixes,
                               int64_t level, bool cuda, int32_t device_index) {
  if (level < 0 || level >= kLevels) {
    fail("level must be 0, 1 or 2, not ", level);
  }
  const TensorCheck check_tensor(cuda, device_index);
  std::vector<HistogramRange> whole(tensors.size());
  std::vector<int64_t> numel(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    whole[i].data = check_tensor(tensors[i], "tensors", i, whole[i].type, numel[i]);
  }
  check_table(ranges, "ranges", ScalarType::Long, "int64", 4);
  const bool is_here =
      cuda ? prefixes.is_cuda() && prefixes.get_device_index() == device_index : prefixes.is_cpu();
  if (prefixes.scalar_type() != ScalarType::Long || prefixes.dim() != 1 ||
      !prefixes.is_contiguous() || !is_here) {
    fail("prefixes must be a contiguous int64 tensor of one dimension on the device of the others");
  }
  const int64_t groups = prefixes.size(0);
  HistogramLaunch launch{{}, 0};
  const int64_t* row = static_cast<const int64_t*>(ranges.data_ptr());
  for (int64_t i = 0; i < ranges.size(0); ++i, row += 4) {
    if (row[0] < 0 || row[0] >= static_cast<int64_t>(tensors.size())) {
      fail("range ", i, ": there is no tensor ", row[0], ", only ", tensors.size());
    }
    HistogramRange range = whole[row[0]];
    range.begin = row[1];
    range.end = row[2];
    range.group = row[3];
    if (range.begin < 0 || range.end < range.begin || range.end > numel[row[0]]) {
      fail("range ", i, ": elements ", row[1], " to ", row[2], " are not within tensor ", row[0],
           " of ", numel[row[0]], " elements");
    }
    if (range.group < 0 || range.group >= groups) {
      fail("range ", i, ": there is no group ", range.group, ", only ", groups);
    }
    if (range.begin == range.end) {
      continue;
    }
    range.first_chunk = launch.total_chunks;
    launch.total_chunks += (range.end - range.begin + kChunk - 1) / kChunk;
    launch.ranges.push_back(range);
  }
  return launch;
}

}  // namespace megatron_ext
